"""Features given in a request: they replace what would be looked up or computed, and only what they replace may be left out."""

from typing import Any

import numpy as np
import pytest
import xgboost as xgb

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
LOOKED_UP = {"orders": 10, "returns": 2, "hour": 10.5, "spend": 99.5, "price": 12.5, "unit_price": 12.5 / 3, "load": 4}
ALL = {**LOOKED_UP, "busy": 8, "channel": "store", "age": 30}


@pytest.fixture
def model(make_model, tmp_path, put_values) -> Any:
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=60)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=120)
    put_values("all_stats", ["all"], [4.0], age_s=30)
    made = make_model()
    made.into_cache(tmp_path)
    return made


def expected(registered: Any, **changed: float) -> float:
    names = [f.name for f in registered.contract.features]
    row = [{**ALL, "channel": 1.0, **changed}[name] for name in names]
    return float(registered.booster.predict(xgb.DMatrix(np.array([row], dtype=np.float64), feature_names=names))[0])


def ask(client: Any, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(PATH, json={"inputs": list(rows)})
    assert answer.status_code == 200, answer.text
    told: list[dict[str, Any]] = answer.json()["predictions"]
    return told


def test_all_features_given_need_nothing_else_and_the_store_is_not_asked(model, open_service) -> None:
    [told] = ask(open_service(), {"features": ALL})
    assert told["prediction"] == expected(model)
    assert (told["imputed"], told["shortfalls"]) == ([], {})
    assert told["feature_ages_s"] == {"shop_stats": None, "customer_stats": None, "all_stats": None}


def test_given_ones_replace_what_was_found_and_the_rest_is_looked_up(model, open_service) -> None:
    given = {"orders": 77.5, "busy": None, "channel": "web"}
    [told] = ask(open_service(), ROW | {"features": given})
    assert told["prediction"] == expected(model, orders=77.5, busy=np.nan, channel=0.0)
    assert told["feature_ages_s"] == {"shop_stats": 60.0, "customer_stats": 120.0, "all_stats": 30.0}


def test_a_view_given_whole_spares_its_key_if_no_other_view_needs_it(model, open_service) -> None:
    client = open_service()
    without = {k: v for k, v in ROW.items() if k not in ("customer",)}
    [told] = ask(client, without | {"features": {"spend": 99.5}})
    assert told["prediction"] == expected(model)
    assert told["feature_ages_s"] == {"shop_stats": 60.0, "customer_stats": None, "all_stats": 30.0}
    # The shop is a key of customer_stats too, so it may not be left out with shop_stats alone.
    answer = client.post(PATH, json={"inputs": [{k: v for k, v in ROW.items() if k != "shop"} | {"features": {"orders": 1, "returns": 1}}]})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"input": 0, "field": "shop", "detail": "is required"}]


def test_a_field_that_only_given_features_need_may_be_left_out(model, open_service) -> None:
    computed = {"hour": 10.5, "unit_price": 12.5 / 3, "busy": 8}
    left = {k: v for k, v in ROW.items() if k not in ("placed_at", "items")}
    [told] = ask(open_service(), left | {"features": computed})
    assert told["prediction"] == expected(model)


def test_rows_with_and_without_given_features_share_a_request(model, open_service) -> None:
    rows = [ROW, {"features": ALL | {"age": 3}}, ROW | {"age": 3}] * 5
    told = ask(open_service(), *rows)
    assert [t["prediction"] for t in told] == [expected(model), expected(model, age=3.0), expected(model, age=3.0)] * 5


def test_the_record_names_what_was_given_and_which_code_answered(model, open_service, logged) -> None:
    rows = [ROW, ROW | {"features": {"busy": None, "orders": 1}}, {"features": ALL}]
    ask(open_service(code_version="abc"), *rows)
    records = logged(3)
    assert [r.given for r in records] == [(), ("orders", "busy"), tuple(f.name for f in model.contract.features)]
    assert [r.code_version for r in records] == ["abc"] * 3
    assert records[1].features[0] == 1.0


@pytest.mark.parametrize(
    ("features", "field", "detail"),
    [
        ({"nonsense": 1}, "features.nonsense", "is not a feature of this model"),
        ({"orders": "many"}, "features.orders", "must be a number or null"),
        ({"orders": True}, "features.orders", "must be a number or null"),
        ({"orders": 1e39}, "features.orders", "must be a finite number"),
        ({"channel": True}, "features.channel", "must be a category, its number (0 to 1) or null"),
        ({"channel": 0.5}, "features.channel", "must be a category, its number (0 to 1) or null"),
        ({"channel": 2}, "features.channel", "must be a category, its number (0 to 1) or null"),
        ({"channel": -1}, "features.channel", "must be a category, its number (0 to 1) or null"),
        ([1, 2], "features", "must be an object of feature names and numbers"),
    ],
)
def test_what_cannot_be_a_feature_is_named(model, open_service, features, field, detail) -> None:
    answer = open_service().post(PATH, json={"inputs": [ROW, ROW | {"features": features}]})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"input": 1, "field": field, "detail": detail}]
