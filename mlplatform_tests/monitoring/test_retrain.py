"""A retrain is asked for with a reason, once per cooldown, and never on what was not measured."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mlplatform.monitoring.retrain import MAX_IN_VAIN, Cursor, decide_retrain
from mlplatform.records import DriftSummary, PerformanceSummary, RetrainDecision
from mlplatform.specs import RetrainPolicy

NOW = datetime(2024, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = RetrainPolicy(max_metric_drop=0.03, metric="auc", max_drifted_share=0.5, min_outcomes=500, cooldown=7 * DAY)
GOOD = PerformanceSummary("m", ("2024-04-01", "2024-04-30"), 1000, 900, 5, {"auc": 0.74, "log_loss": 0.5})
BAD = replace(GOOD, metrics={"auc": 0.70, "log_loss": 0.6})
CALM = DriftSummary("m", "data_drift", 20000, 900, 3, 10, {}, 0.25, "psi")
STORM = replace(CALM, drifted=6)
REFERENCE = {"auc": 0.75, "log_loss": 0.5}


def ask(
    performance: PerformanceSummary | None = GOOD,
    drift: DriftSummary | None = CALM,
    cursor: str | None = None,
    now: datetime = NOW,
    policy: RetrainPolicy = POLICY,
    reference: dict[str, float] | None = REFERENCE,
) -> RetrainDecision:
    return decide_retrain("m", policy, performance, reference, [drift] if drift else [], cursor, now)


def test_a_model_that_does_as_well_as_in_its_evaluation_is_left_alone() -> None:
    found = ask()
    assert not found.retrain
    assert "auc 0.7400 against 0.7500" in found.reason


def test_a_drop_beyond_the_tolerance_asks_and_says_by_how_much() -> None:
    found = ask(BAD)
    assert found.retrain
    assert "worse by 0.0500" in found.reason


def test_a_metric_that_gets_better_as_it_falls_is_judged_the_other_way_round() -> None:
    policy = POLICY.model_copy(update={"metric": "log_loss"})
    assert ask(BAD, policy=policy).retrain
    assert not ask(replace(BAD, metrics={"log_loss": 0.2}), policy=policy).retrain


def test_more_drifted_columns_than_the_share_allows_ask_and_exactly_the_share_does_not() -> None:
    assert ask(drift=STORM).retrain
    assert not ask(drift=replace(CALM, drifted=5)).retrain


@pytest.mark.parametrize(
    ("performance", "reference", "said"),
    [
        (None, REFERENCE, "no outcomes yet"),
        (replace(BAD, outcomes=499), REFERENCE, "499 of the 500"),
        (BAD, None, "cannot be compared"),
        (replace(BAD, metrics={"auc": float("nan")}), REFERENCE, "cannot be compared"),
        (replace(BAD, metrics={}), REFERENCE, "cannot be compared"),
    ],
)
def test_what_cannot_be_judged_does_not_ask_and_is_said(
    performance: PerformanceSummary | None, reference: dict[str, float] | None, said: str
) -> None:
    found = ask(performance, None, reference=reference)
    assert not found.retrain
    assert said in found.reason
    assert "no drift was measured" in found.reason


def test_each_request_is_followed_by_its_cooldown_and_then_needs_new_evidence() -> None:
    first = ask(BAD)
    assert first.retrain
    soon = ask(replace(BAD, outcomes=950), cursor=first.cursor, now=NOW + 7 * DAY - timedelta(seconds=1))
    assert not soon.retrain
    assert "cooling down until 2024-05-08" in soon.reason
    assert soon.cursor == first.cursor
    same = ask(BAD, cursor=soon.cursor, now=NOW + 8 * DAY)
    assert not same.retrain
    assert "same evidence" in same.reason
    fresh = ask(replace(BAD, outcomes=950), cursor=same.cursor, now=NOW + 8 * DAY)
    assert fresh.retrain
    assert json.loads(fresh.cursor)["requested_at"] == (NOW + 8 * DAY).isoformat()


def test_the_cursor_survives_quiet_ticks_and_is_json() -> None:
    first = ask(BAD)
    quiet = ask(cursor=first.cursor, now=NOW + DAY)
    assert quiet.cursor == first.cursor
    assert Cursor.read(quiet.cursor).requested_at == NOW.isoformat()
    assert Cursor.read("") == Cursor.read(None) == Cursor()


@pytest.mark.parametrize("text", ["{", '{"surprise": 1}', "[1]", "7"])
def test_a_cursor_nobody_wrote_is_an_error_not_a_fresh_start(text: str) -> None:
    with pytest.raises(ValueError):
        ask(BAD, cursor=text)


def test_a_request_that_came_to_nothing_is_made_again_a_few_times_without_waiting_for_the_cooldown() -> None:
    def asked_again(cursor: str | None, in_vain: bool) -> RetrainDecision:
        return decide_retrain("m", POLICY, BAD, REFERENCE, [CALM], cursor, NOW + DAY, came_to_nothing=in_vain)

    cursor = ask(BAD).cursor
    assert not asked_again(cursor, in_vain=False).retrain
    for _ in range(MAX_IN_VAIN):
        found = asked_again(cursor, in_vain=True)
        assert found.retrain
        assert "came to nothing" in found.reason
        assert found.cursor != cursor  # the cursor is the run's key: each request needs its own
        cursor = found.cursor
    assert not asked_again(cursor, in_vain=True).retrain
    assert not decide_retrain("m", POLICY, GOOD, REFERENCE, [CALM], cursor, NOW + DAY, came_to_nothing=True).retrain
