"""Bad inputs: each is refused with a 422 that names the input and the field."""

import json
from typing import Any

import pytest

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"

BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("shop", 5, "must be a string"),
    ("shop", None, "must not be null"),
    ("shop", "", "must not be empty"),
    ("shop", "123456789", "at most 8 characters"),
    ("customer", "7", "must be an integer"),
    ("customer", 7.5, "must be an integer"),
    ("customer", True, "must be an integer"),
    ("customer", 0, "at least 1"),
    ("customer", 10**7, "at most 1e+06"),
    ("customer", [7], "must be an integer"),
    ("placed_at", "2013-09-01T10:30:00", "must carry its zone"),
    ("placed_at", "2013-09-01", "must carry its zone"),
    ("placed_at", "yesterday", "is not an ISO 8601 date and time"),
    ("placed_at", 1378031400, "must be an ISO 8601 date and time"),
    ("placed_at", "0001-01-01T00:00:00+14:00", "between the years 1900 and 2200"),
    ("price", -0.01, "at least 0"),
    ("price", 1e300, "must be a finite number"),
    ("price", "12", "must be a number"),
    ("price", False, "must be a number"),
    ("items", 2**64 - 1, "beyond a 64-bit integer"),
    ("items", 1e30, "beyond a 64-bit integer"),
    ("nonsense", 1, "is not a field of this model"),
    ("region", "all", "is filled in by the service"),
]


@pytest.fixture
def client(make_model, open_service, tmp_path) -> Any:
    make_model().into_cache(tmp_path)
    return open_service(serving_rows_limit=50, serving_body_limit=20_000)


def test_every_bad_value_is_named_by_input_and_field(client) -> None:
    for field, value, said in BAD_FIELDS:
        answer = client.post(PATH, json={"inputs": [ROW, ROW | {field: value}]})
        assert answer.status_code == 422, (field, value, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        body = answer.json()
        assert body["type"] == "urn:mlplatform:problem:invalid-input"
        assert body["status"] == 422
        [error] = body["errors"]
        assert (error["input"], error["field"]) == (1, field)
        assert said in error["detail"], (field, value, error)


def test_all_faults_of_a_request_are_told_at_once(client) -> None:
    answer = client.post(PATH, json={"inputs": [{"shop": 1}, "x"]})
    errors = {(e.get("input"), e.get("field")) for e in answer.json()["errors"]}
    assert errors == {(0, f) for f in ("shop", "customer", "placed_at", "price", "items", "channel")} | {(1, None)}


def test_a_zone_of_any_kind_and_whole_floats_are_taken(client) -> None:
    times = [{"placed_at": "2013-09-01T06:30:00-04:00"}, {"placed_at": "2013-09-01t10:30:00z"}]
    same = [ROW, *(ROW | time for time in times), ROW | {"customer": 7.0}, ROW | {"price": 12.50, "items": 3.0}]
    predictions = client.post(PATH, json={"inputs": same}).json()["predictions"]
    assert len({p["prediction"] for p in predictions}) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 19_000),
        *(b'{"input": []}', b'{"inputs": []}', b'{"inputs": {}}', b'{"inputs": [], "extra": 1}'),
        *(b'{"inputs": [NaN]}', b'{"inputs": [{"price": 1e999}]}', b'{"inputs": ["\\ud800"]}'),
    ],
)
def test_a_body_that_is_no_request_is_a_422(client, body) -> None:
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_limits_on_body_rows_and_media_type(client) -> None:
    assert client.post(PATH, json={"inputs": [ROW] * 50}).status_code == 200
    too_many = client.post(PATH, json={"inputs": [ROW] * 51})
    assert too_many.status_code == 422
    assert "at most 50" in too_many.json()["detail"]
    large = json.dumps({"inputs": [ROW], "pad": "x" * 30_000}).encode()
    assert client.post(PATH, content=large, headers={"content-type": "application/json"}).status_code == 413

    def chunks() -> Any:
        yield from (large[i : i + 1000] for i in range(0, len(large), 1000))

    assert client.post(PATH, content=chunks(), headers={"content-type": "application/json"}).status_code == 413
    assert client.post(PATH, content=b"a=1", headers={"content-type": "text/plain"}).status_code == 415


def test_unknown_models_routes_and_methods_answer_with_problem_details(client) -> None:
    for answer, status in (
        (client.post("/v1/models/nothing/predict", json={"inputs": [ROW]}), 404),
        (client.get("/v1/models/nothing"), 404),
        (client.get("/nowhere"), 404),
        (client.get(PATH), 405),
    ):
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
    assert "basket" in client.get("/v1/models/nothing").json()["detail"]
