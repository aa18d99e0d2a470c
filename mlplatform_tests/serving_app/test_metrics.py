"""What Prometheus is told of a running service, as it stands after requests."""

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlplatform.local.supervisor import free_port

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"


def ask(client: httpx.Client, rows: int = 1) -> None:
    answer = client.post(PATH, json={"inputs": [ROW] * rows})
    assert answer.status_code == 200, answer.text


def told(client: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(client: httpx.Client, name: str, **labels: Any) -> float:
    return told(client)[name, frozenset((k, str(v)) for k, v in labels.items())]


@pytest.fixture
def client(make_model, open_service, tmp_path) -> httpx.Client:
    make_model(3).into_cache(tmp_path)
    client: httpx.Client = open_service()
    return client


def test_requests_and_their_stages_are_counted_by_model_version_and_variant(client) -> None:
    ask(client)
    ask(client, rows=4)
    client.post(PATH, json={"inputs": []})
    served = {"model": "basket", "version": 3, "variant": "champion"}
    assert value(client, "mlplatform_requests_total", **served, status=200) == 2
    assert value(client, "mlplatform_requests_total", **served, status=422) == 1
    assert value(client, "mlplatform_request_seconds_count", **served) == 3
    assert value(client, "mlplatform_predictions_total", **served) == 5
    for stage in ("features", "assemble", "predict", "wait"):
        assert value(client, "mlplatform_stage_seconds_count", model="basket", version=3, stage=stage) == 2
    wait, *parts = (
        value(client, "mlplatform_stage_seconds_sum", model="basket", version=3, stage=s)
        for s in ("wait", "features", "assemble", "predict")
    )
    assert 0 < sum(parts) <= wait  # asked one after the other, a request waits for its own batch only


def test_a_request_for_a_model_nobody_serves_makes_no_series_of_its_own(client) -> None:
    client.post("/v1/models/stranger/predict", json={"inputs": [ROW]})
    assert value(client, "mlplatform_requests_total", model="unknown", version="", variant="", status=404) == 1
    assert "stranger" not in client.get("/metrics").text


def test_reads_of_features_are_counted_by_where_the_values_came_from(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    fresh = open_service(serving_cache_s=300)
    ask(fresh)
    ask(fresh)
    assert value(fresh, "mlplatform_feature_reads_total", source="store") == 1
    assert value(fresh, "mlplatform_feature_reads_total", source="cache") == 1
    assert value(fresh, "mlplatform_online_store_away") == 0
    alone = open_service(online_url=f"redis://127.0.0.1:{free_port()}/0")
    ask(alone)
    assert value(alone, "mlplatform_feature_reads_total", source="fallback") == 1
    assert value(alone, "mlplatform_online_store_away") == 1


def test_queues_the_event_loop_and_the_build_are_shown(client) -> None:
    ask(client)
    assert value(client, "mlplatform_batch_requests_waiting") == 0
    assert value(client, "mlplatform_batches_running") == 0
    before = value(client, "mlplatform_event_loop_delay_seconds_count")
    deadline = time.monotonic() + 10
    while value(client, "mlplatform_event_loop_delay_seconds_count") <= before:
        assert time.monotonic() < deadline
    [build] = [dict(labels) for name, labels in told(client) if name == "mlplatform_build_info"]
    assert set(build) == {"version", "revision", "python"}
    assert ("process_resident_memory_bytes", frozenset()) in told(client)


def test_without_a_registry_there_is_no_time_it_was_seen_and_with_one_away_the_time_is_zero(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    assert "registry_seen" not in open_service().get("/metrics").text
    away = open_service(mlflow_url=f"http://127.0.0.1:{free_port()}")
    assert value(away, "mlplatform_registry_seen_timestamp_seconds") == 0
    assert value(away, "mlplatform_models_missing") == 0
