"""Answers, feature values and imputation, through the whole application with a real Valkey and a real booster."""

from typing import Any

import numpy as np
import pytest
import redis
import xgboost as xgb

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"


def expected(registered: Any, row: list[float]) -> float:
    names = [f.name for f in registered.contract.features]
    return float(registered.booster.predict(xgb.DMatrix(np.array([row], dtype=np.float64), feature_names=names))[0])


def ask(client: Any, *rows: dict[str, Any]) -> Any:
    answer = client.post(PATH, json={"inputs": list(rows)})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def stored(put_values: Any) -> None:
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=60)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=120)
    put_values("all_stats", ["all"], [4.0], age_s=30)


@pytest.mark.usefixtures("stored")
def test_an_answer_equals_the_booster_on_the_same_features(make_model, open_service, tmp_path) -> None:
    model = make_model()
    model.into_cache(tmp_path)
    body = ask(open_service(), ROW)
    wanted = expected(model, [10, 2, 10.5, 99.5, 12.5, 12.5 / 3, 4, 8, 1, 30])
    [prediction] = body["predictions"]
    assert prediction["prediction"] == wanted
    assert prediction["decision"] is (wanted >= 0.4)
    assert (body["model"], body["version"], prediction["model_version"]) == ("basket", 1, 1)
    assert prediction["feature_ages_s"] == {"shop_stats": 60.0, "customer_stats": 120.0, "all_stats": 30.0}
    assert prediction["imputed"] == []


@pytest.mark.usefixtures("stored")
def test_the_online_store_may_be_another_redis_than_the_logs(make_model, open_service, tmp_path, redis_url) -> None:
    make_model().into_cache(tmp_path)
    logs = redis_url.removesuffix("/0") + "/1"
    client = open_service(online_url=redis_url, redis_url=logs)
    assert ask(client, ROW)["predictions"][0]["imputed"] == []
    with redis.Redis.from_url(redis_url) as online, redis.Redis.from_url(logs) as other:
        assert [key for key in online.scan_iter() if not key.startswith(b"fs")] == []
        assert list(other.scan_iter(match="fs*")) == []


@pytest.mark.usefixtures("stored")
def test_a_batch_answers_each_row_as_if_it_were_alone(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    rows = [ROW | {"price": float(i), "shop": f"s{i % 3}", "channel": ["web", "store", "kiosk"][i % 3]} for i in range(300)]
    together = ask(client, *rows)["predictions"]
    for i in (0, 1, 2, 150, 299):
        alone = ask(client, rows[i])["predictions"][0]
        assert together[i] | {"request_id": "", "input_index": 0} == alone | {"request_id": ""}


def test_an_unknown_entity_is_served_with_the_recorded_defaults_and_said_so(make_model, open_service, tmp_path) -> None:
    model = make_model()
    model.into_cache(tmp_path)
    [prediction] = ask(open_service(), ROW | {"shop": "nowhere"})["predictions"]
    assert prediction["imputed"] == ["shop_stats", "customer_stats", "all_stats"]
    assert prediction["feature_ages_s"] == {"shop_stats": None, "customer_stats": None, "all_stats": None}
    nan = float("nan")
    assert prediction["prediction"] == expected(model, [5, nan, 10.5, 5, 12.5, 12.5 / 3, nan, nan, 1, 30])


def test_an_expired_view_is_imputed_or_served_as_declared(make_model, open_service, tmp_path, put_values) -> None:
    model = make_model()
    model.into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=3600)  # exactly its limit: still good
    put_values("customer_stats", [7, "s1"], [99.5], age_s=3601)  # expired, impute
    put_values("all_stats", ["all"], [4.0], age_s=7200)  # expired, serve
    [prediction] = ask(open_service(), ROW)["predictions"]
    assert prediction["imputed"] == ["customer_stats"]
    assert prediction["feature_ages_s"] == {"shop_stats": 3600.0, "customer_stats": 3601.0, "all_stats": 7200.0}
    assert prediction["prediction"] == expected(model, [10, 2, 10.5, 5, 12.5, 12.5 / 3, 4, 8, 1, 30])


@pytest.mark.parametrize("age_s", [None, 4000])
@pytest.mark.usefixtures("stored")
def test_a_view_declared_refuse_answers_503_naming_input_and_view(make_model, open_service, tmp_path, put_values, age_s) -> None:
    make_model(on_stale={"shop_stats": "refuse"}).into_cache(tmp_path)
    if age_s is not None:
        put_values("shop_stats", ["s2"], [1.0, 1.0], age_s=age_s)
    client = open_service()
    answer = client.post(PATH, json={"inputs": [ROW, ROW | {"shop": "s2"}]})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["type"] == "urn:mlplatform:problem:features-unavailable"
    [error] = answer.json()["errors"]
    assert error["input"] == 1
    assert "shop_stats" in error["detail"]
    assert ("missing" if age_s is None else "expired") in error["detail"]
    assert ask(client, ROW)["predictions"][0]["imputed"] == []


@pytest.mark.usefixtures("stored")
def test_a_view_packed_for_other_features_is_imputed_alone(make_model, open_service, tmp_path, put_values) -> None:
    make_model().into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [1.0, 2.0, 3.0], features=["orders", "returns", "new"])
    client = open_service()
    [prediction] = ask(client, ROW)["predictions"]
    assert prediction["imputed"] == ["shop_stats"]
    assert 'mlplatform_feature_shortfalls_total{model="basket",reason="unreadable",view="shop_stats"} 1.0' in client.get("/metrics").text


@pytest.mark.usefixtures("stored")
def test_a_stored_null_is_the_default_or_stays_missing_and_is_no_imputation(make_model, open_service, tmp_path, put_values) -> None:
    model = make_model()
    model.into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [float("nan"), float("nan")])
    [prediction] = ask(open_service(), ROW)["predictions"]
    assert prediction["imputed"] == []
    assert prediction["prediction"] == expected(model, [5, float("nan"), 10.5, 99.5, 12.5, 12.5 / 3, 4, 8, 1, 30])


@pytest.mark.usefixtures("stored")
def test_absent_optional_fields_and_unknown_categories_are_missing_values(make_model, open_service, tmp_path) -> None:
    model = make_model()
    model.into_cache(tmp_path)
    row = {k: v for k, v in ROW.items() if k != "age"} | {"channel": "kiosk"}
    nan = float("nan")
    wanted = expected(model, [10, 2, 10.5, 99.5, 12.5, 12.5 / 3, 4, 8, nan, nan])
    predictions = ask(open_service(), row, row | {"age": None})["predictions"]
    assert [p["prediction"] for p in predictions] == [wanted, wanted]


def test_inputs_that_make_a_feature_infinite_are_refused_by_name(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    answer = open_service().post(PATH, json={"inputs": [ROW, ROW | {"items": 0}]})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"input": 1, "detail": "the feature 'unit_price' comes out infinite for these values"}]


def test_a_failure_nobody_foresaw_is_a_500_without_a_trace(make_model, open_service, tmp_path, monkeypatch) -> None:
    from serving_app.model_handle import ModelHandle

    make_model().into_cache(tmp_path)
    client = open_service()
    monkeypatch.setattr(ModelHandle, "predict", lambda self, matrix: 1 / 0)
    answer = client.post(PATH, json={"inputs": [ROW]})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert "ZeroDivision" not in answer.text


@pytest.mark.usefixtures("stored")
def test_every_answered_input_reaches_the_prediction_log(make_model, open_service, tmp_path, logged) -> None:

    model = make_model()
    model.into_cache(tmp_path)
    client = open_service()
    body = ask(client, ROW, ROW | {"shop": "nowhere", "age": None})
    records = logged(2)
    assert [(r.request_id, r.input_index) for r in records] == [(p["request_id"], p["input_index"]) for p in body["predictions"]]
    first, second = records
    assert first.inputs == ROW
    assert first.prediction == body["predictions"][0]["prediction"] == expected(model, [np.nan if v is None else v for v in first.features])
    assert first.requested_at == "2013-09-01T12:00:00.000000+00:00"
    assert first.contract_digest == model.contract.digest()
    assert second.imputed == ("shop_stats", "customer_stats")
    assert second.features[-1] is None


def test_concurrent_requests_share_a_batch_and_each_gets_its_own_answer(make_model, open_service, tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    make_model().into_cache(tmp_path)
    client = open_service()
    prices = [float(i) for i in range(64)]
    alone = [ask(client, ROW | {"price": p})["predictions"][0]["prediction"] for p in prices]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda p: ask(client, ROW | {"price": p})["predictions"][0]["prediction"], prices))
    assert together == alone


def test_a_bad_neighbour_in_the_same_batch_fails_alone(make_model, open_service, tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    make_model().into_cache(tmp_path)
    client = open_service()
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda i: client.post(PATH, json={"inputs": [ROW | {"items": i % 2}]}).status_code, range(40)))
    assert codes == [422, 200] * 20
