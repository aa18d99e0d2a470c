"""The paired test is fair to equal models, refuses worse ones, and takes the day as its unit."""

import numpy as np
import pytest
from scipy import stats

from mlplatform.evaluation.gates import judge_against_champion
from mlplatform.evaluation.paired import MIN_DAYS, paired_difference
from mlplatform.gate_specs import ChampionGate

DAYS = np.repeat(np.arange(30), 40)


def losses(rng: np.random.Generator, worse: float) -> np.ndarray:
    return worse + rng.normal(0, 0.02, 30)[DAYS] + rng.normal(0, 0.02, len(DAYS))


def test_days_of_equal_size_give_the_bound_of_a_t_test_on_day_means() -> None:
    values = losses(np.random.default_rng(1), 0.0)
    found = paired_difference(values, np.zeros(len(values)), DAYS)
    means = values.reshape(30, 40).mean(axis=1)
    assert found is not None
    assert found.upper == pytest.approx(means.mean() + stats.t.ppf(0.95, 29) * stats.sem(means), abs=1e-6)


def test_a_model_worse_by_just_the_margin_passes_in_about_one_of_twenty() -> None:
    rng = np.random.default_rng(2)
    found = [paired_difference(losses(rng, 0.01), np.zeros(len(DAYS)), DAYS) for _ in range(1000)]
    assert 0.03 <= np.mean([f is not None and f.upper <= 0.01 for f in found]) <= 0.07


def test_order_of_rows_changes_nothing_and_too_few_days_cannot_tell() -> None:
    rng = np.random.default_rng(3)
    values, order = losses(rng, 0.0), rng.permutation(len(DAYS))
    one, other = paired_difference(values, 0 * values, DAYS), paired_difference(values[order], 0 * values, DAYS[order])
    assert one is not None
    assert other is not None
    assert (one.difference, one.upper) == pytest.approx((other.difference, other.upper))
    few = DAYS < MIN_DAYS - 1
    assert paired_difference(values[few], 0 * values[few], DAYS[few]) is None


@pytest.mark.parametrize("days", [MIN_DAYS, 14, 60, 400])
def test_the_t_quantile_is_that_of_scipy(days: int) -> None:
    values, day = np.arange(days, dtype=float), np.arange(days)
    found = paired_difference(values, 0 * values, day)
    assert found is not None
    assert (found.upper - found.difference) / stats.sem(values) == pytest.approx(stats.t.ppf(0.95, days - 1), abs=1e-4)


@pytest.mark.parametrize(("worse", "passed"), [(0.0, True), (0.05, False)])
def test_the_gate_refuses_a_worse_model_and_says_on_how_many_days(worse: float, passed: bool) -> None:
    values = losses(np.random.default_rng(4), worse)
    found = paired_difference(values, 0 * values, DAYS)
    gate = judge_against_champion(ChampionGate(tolerance=0.02), 2, {"log_loss": 0.5 + worse}, 1, {"log_loss": 0.5}, found)
    assert gate.passed is passed
    assert "30 days and 1200 rows" in gate.reason
