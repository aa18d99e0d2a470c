"""A request-time function that fails, and clocks that jump: what a model's own code and time can do to a request."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from mlplatform.clock import SimulatedClock
from mlplatform.contracts import CONTRACT_FILE

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
NOW = datetime(2013, 9, 1, 12, tzinfo=UTC)  # as the fixture `clock_file` sets it


@pytest.mark.parametrize("query", ["", "?explain=false"])
def test_a_function_that_raises_is_a_500_that_names_it_and_tells_no_value(make_model, open_service, tmp_path, capfd, query) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    failed = [client.post(PATH + query, json={"inputs": [ROW | {"items": 13}]}) for _ in range(3)]
    for answer in failed:
        assert answer.status_code == 500
        told = answer.json()
        assert told["type"] == "urn:mlplatform:problem:feature-function-failed"
        assert "feature_definitions.shop.functions:basket_features raised ValueError" in told["detail"]
        assert told["request_id"] == answer.headers["x-request-id"]
        assert "unlucky" not in answer.text
    metrics = client.get("/metrics").text
    assert 'mlplatform_requests_total{model="basket",status="500",variant="champion",version="1"} 3.0' in metrics
    logged = capfd.readouterr().out
    assert logged.count("feature_function_failed") == logged.count("ValueError: unlucky") == 1  # its trace once, not for each request


def test_neighbours_of_a_request_whose_function_raises_are_answered(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda i: client.post(PATH, json={"inputs": [ROW | {"items": 13 if i % 2 else 3}]}).status_code, range(40)))
    assert codes == [200, 500] * 20


def test_a_function_that_fails_on_its_own_example_keeps_the_version_out(make_model, open_service, tmp_path) -> None:
    made = make_model()
    fields = [f.model_dump() | ({"example": 13} if f.name == "items" else {}) for f in made.contract.fields]
    spoilt = make_model(fields=fields)
    spoilt.into_cache(tmp_path)
    assert CONTRACT_FILE in spoilt.files
    client = open_service(wait=False)
    while "warm-up" not in (answer := client.get("/health/ready")).text:
        assert answer.status_code == 503
    assert "basket_features raised ValueError" in answer.json()["detail"]


def test_a_function_that_divides_by_zero_warns_nobody_and_the_infinite_feature_is_refused(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    with np.errstate(all="raise"):
        answer = client.post(PATH, json={"inputs": [ROW | {"items": 0}]})
    assert answer.status_code == 422
    assert "'unit_price' comes out infinite" in answer.json()["detail"]


@pytest.mark.parametrize(("jump_h", "shortfall"), [(1, "expired"), (-1, "future")])
def test_a_clock_that_jumps_is_told_in_every_answer_and_one_that_comes_back_is_as_if_nothing_was(
    make_model, open_service, put_values, tmp_path, clock_file, jump_h, shortfall, logged
) -> None:
    """Values a minute old, views that hold for an hour; the clock of the platform jumps an hour ahead, or back."""
    make_model().into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [10.0, 2.0])
    put_values("customer_stats", [7, "s1"], [99.5])
    put_values("all_stats", ["all"], [4.0])
    client = open_service()

    def ask() -> dict[str, Any]:
        answer = client.post(PATH, json={"inputs": [ROW]})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()["predictions"][0]
        return told

    before = ask()
    assert before["shortfalls"] == {}
    clock = SimulatedClock(clock_file)
    clock.set(NOW + timedelta(hours=jump_h))
    jumped = ask()
    assert jumped["shortfalls"] == dict.fromkeys(("shop_stats", "customer_stats", "all_stats"), shortfall)
    assert "shop_stats" in jumped["imputed"]
    assert client.get("/health/ready").status_code == 200  # limits, breakers and keys go by other clocks
    clock.set(NOW)
    assert ask() | {"request_id": ""} == before | {"request_id": ""}
    assert [datetime.fromisoformat(record.requested_at) for record in logged(3)] == [NOW, NOW + timedelta(hours=jump_h), NOW]
