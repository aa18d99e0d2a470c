"""Promotions and rollbacks, cut off at every point and finished by the next run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.contracts import PREVIOUS, PRODUCTION
from mlplatform.deployment.decide import (
    AliasWrite,
    Decision,
    NothingToRollBackToError,
    Serving,
    decide,
    decide_promotion,
    decide_rollback,
    ledger_entries,
    skew_reasons,
)
from mlplatform.records import Evaluation, GateResult, LedgerEntry, SkewSummary

START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass
class World:
    """A registry's aliases and a ledger, which apply a decision step by step and may be killed after any of them."""

    aliases: dict[str, int] = field(default_factory=dict)
    entries: list[LedgerEntry] = field(default_factory=list)

    @property
    def serving(self) -> Serving:
        return Serving("m", self.aliases.get(PRODUCTION), self.aliases.get(PREVIOUS), tuple(self.entries))

    def apply(self, decision: Decision, steps: int = 99) -> None:
        for write in decision.writes[:steps]:
            if write.version is None:
                self.aliases.pop(write.alias, None)
            else:
                self.aliases[write.alias] = write.version
        at = START + timedelta(hours=len(self.entries))
        self.entries += ledger_entries(decision, at, "test")[: max(0, steps - len(decision.writes))]

    def promote(self, version: int, steps: int = 99) -> Decision:
        decision = decide_promotion(version, (), self.serving)
        self.apply(decision, steps)
        return decision

    def rollback(self, steps: int = 99) -> Decision:
        decision = decide_rollback(self.serving, "it went wrong")
        self.apply(decision, steps)
        return decision

    @property
    def state(self) -> tuple[int | None, int | None, tuple[int, ...]]:
        return self.serving.production, self.serving.previous, self.serving.served


def served(*versions: int) -> World:
    world = World()
    for version in versions:
        world.promote(version)
    return world


def evaluation(*gates: GateResult) -> Evaluation:
    return Evaluation("m", 2, 100, {"auc": 0.7}, {}, 1, {"auc": 0.7}, (), gates)


def test_a_version_whose_blocking_gates_passed_is_promoted_previous_alias_first() -> None:
    warned = GateResult("ece_maximum", False, 0.1, "<= 0.02", "a target", blocking=False)
    decision = decide(evaluation(GateResult("auc_minimum", True, 0.7, ">= 0.6", "fine"), warned), served(1).serving)
    assert decision.action == "promote"
    assert decision.writes == (AliasWrite(PREVIOUS, 1), AliasWrite(PRODUCTION, 2))


def test_a_version_that_failed_a_gate_is_refused_with_every_reason_and_moves_nothing() -> None:
    gates = (GateResult("auc_maximum", False, 0.9, "<= 0.79", "suspected leak"), GateResult("champion", False, None, "", "worse"))
    decision = decide(evaluation(*gates), served(1).serving)
    assert (decision.action, decision.writes) == ("refuse", ())
    assert decision.reason == "auc_maximum: suspected leak; champion: worse"
    (entry,) = ledger_entries(decision, START, "gate", "run-1", {"auc": 0.9})
    assert (entry.action, entry.version, entry.previous_version, entry.run_id, entry.evidence) == ("refuse", 2, 1, "run-1", {"auc": 0.9})


def test_a_version_that_serves_already_is_left_alone_even_if_its_gates_fail_now() -> None:
    decision = decide_promotion(1, ("auc_minimum: too low",), served(1).serving)
    assert decision.action == "none"
    assert ledger_entries(decision, START, "test") == ()


def test_rollback_goes_back_one_version_at_a_time_and_stops_at_the_first() -> None:
    world = served(1, 2, 3)
    assert world.state == (3, 2, (1, 2, 3))
    world.rollback()
    assert world.state == (2, 1, (1, 2))
    world.rollback()
    assert world.state == (1, None, (1,))
    with pytest.raises(NothingToRollBackToError, match="version 1 of m is the first"):
        world.rollback()


def test_rollback_without_anything_serving_is_an_error() -> None:
    with pytest.raises(NothingToRollBackToError, match="no version of m serves"):
        World().rollback()


def test_rollback_uses_the_previous_alias_where_the_ledger_is_empty() -> None:
    world = World({PRODUCTION: 7, PREVIOUS: 6})
    assert world.rollback().version == 6
    assert world.state == (6, None, (6,))


def test_a_version_rolled_back_is_not_promoted_again_by_the_next_run() -> None:
    world = served(1, 2)
    world.rollback()
    refused = world.promote(2)
    assert refused.action == "refuse"
    assert "rolled back" in refused.reason
    assert world.state[0] == 1
    world.apply(decide_promotion(2, (), world.serving, by_hand=True))
    assert world.state == (2, 1, (1, 2))


def test_by_hand_does_not_get_round_the_gates() -> None:
    assert decide_promotion(2, ("auc_maximum: leak",), served(1).serving, by_hand=True).action == "refuse"


def test_an_alias_moved_by_hand_is_found_and_recorded_before_the_next_move() -> None:
    world = served(1)
    world.aliases[PRODUCTION] = 5
    world.promote(6)
    assert [(e.action, e.version, e.previous_version) for e in world.entries] == [
        ("promote", 1, None),
        ("promote", 5, 1),
        ("promote", 6, 5),
    ]
    assert "recorded late" in world.entries[1].reason


@pytest.mark.parametrize("steps", range(4))
def test_a_promotion_cut_off_anywhere_is_completed_by_the_next_run(steps: int) -> None:
    world, whole = served(1, 2), served(1, 2, 3)
    world.promote(3, steps)
    world.promote(3)
    assert world.state == whole.state
    assert [(e.action, e.version, e.previous_version) for e in world.entries] == [
        (e.action, e.version, e.previous_version) for e in whole.entries
    ]
    assert world.promote(3).action == "none"


@pytest.mark.parametrize("steps", range(3))
@pytest.mark.parametrize("versions", [(1, 2, 3), (1, 2)])
def test_a_rollback_cut_off_anywhere_is_completed_by_the_next(steps: int, versions: tuple[int, ...]) -> None:
    world, whole = served(*versions), served(*versions)
    whole.rollback()
    world.rollback(steps)
    world.rollback()
    assert world.state == whole.state
    assert [e.action for e in world.entries] == [e.action for e in whole.entries]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_rollback_cut_off_before_its_entry_is_not_undone_by_the_next_promotion_run(steps: int) -> None:
    world = served(1, 2, 3)
    world.rollback(steps)
    assert world.promote(3).action == "refuse"
    assert world.state == (2, 1, (1, 2))


moves = st.lists(st.tuples(st.sampled_from(["promote", "rollback", "by hand"]), st.integers(1, 4), st.integers(0, 3)), max_size=12)


@given(moves)
def test_after_any_history_of_cut_off_moves_a_whole_one_leaves_aliases_and_ledger_in_agreement(history: list[tuple[str, int, int]]) -> None:
    world = World()
    for action, version, steps in history:
        _try(world, action, version, steps)
    decision = decide_promotion(9, (), world.serving)
    world.apply(decision)
    last = world.entries[-1]
    assert (last.action, last.version) == ("promote", 9)
    assert world.serving.unrecorded is None
    assert world.serving.production == world.serving.served[-1] == 9
    if len(world.serving.served) > 1:
        assert world.serving.previous == world.serving.served[-2]
        assert world.rollback().version == world.serving.served[-1] != 9


def _try(world: World, action: str, version: int, steps: int) -> None:
    run: Callable[[], object]
    if action == "rollback":
        run = lambda: world.rollback(steps)  # noqa: E731 - the two branches read alike
    else:
        run = lambda: world.apply(decide_promotion(version, (), world.serving, by_hand=action == "by hand"), steps)  # noqa: E731
    try:
        run()
    except NothingToRollBackToError:
        assert len(world.serving.served) <= 1


def skew(mismatched: int, compared: int = 100, max_rate: float = 0.0, unresolved: tuple[str, ...] = ()) -> SkewSummary:
    kinds = {"late_value": mismatched} if mismatched else {}
    return SkewSummary("m", ("", ""), compared, compared, mismatched, max_rate, kinds, unresolved=unresolved)


@pytest.mark.parametrize("newest", [None, skew(0), skew(0, 0), skew(1, max_rate=0.01), skew(0, unresolved=("a version is gone",))])
def test_skew_that_was_not_measured_or_is_within_the_declared_rate_stops_no_promotion(newest):
    assert skew_reasons(newest) == ()


def test_skew_above_the_declared_rate_stops_a_promotion_and_names_its_faults():
    assert skew_reasons(skew(2, max_rate=0.01)) == ("skew: 2 of 100 predictions differ (late_value 2) from what the tables say, 1.00% may",)
    decision = decide_promotion(2, skew_reasons(skew(1)), Serving("m", 1, None), by_hand=True)
    assert (decision.action, decision.before) == ("refuse", 1)


def test_what_cannot_be_rebuilt_does_not_pass_and_nothing_to_compare_does():
    assert not skew(0, unresolved=("version 3: gone",)).passed
    assert skew(0, 0).passed
    assert not skew(1).passed
