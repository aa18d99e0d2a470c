"""Faults planted for the demonstration spoil what they say, and nothing else."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import xgboost as xgb

from mlplatform.catalog.discover import catalogs
from mlplatform.local.planted import heavier, planted, shuffled
from mlplatform.specs import Split

SPLIT = Split(train_start=date(2013, 1, 1), validate_start=date(2013, 1, 11), test_start=date(2013, 1, 21), end=date(2013, 2, 1))


def test_a_heavier_model_answers_the_same_bit_for_bit_from_many_more_trees() -> None:
    values = np.random.default_rng(0).normal(size=(500, 4))
    data = xgb.QuantileDMatrix(values, label=(values[:, 0] > 0).astype(float), feature_names=list("abcd"))
    booster = xgb.train({"objective": "binary:logistic", "nthread": 1}, data, 5)
    heavy = xgb.Booster()
    heavy.load_model(bytearray(heavier(bytes(booster.save_raw("ubj")), 300)))
    assert heavy.num_boosted_rounds() == 305
    assert heavy.inplace_predict(values).tobytes() == booster.inplace_predict(values).tobytes()
    assert heavy.feature_names == booster.feature_names


def test_labels_are_dealt_out_anew_where_they_are_learned_from_and_stay_where_the_model_is_tested() -> None:
    start = datetime(2013, 1, 1, tzinfo=UTC)
    rows = pl.DataFrame(
        {
            "id": range(310),
            "event_timestamp": [start + timedelta(hours=2.4 * n) for n in range(310)],
            "label": [n % 3 == 0 for n in range(310)],
        }
    )
    spoilt = shuffled(lambda _: rows, SPLIT, seed=1)({})
    both = rows.join(spoilt, on="id", suffix="_spoilt", validate="1:1")
    learned, tested = both.filter(pl.col("id") < 200), both.filter(pl.col("id") >= 200)
    assert learned["label"].sum() == learned["label_spoilt"].sum()
    assert (learned["label"] != learned["label_spoilt"]).mean() > 0.3
    assert tested["label"].equals(tested["label_spoilt"])
    assert spoilt.drop("label").equals(rows.drop("label"))


def test_only_the_model_that_is_named_is_spoilt() -> None:
    catalog = catalogs()[0]
    one, *others = catalog.models
    found = planted(catalog, one)
    assert list(found.models[1:]) == others
    assert found.models[0].gates == ()
    assert found.models[0].rows is not one.rows
