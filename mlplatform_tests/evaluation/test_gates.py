"""A gate passes only on a number within its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.deployment.decide import skew_reasons
from mlplatform.evaluation.gates import gate_names, judge, judge_against_champion, judge_skew
from mlplatform.gate_specs import ChampionGate, Gate
from mlplatform.records import SkewSummary

FLOOR = Gate(metric="auc", minimum=0.7, reason="worth having")
CEILING = Gate(metric="auc", maximum=0.79, reason="two hours ahead")


def test_a_metric_within_bounds_passes_and_says_its_value() -> None:
    floor, ceiling = judge((FLOOR, CEILING), {"auc": 0.75})
    assert (floor.passed, ceiling.passed) == (True, True)
    assert (floor.name, floor.bound, floor.value) == ("auc_minimum", ">= 0.7", 0.75)


def test_an_auc_above_its_ceiling_fails_as_a_suspected_leak() -> None:
    (result,) = judge((CEILING,), {"auc": 0.812})
    assert not result.passed
    assert "suspected leak" in result.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gate", [FLOOR, CEILING, Gate(metric="auc", reason="no bound at all")])
def test_a_metric_that_could_not_be_measured_fails_every_gate(gate: Gate, value: float) -> None:
    (result,) = judge((gate,), {"auc": value})
    assert not result.passed
    assert result.value is None


def test_a_metric_nobody_measured_fails() -> None:
    (result,) = judge((Gate(metric="f1", minimum=0.1, reason="typo"),), {"auc": 0.9})
    assert not result.passed
    assert "no metric named 'f1'" in result.reason


def test_gate_names_are_unique_and_stay_when_bounds_change() -> None:
    gates = (
        FLOOR,
        CEILING,
        Gate(metric="auc", minimum=0.75, reason="target", blocking=False),
        Gate(metric="ece", minimum=0, maximum=0.1, reason=""),
    )
    assert gate_names(gates) == ("auc_minimum", "auc_maximum", "auc_minimum_2", "ece_range")
    assert [r.blocking for r in judge(gates, {"auc": 0.76, "ece": 0.01})] == [True, True, False, True]


def test_without_a_champion_the_gate_passes_with_that_reason() -> None:
    result = judge_against_champion(ChampionGate(), 1, {"log_loss": 0.5}, None, None)
    assert result.passed
    assert "no champion" in result.reason


def test_the_champion_itself_is_not_compared_with_itself() -> None:
    assert judge_against_champion(ChampionGate(), 4, {"log_loss": 0.5}, 4, {"log_loss": 0.5}).passed


@given(st.floats(0, 2), st.floats(0, 2), st.booleans(), st.floats(0, 0.1))
def test_the_challenger_may_be_worse_by_the_tolerance_and_no_more(mine: float, theirs: float, higher: bool, tolerance: float) -> None:
    gate = ChampionGate(metric="m", higher_is_better=higher, tolerance=tolerance)
    worse_by = theirs - mine if higher else mine - theirs
    result = judge_against_champion(gate, 2, {"m": mine}, 1, {"m": theirs})
    if abs(worse_by - tolerance) > 1e-12:
        assert result.passed == (worse_by < tolerance)


@pytest.mark.parametrize(("mine", "theirs"), [(float("nan"), 0.5), (0.5, float("nan"))])
def test_a_comparison_with_nan_fails(mine: float, theirs: float) -> None:
    assert not judge_against_champion(ChampionGate(), 2, {"log_loss": mine}, 1, {"log_loss": theirs}).passed


def test_a_champion_without_metrics_is_an_error_not_a_pass() -> None:
    with pytest.raises(ValueError, match="version 1 has no metrics"):
        judge_against_champion(ChampionGate(), 2, {"log_loss": 0.5}, 1, None)


def skew(mismatched: int, compared: int = 100, max_rate: float = 0.02, unresolved: tuple[str, ...] = ()) -> SkewSummary:
    return SkewSummary("m", ("a", "b"), compared, compared, mismatched, max_rate, {"value": mismatched}, unresolved=unresolved)


def test_skew_above_the_declared_rate_stops_a_version_and_says_what_to_do() -> None:
    result = judge_skew(skew(3), 2, 1)
    assert (result.name, result.passed, result.blocking, result.value) == ("skew", False, True, 0.03)
    assert "3 of 100 predictions differ" in result.reason
    assert "2.00% may" in result.reason
    assert "evaluate the version again" in result.reason
    assert judge_skew(skew(2), 2, 1).passed


def test_skew_that_was_never_measured_passes_and_says_so() -> None:
    result = judge_skew(None, 1, None)
    assert result.passed
    assert "never measured" in result.reason


def test_skew_does_not_take_the_seal_of_the_version_that_serves() -> None:
    result = judge_skew(skew(3), 1, 1)
    assert (result.passed, result.blocking) == (False, False)


def test_the_skew_gate_and_a_promotion_refuse_the_same() -> None:
    for summary in (None, skew(0), skew(2), skew(3), skew(0, unresolved=("gone",)), skew(0, compared=0)):
        assert judge_skew(summary, 2, 1).passed == (not skew_reasons(summary))


BEYOND = Gate(metric="auc", maximum=0.79, reason="two hours ahead", beyond_doubt=True)


def test_a_leak_ceiling_beyond_doubt_lets_chance_pass_and_a_leak_not() -> None:
    (honest,) = judge((BEYOND,), {"auc": 0.7902, "auc_low": 0.784, "auc_high": 0.796})
    assert honest.passed
    assert "between 0.7840 and 0.7960" in honest.reason
    (leak,) = judge((BEYOND,), {"auc": 0.811, "auc_low": 0.805, "auc_high": 0.817})
    assert not leak.passed
    assert "suspected leak: auc 0.8110, between 0.8050 and 0.8170, is above 0.79" in leak.reason


def test_a_floor_beyond_doubt_is_held_against_the_other_end_and_needs_an_interval() -> None:
    floor = Gate(metric="auc", minimum=0.7, reason="worth having", beyond_doubt=True)
    assert [judge((floor,), {"auc": 0.69, "auc_low": 0.6, "auc_high": high})[0].passed for high in (0.699, 0.7)] == [False, True]
    for metrics in ({"ece": 0.1}, {"ece": 0.1, "ece_low": float("nan"), "ece_high": 0.2}):
        (result,) = judge((Gate(metric="ece", maximum=0.9, reason="", beyond_doubt=True),), metrics)
        assert not result.passed
        assert "has no interval" in result.reason
