"""Explanations on request: contributions that add up to the margin, and the values they are about."""

import math
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
USED = {"orders": 10.0, "returns": 2.0, "hour": 10.5, "spend": 99.5, "price": 12.5, "unit_price": 12.5 / 3, "load": 4.0, "busy": 8.0}
USED |= {"channel": 1.0, "age": 30.0}


@pytest.fixture
def model(make_model, tmp_path, put_values) -> Any:
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=60)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=120)
    put_values("all_stats", ["all"], [4.0], age_s=30)
    made = make_model()
    made.into_cache(tmp_path)
    return made


def ask(client: Any, query: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(PATH + query, json={"inputs": list(rows)})
    assert answer.status_code == 200, answer.text
    told: list[dict[str, Any]] = answer.json()["predictions"]
    return told


def test_contributions_and_base_add_up_to_the_margin_of_the_native_booster(model, open_service) -> None:
    rows = [ROW, ROW | {"age": None}, ROW | {"shop": "nowhere"}, ROW | {"channel": "fax"}, ROW | {"features": {"orders": None, "hour": 3}}]
    names = [f.name for f in model.contract.features]
    for told in ask(open_service(), "?explain=true", *rows):
        explained = told["explanation"]
        assert explained["unit"] == "log-odds"
        values = np.array([[np.nan if explained["features"][n] is None else explained["features"][n] for n in names]])
        data = xgb.DMatrix(values.astype(np.float32), feature_names=names)
        [margin] = model.booster.predict(data, output_margin=True)
        [exact] = model.booster.predict(data, pred_contribs=True)
        assert [*(explained["contributions"][n] for n in names), explained["base"]] == exact.tolist()
        total = explained["base"] + sum(explained["contributions"].values())
        assert total == pytest.approx(float(margin), abs=1e-5)
        assert 1 / (1 + math.exp(-total)) == pytest.approx(told["prediction"], abs=1e-6)
        assert told["prediction"] == float(model.booster.predict(data)[0])


def test_the_rest_of_the_answer_is_as_without(model, open_service) -> None:
    client = open_service()
    [plain] = ask(client, "", ROW)
    [both] = ask(client, "?explain=true&features=true", ROW)
    explained, values = both.pop("explanation"), both.pop("features")
    assert values == explained["features"] == USED
    assert list(explained["contributions"]) == list(USED)
    assert both | {"request_id": ""} == plain | {"request_id": ""}
    assert plain.keys() == both.keys()


def test_features_alone_are_the_values_used_and_null_where_there_is_none(model, open_service) -> None:
    [told] = ask(open_service(), "?features=true", ROW | {"age": None, "customer": 8})
    assert told["features"] == USED | {"age": None, "spend": 5.0}
    assert told["imputed"] == ["customer_stats"]
    assert "explanation" not in told


def test_false_asks_for_nothing(model, open_service) -> None:
    [told] = ask(open_service(), "?explain=false&features=0", ROW)
    assert told.keys().isdisjoint({"explanation", "features"})


@pytest.mark.parametrize("query", ["?explian=true", "?explain=true&verbose=1", "?explain=maybe", "?=1"])
def test_a_query_nobody_knows_is_refused(model, open_service, query) -> None:
    answer = open_service().post(PATH + query, json={"inputs": [ROW]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith("query.")


def test_fewer_inputs_are_explained_than_predicted(model, open_service) -> None:
    client = open_service(serving_explain_rows=2)
    assert len(ask(client, "?explain=true", ROW, ROW)) == 2
    assert len(ask(client, "?features=true", ROW, ROW, ROW)) == 3
    answer = client.post(PATH + "?explain=true", json={"inputs": [ROW] * 3})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "at most 2 inputs are explained in one request, got 3"


def test_it_is_documented_with_its_parameters(model, open_service) -> None:
    api = open_service().get("/openapi.json").json()
    operation = api["paths"][PATH]["post"]
    assert {p["name"]: p["in"] for p in operation["parameters"]} == {"explain": "query", "features": "query"}
    schemas = api["components"]["schemas"]
    assert set(schemas["Explanation"]["properties"]) == {"base", "contributions", "features", "unit"}
    assert {"explanation", "features", "shortfalls"} <= set(schemas["Prediction"]["properties"])
