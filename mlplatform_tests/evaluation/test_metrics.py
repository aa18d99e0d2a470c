"""The metrics against scikit-learn, scipy and brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from mlplatform.evaluation import metrics
from mlplatform.specs import CostMatrix

COST = CostMatrix(miss=5, false_alarm=1)


@st.composite
def forecasts(draw: st.DrawFn, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes and coarse predictions, so that ties are common."""
    n = draw(st.integers(2, 60))
    y = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    if classes == 2:
        y[0], y[1] = 0, 1
    p = np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))) / 20
    return y, p


@given(forecasts())
def test_auc_log_loss_and_brier_equal_scikit_learn(forecast: tuple[np.ndarray, np.ndarray]) -> None:
    y, p = forecast
    assert metrics.auc(y, p) == pytest.approx(oracle.roc_auc_score(y, p))
    assert metrics.log_loss(y, p) == pytest.approx(oracle.log_loss(y, p), rel=1e-6)
    assert metrics.brier(y, p) == pytest.approx(oracle.brier_score_loss(y, p))


@given(forecasts(classes=1))
def test_ece_equals_the_weighted_gaps_of_the_reliability_table(forecast: tuple[np.ndarray, np.ndarray]) -> None:
    y, p = forecast
    gaps = 0.0
    for k in range(15):
        inside = (p >= k / 15) & ((p < (k + 1) / 15) | (k == 14))
        if inside.any():
            gaps += inside.sum() / len(y) * abs(y[inside].mean() - p[inside].mean())
    assert metrics.ece(y, p) == pytest.approx(gaps, abs=1e-9)
    table = metrics.reliability_table(y, p)
    assert table["rows"].sum() == len(y)
    assert table.height == 15
    filled = table.filter(table["rows"] > 0)
    assert metrics.ece(y, p) == pytest.approx(
        float(((filled["observed_rate"] - filled["mean_prediction"]).abs() * filled["rows"]).sum() / len(y))
    )


@given(forecasts(classes=1), st.floats(0.1, 50), st.floats(0.1, 50))
def test_costs_equal_a_count_row_by_row(forecast: tuple[np.ndarray, np.ndarray], miss: float, false_alarm: float) -> None:
    y, p = forecast
    cost = CostMatrix(miss=miss, false_alarm=false_alarm)
    found = metrics.cost_metrics(y, p, cost)

    def paid(warned: np.ndarray) -> float:
        return float(np.where(warned, (1 - y) * false_alarm, y * miss).mean())

    constant = min(paid(np.ones(len(y), bool)), paid(np.zeros(len(y), bool)))
    assert found["cost_per_row"] == pytest.approx(paid(p >= cost.threshold))
    assert found["constant_cost_per_row"] == pytest.approx(constant)
    if constant > 0:
        assert found["saving"] == pytest.approx(1 - found["cost_per_row"] / constant)
    else:
        assert np.isnan(found["saving"])
    thresholds = [0.0, 0.25, 0.5, cost.threshold, 1.0]
    assert metrics.cost_curve(y, p, cost, thresholds) == pytest.approx([paid(p >= t) for t in thresholds])


def test_the_declared_threshold_is_the_cheapest_for_calibrated_predictions() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(size=200_000)
    y = (rng.uniform(size=len(p)) < p).astype(int)
    grid = np.linspace(0, 1, 51)
    assert abs(grid[metrics.cost_curve(y, p, COST, list(grid)).argmin()] - COST.threshold) <= 0.021


def test_delong_interval_covers_the_true_auc_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(5)
    truth = 0.76024993890652  # two normals one standard deviation apart: Phi(1/sqrt(2))
    covered = 0
    for _ in range(400):
        y = rng.uniform(size=300) < 0.3
        z = rng.normal(size=300) + y
        _, low, high = metrics.auc_interval(y, 1 / (1 + np.exp(-z)))
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_wilson_interval_equals_scipy_and_knows_nothing_about_no_rows() -> None:
    from scipy.stats import binomtest

    low, high = metrics.wilson([0, 3, 10, 0], [10, 10, 10, 0])
    for k, successes in enumerate((0, 3, 10)):
        interval = binomtest(successes, 10).proportion_ci(method="wilson")
        assert (low[k], high[k]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert (low[3], high[3]) == (0, 1)


def test_the_saving_interval_is_repeatable_and_holds_the_saving() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(size=2000)
    y = (rng.uniform(size=2000) < p).astype(int)
    found = metrics.cost_metrics(y, p, COST)
    assert found == metrics.cost_metrics(y, p, COST)
    assert found["saving_low"] < found["saving"] < found["saving_high"]
    assert found["saving_high"] - found["saving_low"] < 0.2


def test_a_single_class_has_no_auc_and_says_nan_not_a_half() -> None:
    assert np.isnan(metrics.auc([1, 1], [0.2, 0.9]))
    assert np.isnan(metrics.auc([], []))


def test_a_missing_prediction_makes_every_metric_nan() -> None:
    found = metrics.score([0, 1, 1], [0.1, np.nan, 0.5], COST)
    for name in ("auc", "log_loss", "brier", "ece", "cost_per_row", "saving", "mean_prediction"):
        assert np.isnan(found[name]), name


def test_scoring_no_rows_gives_nan_and_no_warning() -> None:
    found = metrics.score([], [], COST)
    assert found["rows"] == 0
    assert all(np.isnan(v) for k, v in found.items() if k not in ("rows", "threshold"))


def test_certain_and_wrong_is_punished_but_finite() -> None:
    assert metrics.log_loss([1, 0], [0.0, 0.0]) == pytest.approx(oracle.log_loss([1, 0], [0.0, 0.0]))


@pytest.mark.parametrize(
    ("y", "p", "said"),
    [([0, 1], [0.5], "equal length"), ([0, 2], [0.5, 0.5], "0 or 1"), ([0, 1], [0.5, 1.5], "between 0 and 1"), ([[0]], [[0.5]], "1-D")],
)
def test_nonsense_is_refused_with_its_reason(y: list[int], p: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        metrics.score(y, p)


def test_a_reliability_table_never_loses_a_nan_silently() -> None:
    with pytest.raises(ValueError, match="NaN"):
        metrics.reliability_table([0, 1], [0.5, np.nan])
