"""Monitoring assets against a real stream and real tables: exactly once, and late labels restate the past."""

import json
from datetime import date, timedelta
from typing import Any

import dagster as dg
import polars as pl
import pytest
from redis import Redis

from mlplatform.clients.lake import Lake
from mlplatform.contracts import PredictionRecord, prediction_stream
from mlplatform.monitoring import drain as log
from mlplatform.orchestration.assets.monitoring import drain_log, join_labels, monitoring_assets, report_performance
from mlplatform.orchestration.automation.sensors import sensors
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import SUMMARY
from mlplatform.records import DayRange
from mlplatform.specs import ModelSpec, RequestField, Split

UTC_US = pl.Datetime("us", "UTC")
STREAM = prediction_stream("returns")


def labelled(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """An order is asked about when it is placed; whether it came back is known from `returns`."""
    return tables["orders"].select(
        pl.col("placed_at").alias("event_timestamp"), "order_id", "label", pl.col("returned_at").alias("label_known_at")
    )


MODEL = ModelSpec(
    name="returns",
    description="Will it be sent back?",
    feature_service="none",
    inputs={"orders": timedelta(days=2)},
    rows=labelled,
    row_key=("order_id",),
    request_fields=(RequestField(name="order_id", dtype="string", description="", example="o1"),),
    split=Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 4, 20)),
    max_label_delay=timedelta(hours=36),
)


@pytest.fixture
def redis(valkey_url: str, clients: Clients):
    with Redis.from_url(valkey_url) as client:
        yield client


@pytest.fixture
def answer(redis: Redis, now):
    """Logs a prediction as the service does."""

    def log(number: int, hours_ago: float = 1.0, prediction: float = 0.5, **changes: Any) -> None:
        record = PredictionRecord(
            request_id=f"r{number}",
            input_index=0,
            requested_at=(now - timedelta(hours=hours_ago)).isoformat(),
            model="returns",
            version=1,
            variant="champion",
            inputs={"order_id": f"o{number}"},
            features=(1.0, None),
            feature_ages_s={"shop_totals": 30.0},
            imputed=(),
            prediction=prediction,
            latency_ms=1.0,
            contract_digest="d",
        ).model_copy(update=changes)
        redis.xadd(STREAM, {"record": record.model_dump_json()})

    return log


@pytest.fixture
def orders(clients: Clients, now):
    """Writes the labelled orders: (number, hours ago placed, label or None, hours ago known)."""

    def write(*rows: tuple[int, float, int | None, float | None]) -> None:
        frame = pl.DataFrame(
            {
                "order_id": [f"o{n}" for n, *_ in rows],
                "placed_at": [now - timedelta(hours=h) for _, h, _, _ in rows],
                "label": [label for _, _, label, _ in rows],
                "returned_at": [None if h is None else now - timedelta(hours=h) for *_, h in rows],
            },
            schema={"order_id": pl.String, "placed_at": UTC_US, "label": pl.Int8, "returned_at": UTC_US},
        ).with_columns(pl.col("placed_at").dt.date().alias("event_date"))
        key = ("validated", "orders")
        if clients.lake.exists(key):
            clients.lake.replace(key, frame, DayRange(date(2024, 4, 1), date(2024, 6, 1)))
        else:
            clients.lake.append(key, frame)

    return write


def drained(clients: Clients) -> list[str]:
    return sorted(clients.lake.read(("predictions", "returns"))["request_id"])


# --- drain ----------------------------------------------------------------------------------------------------------


def test_the_log_is_drained_once_and_again_only_what_is_new(clients, answer):
    answer(1)
    answer(2)
    assert drain_log(clients, MODEL, "run")["drained"] == 2
    assert drain_log(clients, MODEL, "run")["drained"] == 0
    answer(3)
    assert drain_log(clients, MODEL, "run")["drained"] == 1
    assert drained(clients) == ["r1", "r2", "r3"]


@pytest.mark.parametrize("appends_done", [0, 1, 2])
def test_a_drain_killed_at_any_of_its_commits_is_exactly_once_after_the_next(clients, answer, redis, monkeypatch, appends_done):
    answer(1)
    redis.xadd(STREAM, {"record": "nonsense"})
    answer(2)
    real, done = Lake.append, []

    def dies(self: Lake, *args: Any, **options: Any) -> bool:
        if len(done) == appends_done:
            raise KeyboardInterrupt
        done.append(1)
        written = real(self, *args, **options)
        if len(done) == appends_done == 2:
            raise KeyboardInterrupt
        return written

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            drain_log(clients, MODEL, "killed")
    answer(3)
    drain_log(clients, MODEL, "next")
    drain_log(clients, MODEL, "and again")
    assert drained(clients) == ["r1", "r2", "r3"]
    assert clients.lake.read(("quarantine", "predictions_returns"))["payload"].to_list() == ["nonsense"]


def test_several_batches_are_drained_in_one_run(clients, answer, monkeypatch):
    monkeypatch.setattr("mlplatform.orchestration.assets.monitoring.DRAIN_BATCH", 2)
    for number in range(5):
        answer(number)
    assert drain_log(clients, MODEL, "run")["drained"] == 5
    assert len(drained(clients)) == 5


def test_a_record_the_service_wrote_twice_counts_once(clients, answer):
    answer(1)
    drain_log(clients, MODEL, "run")
    answer(1)
    found = drain_log(clients, MODEL, "run")
    assert (found["drained"], found["repeated_by_the_service"]) == (0, 1)
    assert drained(clients) == ["r1"]


def test_what_is_stored_leaves_the_stream_except_its_last_entry(clients, answer, redis):
    for number in range(5):
        answer(number)
    drain_log(clients, MODEL, "run")
    # The last one stays: the sensor sees by it how far the log goes.
    assert redis.xlen(STREAM) == 1
    answer(5)
    drain_log(clients, MODEL, "run")
    assert redis.xlen(STREAM) == 1
    assert len(drained(clients)) == 6


def test_draining_a_log_nobody_wrote_gives_an_empty_table(clients):
    assert drain_log(clients, MODEL, "run")["drained"] == 0
    assert clients.lake.row_count(("predictions", "returns")) == 0


def test_a_record_repeated_after_weeks_on_the_service_s_disk_counts_once(clients, answer):
    answer(1, hours_ago=24 * 20)
    answer(2)
    drain_log(clients, MODEL, "run")
    answer(1, hours_ago=24 * 20)
    assert drain_log(clients, MODEL, "run")["repeated_by_the_service"] == 1
    assert drained(clients) == ["r1", "r2"]


def test_a_table_of_before_is_widened_by_the_next_drain_and_its_rows_are_read_with_the_new_ones(clients, answer, orders):
    later = ["shortfalls", "given", "code_version"]
    orders((1, 5.0, 1, 1.0), (2, 5.0, 0, 1.0))
    answer(1, 5.0)
    drain_log(clients, MODEL, "run")
    join_labels(clients, MODEL, "run")
    for key in (("predictions", "returns"), ("outcomes", "returns")):
        before = clients.lake.read(key).drop(later)
        clients.lake.replace(key, before)
        assert not set(later) & set(clients.lake.read(key).columns)
    assert log.given(clients.lake.read(("predictions", "returns"))).to_list() == [[]]

    answer(2, 5.0, shortfalls={"shop_totals": "missing"}, given=("orders",), code_version="abc")
    assert drain_log(clients, MODEL, "run")["drained"] == 1
    join_labels(clients, MODEL, "run")
    assert states(clients) == {"r1": "known", "r2": "known"}
    rows = clients.lake.read(("predictions", "returns")).sort("request_id")
    assert rows["shortfalls"].to_list() == [None, [{"view": "shop_totals", "reason": "missing"}]]
    assert rows["code_version"].to_list() == [None, "abc"]
    assert log.given(rows).to_list() == [[], ["orders"]]


# --- labels ---------------------------------------------------------------------------------------------------------


def states(clients: Clients) -> dict[str, str]:
    rows = clients.lake.read(("outcomes", "returns")).sort("request_id")
    return dict(rows.select("request_id", "state").iter_rows())


def test_labels_are_joined_as_they_become_known(clients, answer, orders, set_clock, now):
    answer(1, 5.0)
    answer(2, 5.0)
    orders((1, 5.0, 1, 1.0), (2, 5.0, None, None))
    drain_log(clients, MODEL, "run")
    join_labels(clients, MODEL, "run")
    assert states(clients) == {"r1": "known", "r2": "pending"}
    set_clock(now + timedelta(hours=32))
    join_labels(clients, MODEL, "run")
    assert states(clients) == {"r1": "known", "r2": "missing"}


def test_a_late_label_restates_the_day_it_belongs_to_and_no_other(clients, answer, orders):
    answer(1, 50.0)
    answer(2, 2.0)
    orders((1, 50.0, None, None), (2, 2.0, 0, 1.0))
    drain_log(clients, MODEL, "run")
    join_labels(clients, MODEL, "run")
    assert states(clients) == {"r1": "missing", "r2": "known"}
    before = clients.lake.version(("outcomes", "returns"))
    assert join_labels(clients, MODEL, "nothing new")["days_rewritten"] == 0
    assert clients.lake.version(("outcomes", "returns")) == before
    orders((1, 50.0, 1, 3.0), (2, 2.0, 0, 1.0))
    assert join_labels(clients, MODEL, "late")["days_rewritten"] == 1
    rows = clients.lake.read(("outcomes", "returns")).sort("request_id")
    assert rows["label"].to_list() == [1.0, 0.0]
    assert rows.height == 2


def test_a_label_known_after_the_clock_is_not_used(clients, answer, orders):
    answer(1, 5.0)
    orders((1, 5.0, 1, -1.0))
    drain_log(clients, MODEL, "run")
    join_labels(clients, MODEL, "run")
    assert states(clients) == {"r1": "pending"}


def test_without_a_drain_the_labels_say_what_to_materialize(clients, orders):
    orders((1, 5.0, 1, 1.0))
    with pytest.raises(dg.Failure, match="predictions/returns"):
        join_labels(clients, MODEL, "run")


def test_performance_is_of_the_known_outcomes_and_left_for_the_sensors(clients, answer, orders):
    for number in range(40):
        answer(number, 5.0, prediction=0.9 if number % 2 else 0.1)
    orders(*((n, 5.0, n % 2, 1.0) for n in range(40)))
    drain_log(clients, MODEL, "run")
    join_labels(clients, MODEL, "run")
    found = report_performance(clients, MODEL, "run")
    assert (found["predictions"], found["outcomes"]) == (40, 40)
    summary = json.loads(clients.lake.last_metadata(("performance", "returns"), SUMMARY))
    assert summary["metrics"]["auc"] == 1.0


def test_shadows_and_canaries_are_kept_and_labelled_beside_the_answers_and_count_in_no_performance(clients, answer, orders):
    for number in range(40):
        answer(number, 5.0, prediction=0.9 if number % 2 else 0.1, variant="price/b" if number < 20 else "champion")
        answer(number, 5.0, prediction=0.5, variant="shadow", version=2)
        answer(100 + number, 5.0, prediction=0.5, variant="canary", version=2)
    orders(*((n, 5.0, n % 2, 1.0) for n in (*range(40), *range(100, 140))))
    assert drain_log(clients, MODEL, "run")["drained"] == 120
    join_labels(clients, MODEL, "run")
    variants = clients.lake.read(("outcomes", "returns"))["variant"].value_counts().sort("variant")
    assert variants.rows() == [("canary", 40), ("champion", 20), ("price/b", 20), ("shadow", 40)]
    assert report_performance(clients, MODEL, "run")["outcomes"] == 40
    summary = json.loads(clients.lake.last_metadata(("performance", "returns"), SUMMARY))
    assert summary["metrics"]["auc"] == 1.0


def test_a_monitoring_run_before_the_first_prediction_measures_nothing_and_succeeds(clients, orders, materialize, monkeypatch):
    class Registry:
        def by_alias(self, *_: str) -> None:
            return None

    monkeypatch.setitem(clients.__dict__, "registry", Registry())
    orders((1, 5.0, 1, 1.0))
    result = materialize(list(monitoring_assets(MODEL)))
    assert result.success
    metadata = {e.asset_key.path[0]: e.materialization.metadata for e in result.get_asset_materialization_events()}
    assert metadata["predictions"]["drained"].value == 0
    assert "no prediction" in metadata["performance"]["note"].value
    assert "nothing measured" in metadata["data_drift"]["note"].value


def test_after_the_drain_the_sensor_still_sees_new_labels(clients, answer, orders, shop, instance, repository):
    answer(1)
    orders((1, 5.0, None, None))
    drain_log(clients, MODEL, "run")
    sensor = next(s for s in sensors([shop.model_copy(update={"models": (MODEL,)})]) if s.name == "returns_new_outcomes")

    def tick(cursor: str | None):
        with dg.build_sensor_context(
            instance, cursor=cursor, resources={"platform": PlatformResource()}, repository_def=repository
        ) as context:
            return sensor.evaluate_tick(context)

    first = tick(None)
    assert first.run_requests
    assert not tick(first.cursor).run_requests
    orders((1, 5.0, 1, 1.0))
    assert tick(first.cursor).run_requests
