"""Schedules: the platform's clock, which may be a simulated one, decides the day."""

from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType

import dagster as dg
import polars as pl
import pytest

from mlplatform.orchestration.automation.jobs import training_run_config
from mlplatform.orchestration.automation.schedules import request_for_day, schedules
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import Catalog, ModelSpec, RequestField, Split

MODEL = ModelSpec(
    name="returns",
    description="Will it be sent back?",
    feature_service="none",
    inputs=MappingProxyType({"orders": timedelta(days=1)}),
    rows=lambda tables: pl.DataFrame(),
    row_key=("order_id",),
    request_fields=(RequestField(name="order_id", dtype="string", description="", example="o1"),),
    split=Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 4, 20)),
    max_label_delay=timedelta(hours=36),
)


@pytest.fixture
def ticks(shop: Catalog, clients, instance, repository):
    """What a schedule asks for at its tick: a list of run requests and skip reasons' texts."""

    def evaluate(name: str) -> tuple[list[dg.RunRequest], str | None]:
        found = {s.name: s for s in schedules([shop.model_copy(update={"models": (MODEL,)})])}
        wall = datetime(2026, 11, 23, tzinfo=UTC)
        with dg.build_schedule_context(
            instance, scheduled_execution_time=wall, resources={"platform": PlatformResource()}, repository_def=repository
        ) as context:
            data = found[name].evaluate_tick(context)
        return list(data.run_requests), data.skip_message

    return evaluate


def test_the_daily_ingestion_asks_for_yesterday_of_the_platforms_clock(ticks):
    requests, _ = ticks("shop_ingestion_daily")
    assert [r.partition_key for r in requests] == ["2024-05-02"]


def test_the_hourly_ingestion_asks_for_today_once_an_hour(ticks, set_clock, now):
    first, _ = ticks("shop_ingestion_hourly")
    set_clock(now + timedelta(minutes=40))
    same_hour, _ = ticks("shop_ingestion_hourly")
    set_clock(now + timedelta(minutes=60))
    next_hour, _ = ticks("shop_ingestion_hourly")
    assert [r.partition_key for r in (*first, *same_hour, *next_hour)] == ["2024-05-03"] * 3
    assert first[0].run_key == same_hour[0].run_key != next_hour[0].run_key


def test_a_day_before_the_catalogs_start_is_skipped_with_a_reason(ticks, set_clock):
    set_clock(datetime(2024, 5, 1, 0, 30, tzinfo=UTC))
    requests, reason = ticks("shop_ingestion_daily")
    assert not requests
    assert "2024-04-30 is outside" in reason


@pytest.mark.parametrize(
    ("day", "asked"),
    [(date(2024, 4, 30), False), (date(2024, 5, 1), True), (date(2024, 6, 30), True), (date(2024, 7, 1), False)],
)
def test_a_day_is_asked_for_between_the_catalogs_ends(shop, day, asked):
    found = request_for_day(shop.model_copy(update={"end": date(2024, 7, 1)}), day, "k")
    assert isinstance(found, dg.RunRequest if asked else dg.SkipReason)


def test_a_catalog_without_an_end_goes_on(shop):
    assert isinstance(request_for_day(shop, date(2031, 1, 1), "k"), dg.RunRequest)


def test_the_weekly_training_ends_where_labels_are_in(ticks):
    requests, _ = ticks("returns_training_weekly")
    # 3 May 12:00 less 36 h of label delay and a day: 1 May 00:00.
    assert requests[0].run_config == {"ops": {"training_set_returns": {"config": {"end": "2024-05-01"}}}}
    assert requests[0].run_key == "weekly-2024-W18"


def test_a_retraining_never_ends_before_the_declared_split():
    early = training_run_config(MODEL, datetime(2024, 1, 1, tzinfo=UTC))
    assert early["ops"]["training_set_returns"]["config"]["end"] == "2024-04-20"
