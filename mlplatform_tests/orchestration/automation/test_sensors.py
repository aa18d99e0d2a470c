"""Sensors on an ephemeral instance, reading a real Valkey and a real lake."""

import json
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import polars as pl
import pytest
from redis import Redis

from mlplatform.clients.stream import StreamStatus
from mlplatform.contracts import EVALUATION_TAG, prediction_stream
from mlplatform.orchestration.automation.sensors import sensors
from mlplatform.orchestration.landing import land
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import SUMMARY
from mlplatform.records import ModelVersion, PerformanceSummary
from mlplatform.specs import Catalog, ModelSpec, RequestField, RetrainPolicy, Split

MODEL = ModelSpec(
    name="returns",
    description="Will it be sent back?",
    feature_service="none",
    inputs={"orders": timedelta(days=1)},
    rows=lambda tables: pl.DataFrame(),
    row_key=("order_id",),
    request_fields=(RequestField(name="order_id", dtype="string", description="", example="o1"),),
    split=Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 4, 20)),
    retrain=RetrainPolicy(metric="auc", max_metric_drop=0.03, min_outcomes=100, cooldown=timedelta(days=7)),
)


@pytest.fixture
def catalog(shop: Catalog) -> Catalog:
    return shop.model_copy(update={"models": (MODEL,)})


@pytest.fixture
def tick(catalog: Catalog, clients: Clients, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition):
    """Evaluates a sensor once: (run requests, skip message, new cursor)."""

    def evaluate(name: str, cursor: str | None = None):
        found = next(s for s in sensors([catalog]) if s.name == name)
        with dg.build_sensor_context(
            instance, cursor=cursor, resources={"platform": PlatformResource()}, repository_def=repository
        ) as context:
            data = found.evaluate_tick(context)
        return list(data.run_requests or []), data.skip_message, data.cursor

    return evaluate


# --- new events -----------------------------------------------------------------------------------------------------


def test_waiting_entries_ask_for_todays_partition(tick, systems, now):
    systems.publish(systems.order(1, now), systems.order(2, now))
    requests, _, cursor = tick("shop_new_events")
    assert [r.partition_key for r in requests] == ["2024-05-03"]
    assert cursor == "1"


def test_no_entry_is_skipped_with_a_reason(tick, systems):
    requests, reason, _ = tick("shop_new_events")
    assert not requests
    assert "no entry waits" in reason


def test_entries_that_were_landed_no_longer_wait(tick, systems, catalog, clients, today, now):
    systems.publish(systems.order(1, now))
    land(clients, next(s for s in catalog.sources if s.name == "orders"), today, "run")
    assert not tick("shop_new_events")[0]
    systems.publish(systems.order(2, now))
    assert tick("shop_new_events")[0]


def test_entries_read_but_never_acknowledged_still_wait(tick, systems, now):
    systems.publish(systems.order(1, now))
    systems.redis.xgroup_create("shop.orders", "mlplatform", id="0")
    systems.redis.xreadgroup("mlplatform", "dead", {"shop.orders": ">"})
    assert tick("shop_new_events")[0]


def test_a_group_that_cannot_tell_is_run(tick, systems, monkeypatch):
    unknown = StreamStatus(length=5, pending=0, lag=None, trimmed_unread=None, last_id="1-0", last_delivered_id="0-0")
    monkeypatch.setattr("mlplatform.clients.stream.StreamClient.status", lambda *_: unknown)
    requests, _, _ = tick("shop_new_events")
    assert len(requests) == 1


def test_a_run_at_work_is_not_asked_for_again(tick, systems, instance, now):
    systems.publish(systems.order(1, now))
    instance.create_run_for_job(_empty_job("shop_events"), status=dg.DagsterRunStatus.STARTED)
    requests, reason, cursor = tick("shop_new_events", "3")
    assert not requests
    assert "not finished" in reason
    assert cursor == "3"


def test_a_failed_run_is_asked_for_again_under_another_key(tick, systems, instance, now):
    systems.publish(systems.order(1, now))
    first, _, cursor = tick("shop_new_events")
    instance.create_run_for_job(_empty_job("shop_events"), status=dg.DagsterRunStatus.FAILURE)
    again, _, _ = tick("shop_new_events", cursor)
    assert first[0].run_key != again[0].run_key


def test_events_of_a_clock_outside_the_catalogs_days_are_skipped(tick, systems, set_clock, now):
    systems.publish(systems.order(1, now))
    set_clock(datetime(2024, 4, 1, tzinfo=UTC))
    requests, reason, _ = tick("shop_new_events")
    assert not requests
    assert "outside" in reason


def _empty_job(name: str) -> dg.JobDefinition:
    @dg.job(name=name)
    def empty() -> None:
        pass

    return empty


# --- new outcomes ---------------------------------------------------------------------------------------------------


def test_outcomes_wait_for_the_first_prediction(tick):
    requests, reason, _ = tick("returns_new_outcomes")
    assert not requests
    assert "no prediction" in reason


def test_new_predictions_and_new_labels_ask_for_monitoring_once_each(tick, clients, valkey_url):
    with Redis.from_url(valkey_url) as redis:
        redis.xadd(prediction_stream("returns"), {"record": "{}"})
    requests, _, cursor = tick("returns_new_outcomes")
    assert len(requests) == 1
    assert not tick("returns_new_outcomes", cursor)[0]
    clients.lake.replace(("validated", "orders"), pl.DataFrame({"order_id": ["o1"]}))
    labelled, _, newer = tick("returns_new_outcomes", cursor)
    assert labelled[0].run_key != requests[0].run_key
    assert not tick("returns_new_outcomes", newer)[0]


# --- retraining -----------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(clients: Clients, monkeypatch: pytest.MonkeyPatch, now: datetime):
    """A version with AUC .75 in its evaluation serves; `measured(auc)` stores a performance summary."""

    class Registry:
        def by_alias(self, model: str, alias: str) -> ModelVersion:
            return ModelVersion(model, 1, "run", "", now, (alias,), {EVALUATION_TAG: json.dumps({"auc": 0.75})})

    monkeypatch.setitem(clients.__dict__, "registry", Registry())

    def measured(auc: float, outcomes: int = 500) -> None:
        summary = PerformanceSummary("returns", ("2024-04-05", "2024-05-03"), 1000, outcomes, 0, {"auc": auc})
        clients.lake.append(
            ("performance", "returns"), pl.DataFrame({"at": [now]}), partitioned=False, metadata={SUMMARY: json.dumps(asdict(summary))}
        )

    return measured


def test_without_a_measurement_no_retraining_is_asked_for(tick, serving):
    requests, reason, _ = tick("returns_retrain")
    assert not requests
    assert "no outcomes yet" in reason


def test_a_good_model_is_left_alone(tick, serving):
    serving(0.74)
    assert not tick("returns_retrain")[0]


def test_a_worse_model_is_retrained_on_data_up_to_the_last_complete_label(tick, serving):
    serving(0.60)
    requests, _, cursor = tick("returns_retrain")
    assert len(requests) == 1
    assert requests[0].run_config == {"ops": {"training_set_returns": {"config": {"end": "2024-05-01"}}}}
    assert "worse by 0.15" in requests[0].tags["mlplatform/retrain_reason"]
    assert cursor


def test_a_second_request_waits_for_the_cooldown(tick, serving, set_clock, now):
    serving(0.60)
    _, _, cursor = tick("returns_retrain")
    serving(0.55, outcomes=600)
    requests, reason, same = tick("returns_retrain", cursor)
    assert not requests
    assert "cooling down until 2024-05-10" in reason
    set_clock(now + timedelta(days=8))
    later, _, newer = tick("returns_retrain", same)
    assert len(later) == 1
    assert newer != cursor


@pytest.mark.parametrize("version_made", [False, True])
def test_a_retraining_that_failed_before_it_made_a_version_is_asked_for_again(tick, serving, instance, version_made):
    serving(0.60)
    (request,), _, cursor = tick("returns_retrain")

    @dg.multi_asset(specs=[dg.AssetSpec(["model", "returns"])], name="model_returns")
    def model() -> dg.MaterializeResult:
        if not version_made:
            raise dg.Failure("MLflow is away")
        return dg.MaterializeResult()

    @dg.multi_asset(specs=[dg.AssetSpec(["evaluation", "returns"], deps=[["model", "returns"]])], name="evaluation_returns")
    def evaluation() -> dg.MaterializeResult:
        raise dg.Failure("the gates refuse it")

    job = dg.Definitions(assets=[model, evaluation]).resolve_implicit_global_asset_job_def()
    # The daemon launches the request's run with this tag.
    job.execute_in_process(instance=instance, tags={"dagster/run_key": request.run_key}, raise_on_error=False)
    requests, reason, _ = tick("returns_retrain", cursor)
    assert len(requests) == (0 if version_made else 1), reason


def test_too_few_outcomes_judge_nothing(tick, serving):
    serving(0.40, outcomes=99)
    requests, reason, _ = tick("returns_retrain")
    assert not requests
    assert "99 of the 100 outcomes" in reason
