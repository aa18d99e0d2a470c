"""The model's honest quality on the declared features: the leak figures of the flight data must not appear.

A quick model on a sixth of the training rows; `mlplatform bench quality` measures the real one.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import xgboost as xgb
from sklearn.metrics import roc_auc_score

from mlplatform.catalog.flights.rows import disruption_rows
from mlplatform.features.engine import compute
from mlplatform.features.plan import ViewPlan, tick_range
from mlplatform.records import DayRange

TEST_FROM, TRAIN_UNTIL = datetime(2013, 11, 1, tzinfo=UTC), datetime(2013, 9, 1, tzinfo=UTC)
# Of the leaks measured on this data the smallest shows as .763 and .772, the largest as .949; the ceiling of a model is .79.
HONEST = (0.735, 0.775)


@pytest.fixture(scope="module")
def views(year: Mapping[str, pl.DataFrame], flight_plans: dict[str, ViewPlan]) -> dict[str, pl.DataFrame]:
    found = {}
    for name, plan in flight_plans.items():
        first, last = tick_range(plan, DayRange(date(2013, 1, 1), date(2013, 12, 31))) or pytest.fail("no ticks")
        found[name] = compute(plan, year, first, last)
    return found


@pytest.fixture(scope="module")
def rows(year: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    rows = disruption_rows(year)
    asked = pl.col("event_timestamp")
    train = rows.filter(asked < TRAIN_UNTIL).sample(fraction=1 / 6, seed=1)
    return pl.concat([train, rows.filter(asked >= TEST_FROM).sample(fraction=1 / 2, seed=1)])


def auc(rows: pl.DataFrame, views: dict[str, pl.DataFrame], plans: dict[str, ViewPlan], late: timedelta) -> float:
    """Test AUC with the features as of T + `late`; zero is honest."""
    joined = rows.with_columns((pl.col("event_timestamp") + late).alias("_asked"))
    for name, plan in plans.items():
        stored = views[name].rename({"event_timestamp": "_asked"}).sort("_asked")
        joined = joined.sort("_asked").join_asof(stored, on="_asked", by=list(plan.join_keys), tolerance=plan.ttl, check_sortedness=False)
    assert joined.height == rows.height
    features = [f for plan in plans.values() for f in plan.features]
    columns = joined.select(pl.col(features).cast(pl.Float32), pl.col("scheduled_departure").dt.hour().cast(pl.Float32)).to_numpy()
    labels = joined["label"].to_numpy()
    train = (joined["event_timestamp"] < TRAIN_UNTIL).to_numpy()
    parameters = {
        "objective": "binary:logistic",
        "max_depth": 4,
        "eta": 0.12,
        "colsample_bytree": 0.3,
        "max_bin": 32,
        "nthread": 2,
        "seed": 1,
    }
    booster = xgb.train(parameters, xgb.QuantileDMatrix(columns[train], labels[train], max_bin=32), num_boost_round=70)
    return float(roc_auc_score(labels[~train], booster.predict(xgb.DMatrix(columns[~train]))))


def test_the_model_is_honest_and_the_same_test_would_see_a_leak(
    rows: pl.DataFrame, views: dict[str, pl.DataFrame], flight_plans: dict[str, ViewPlan]
) -> None:
    honest = auc(rows, views, flight_plans, timedelta(0))
    at_departure = auc(rows, views, flight_plans, timedelta(minutes=120))
    assert HONEST[0] < honest < HONEST[1]
    assert at_departure > honest + 0.025


def test_no_single_feature_knows_the_label(rows: pl.DataFrame, views: dict[str, pl.DataFrame], flight_plans: dict[str, ViewPlan]) -> None:
    """A leaked column stands out alone long before a model shows it."""
    for name, plan in flight_plans.items():
        joined = rows.sort("event_timestamp").join_asof(
            views[name], on="event_timestamp", by=list(plan.join_keys), tolerance=plan.ttl, check_sortedness=False
        )
        for feature in plan.features:
            known = joined.filter(pl.col(feature).is_not_null())
            alone = roc_auc_score(known["label"].to_numpy(), known[feature].to_numpy())
            assert max(alone, 1 - alone) < 0.73, (name, feature, alone)
            # Whether a value is there at all must not tell either (as a missing tail number would).
            missing = joined[feature].is_null().to_numpy()
            if 0.01 < np.mean(missing) < 0.99:
                assert abs(roc_auc_score(joined["label"].to_numpy(), missing) - 0.5) < 0.1, (name, feature)
