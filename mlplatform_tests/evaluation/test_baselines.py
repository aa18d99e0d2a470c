"""Baselines predict the test rows from the training rows, whatever holes those have."""

import numpy as np
import polars as pl
import pytest

from mlplatform.evaluation.baselines import baseline_predictions, constant
from mlplatform.evaluation.metrics import auc


@pytest.fixture
def rows() -> pl.DataFrame:
    rng = np.random.default_rng(2)
    n = 3000
    x = rng.normal(size=n)
    kind = rng.choice(["calm", "windy", "storm"], size=n)
    logit = x + 2.0 * (kind == "storm") - 1
    return pl.DataFrame(
        {
            "x": np.where(rng.uniform(size=n) < 0.2, np.nan, x * 1000),
            "never": pl.Series([None] * n, dtype=pl.Float64),
            "same": np.ones(n),
            "kind": kind,
            "label": (rng.uniform(size=n) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        }
    )


def test_the_logistic_baseline_learns_from_numbers_and_categories(rows: pl.DataFrame) -> None:
    train, test = rows.head(2000), rows.tail(1000).with_columns(pl.lit("hail").alias("unseen"))
    numeric = ("x", "never", "same")
    with_kind = baseline_predictions(train, test, numeric, ("kind",))["logistic"]
    without = baseline_predictions(train, test, numeric)["logistic"]
    assert with_kind.shape == (1000,)
    assert auc(test["label"], with_kind) > auc(test["label"], without) + 0.02 > 0.6
    assert abs(with_kind.mean() - test["label"].mean()) < 0.04


def test_a_category_never_seen_in_training_and_a_missing_one_are_answered(rows: pl.DataFrame) -> None:
    test = rows.tail(3).with_columns(pl.Series("kind", ["hail", None, "storm"]), pl.Series("x", [np.inf, None, 0.0]))
    assert np.isfinite(baseline_predictions(rows, test, ("x", "never"), ("kind",))["logistic"]).all()
    assert np.isfinite(baseline_predictions(rows, test, (), ("kind",))["logistic"]).all()


def test_the_constant_baseline_is_the_training_rows_base_rate(rows: pl.DataFrame) -> None:
    assert constant(rows, 3).tolist() == pytest.approx([rows["label"].mean()] * 3)
    with pytest.raises(ValueError, match="no training rows"):
        constant(rows.clear(), 3)
