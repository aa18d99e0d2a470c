"""The judge of canaries: its four words, its guard rail, and the steps that follow."""

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mlplatform.deployment.confidence import Arm, Sketch
from mlplatform.deployment.judge import ArmLook, Look, Progress, Rail, Verdict, judge, next_step, safe_at, track_of
from mlplatform.release_policy import CanaryPolicy, Tolerance

T0 = datetime(2013, 9, 1, tzinfo=UTC)
POLICY = CanaryPolicy()
NEAR = Tolerance(harm=0.01, margin=0.015)


def arm(
    rng: np.random.Generator, n: int = 200, errors: float = 0.01, slower: float = 1.0, worse: float = 0.0, shift: float = 0.0
) -> ArmLook:
    """A batch of a calibrated model whose labels are known. `worse`: by how much its predictions are pulled away from the truth."""
    truth = rng.beta(1, 3, n)
    label = (rng.random(n) < truth).astype(float)
    predicted = np.clip(truth + shift + worse * rng.choice([-1, 1], n), 0, 1)
    return ArmLook(
        n,
        int(rng.binomial(n, errors)),
        Sketch.of(slower * rng.lognormal(1, 0.5, n)),
        Arm.of(predicted),
        Arm.of((label - predicted) ** 2),
        Arm.of((1 + label - predicted) / 2),
    )


def looks(count: int, seed: int = 1, both: Any = None, **canary: Any) -> list[Look]:
    rng = np.random.default_rng(seed)
    given = both or (lambda _: {})
    return [Look(T0 + timedelta(minutes=k), arm(rng, **given(k)), arm(rng, **(given(k) | canary))) for k in range(count)]


def test_before_there_is_traffic_nothing_can_be_told() -> None:
    assert judge(POLICY, []).word == "cannot tell"
    few = judge(POLICY, looks(2, n=10))
    assert few.word == "cannot tell"
    assert "too little is known of" in few.reason


def test_one_that_is_alike_is_not_worse_and_each_measure_says_by_how_much() -> None:
    verdict = judge(POLICY, looks(40))
    assert verdict.word == "not worse"
    assert {f.state for f in verdict.findings} == {"safe"}
    for finding in verdict.findings:
        assert finding.low <= 0 <= finding.high
    json.dumps(verdict.evidence(), allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "measure"),
    [({"errors": 0.06}, "errors"), ({"slower": 2.0}, "slow"), ({"worse": 0.35}, "loss"), ({"shift": 0.2}, "prediction")],
)
def test_one_that_is_worse_is_called_so_for_the_measure_it_is_worse_in(fault, measure) -> None:
    verdict = judge(POLICY, looks(30, **fault))
    assert verdict.word == "worse"
    assert measure in {f.measure for f in verdict.findings if f.state == "worse"}
    assert measure in verdict.reason


def test_tenths_of_a_millisecond_are_no_harm_unless_the_policy_says_so() -> None:
    seen = looks(40, both=lambda _: {"slower": 0.05}, slower=0.1)  # a median of 0.27 ms beside one of 0.14
    assert judge(POLICY, seen).word == "not worse"
    strict = judge(CanaryPolicy(slow_slack_ms=0), seen)
    assert [f.measure for f in strict.findings if f.state == "worse"] == ["slow"]


def test_one_with_a_lower_loss_is_better() -> None:
    assert judge(POLICY, looks(40, both=lambda _: {"worse": 0.3}, worse=0.0)).word == "better"


def test_what_befalls_both_arms_is_no_fault_of_the_canary() -> None:
    def storm(look: int) -> dict[str, Any]:
        return {"errors": 0.4 if 10 < look < 25 else 0.01, "slower": 1 + (look % 9), "shift": 0.1 if look > 20 else 0.0}

    assert all(judge(POLICY, looks(40, seed, storm)[:k]).word != "worse" for seed in range(5) for k in (12, 20, 26, 40))


def test_without_labels_it_is_told_only_where_they_are_not_asked_for() -> None:
    bare = [Look(x.until, *(ArmLook(a.requests, a.errors, a.latencies, a.predictions) for a in (x.champion, x.canary))) for x in looks(40)]
    assert judge(POLICY, bare).reason == "too little is known of loss, calibration"
    assert judge(CanaryPolicy(labels=False), bare).word == "not worse"


def test_the_guard_rail_ends_a_canary_at_once_unless_the_champion_fails_as_well() -> None:
    broken = ArmLook(30, 15)
    assert judge(POLICY, [Look(T0, ArmLook(3000, 3), broken)]).guard
    assert not judge(POLICY, [Look(T0, ArmLook(3000, 1200), broken)]).guard
    assert not judge(POLICY, [Look(T0, ArmLook(3000, 3), ArmLook(3, 2))]).guard
    good = [Look(T0 + timedelta(minutes=i), ArmLook(300, 3), ArmLook(30, 0)) for i in range(200)]
    assert judge(POLICY, [*good, Look(T0 + timedelta(days=1), ArmLook(300, 3), ArmLook(30, 30))]).guard


def test_small_looks_of_a_canary_like_its_champion_break_the_guard_rail_less_often_than_alpha() -> None:
    """1,000 canaries, 150 looks of 20 requests, 8 % errors: a rail that compares each look's share with a tenth breaks for nearly all."""
    rng, shape = np.random.default_rng(0), (1000,)
    rail, naive = Rail(0.1, shape), np.zeros(shape, dtype=bool)
    for _ in range(150):
        ours, theirs = rng.binomial(20, 0.08, shape), rng.binomial(180, 0.08, shape)
        rail.add(Arm.of_counts(np.full(shape, 20.0), ours), Arm.of_counts(np.full(shape, 180.0), theirs))
        naive |= (ours > 2) & (ours / 20 > 2 * theirs / 180)
    assert (rail.e >= math.log(100)).mean() <= 0.01
    assert naive.mean() > 0.99


def step(
    word: str, percent: float = 1.0, requests: int = 500, minutes: float = 60, policy: CanaryPolicy = POLICY, answers: bool = True
) -> Any:
    count = 40 if answers else 1
    findings = judge(policy, looks(count)).findings
    verdict = Verdict(word, ("said",), findings, count)  # type: ignore[arg-type]
    return next_step(policy, Progress(percent, T0, requests, T0), verdict, T0 + timedelta(minutes=minutes))


def test_steps_rise_one_by_one_and_end_with_a_promotion() -> None:
    assert [step("not worse", p).percent for p in (0.0, 1.0, 5.0, 25.0)] == [1.0, 5.0, 25.0, 50.0]
    assert step("not worse", 50.0).action == step("better", 50.0).action == "promote"


def test_a_step_waits_for_its_requests_its_time_and_safe_answers() -> None:
    assert step("not worse", requests=99).action == "hold"
    assert step("not worse", minutes=9).action == "hold"
    assert step("cannot tell", answers=False).action == "hold"
    # Labels come hours later: until the last step, what is known without them is enough.
    assert step("cannot tell").action == "advance"
    assert step("cannot tell", 50.0).action == "hold"


def test_worse_is_rejected_at_any_step_and_at_once() -> None:
    assert step("worse", requests=1, minutes=0).action == "reject"


def test_what_cannot_be_told_in_time_ends_unless_it_is_declared_to_hold() -> None:
    assert step("cannot tell", 50.0, minutes=8 * 24 * 60).action == "end"
    patient = CanaryPolicy(at_the_end="hold")
    assert step("cannot tell", 50.0, minutes=8 * 24 * 60, policy=patient).action == "hold"


@pytest.mark.parametrize("wrong", [{"steps": ()}, {"steps": (5, 1)}, {"steps": (5, 100)}, {"alpha": 0.0}, {"min_step": timedelta(days=30)}])
def test_a_policy_that_does_not_add_up_is_refused(wrong) -> None:
    with pytest.raises(ValidationError):
        CanaryPolicy(**wrong)
    with pytest.raises(ValidationError):
        Tolerance(harm=0.1, margin=0.1)


# --- calibration: how far from its labels ------------------------------------------------------------------------------------

TIGHT = CanaryPolicy(prediction=Tolerance(harm=0.3, margin=0.4), loss=Tolerance(harm=0.2, margin=0.3), calibration=NEAR)


def off(champion: float, canary: float, count: int = 400, seed: int = 1) -> Any:
    """The finding of calibration where predictions are so far above the truth (below, where negative), storms in both arms."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        storm = float(rng.normal(0, 0.05))
        arms = [residuals(rng, storm - bias) for bias in (champion, canary)]
        found.append(Look(T0 + timedelta(minutes=k), *(ArmLook(residuals=arm) for arm in arms)))
    return next(f for f in judge(TIGHT, found).findings if f.measure == "calibration")


def residuals(rng: np.random.Generator, mean: float, n: int = 60) -> Arm:
    """Of labels less predictions with this mean, as the judge takes them."""
    return Arm.of((1 + np.clip(rng.normal(mean, 0.42, n), -1, 1)) / 2)


@pytest.mark.parametrize(("champion", "canary"), [(0.0, 0.12), (0.0, -0.12), (0.05, 0.15), (-0.02, 0.14)])
def test_one_that_is_further_from_its_labels_is_worse_on_either_side(champion, canary) -> None:
    finding = off(champion, canary)
    assert finding.state == "worse"
    assert "off by" in finding.reason


@pytest.mark.parametrize(("champion", "canary"), [(0.12, 0.01), (-0.12, 0.01), (0.1, -0.02)])
def test_one_that_mends_a_biased_champion_is_not_worse_however_much_it_differs(champion, canary) -> None:
    finding = off(champion, canary)
    assert abs(finding.difference) > 2 * NEAR.margin
    assert finding.state == "safe"


def test_storms_in_both_arms_make_no_canary_safe_that_is_further_from_its_labels_by_the_margin() -> None:
    rng, canaries, margin = np.random.default_rng(7), 400, NEAR.margin
    track = track_of(TIGHT, "calibration", (canaries,))
    for _ in range(120):
        storm = rng.normal(0.0, 0.06, canaries)
        means = [0.5 + (storm + bias) / 2 for bias in (0.0, -2 * margin)]
        champion, canary = (_batch(rng, mean) for mean in means)
        track.add(canary, champion)
    assert (track.safe >= safe_at(TIGHT)).mean() <= TIGHT.beta


def _batch(rng: np.random.Generator, means: np.ndarray, n: int = 60) -> Arm:
    x = np.clip(rng.normal(means[:, None], 0.21, (len(means), n)), 0, 1)
    return Arm(np.full(len(means), float(n)), x.sum(axis=1), (x**2).sum(axis=1))
