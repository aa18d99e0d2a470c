"""What serves, changed for real: an MLflow store, the ledger in Delta, the notice in Redis."""

import pytest

from mlplatform.clients.registry import NewVersion
from mlplatform.contracts import (
    CANARY,
    PREVIOUS,
    PRODUCTION,
    SHADOW,
    TRAFFIC_TAG,
    CanaryRule,
    TrafficRules,
)
from mlplatform.deployment.decide import NothingToRollBackToError
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, roll_back, serving_state
from mlplatform.orchestration.summaries import store_summary
from mlplatform.orchestration.traffic_state import set_canary_weight, set_rules, set_side, traffic_state
from mlplatform.records import SkewSummary, TrainingManifest


def aliases(clients: Clients, model: str) -> tuple[int | None, int | None]:
    found = (clients.registry.by_alias(model, alias) for alias in (PRODUCTION, PREVIOUS))
    production, previous = (v.version if v else None for v in found)
    return production, previous


def told(clients: Clients, model: str) -> list[tuple[str, int | None, int | None, str]]:
    return [(e.action, e.version, e.previous_version, e.actor) for e in clients.ledger.entries(model)]


def test_a_version_past_its_gates_serves_and_the_ledger_and_the_services_know(clients, model, notices):
    decision = promote(clients, model, 1, "ann")
    assert decision.action == "promote"
    assert aliases(clients, model) == (1, None)
    assert told(clients, model) == [("promote", 1, None, "ann")]
    assert notices() == [model]


def test_the_next_version_leaves_the_way_back(clients, model):
    promote(clients, model, 1, "ann")
    promote(clients, model, 2, "ann")
    assert aliases(clients, model) == (2, 1)


def test_promoting_what_serves_changes_nothing(clients, model, notices):
    promote(clients, model, 1, "ann")
    notices()
    assert promote(clients, model, 1, "ann").action == "none"
    assert len(told(clients, model)) == 1
    assert notices() == []


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_version_that_failed_its_gates_is_refused_to_anybody_and_recorded(clients, model, notices, by_hand):
    promote(clients, model, 1, "ann")
    notices()
    decision = promote(clients, model, 3, "ann", by_hand=by_hand)
    assert decision.action == "refuse"
    assert "refused" in decision.reason
    assert aliases(clients, model) == (1, None)
    assert told(clients, model)[-1] == ("refuse", 3, 1, "ann")
    assert notices() == []


def test_a_version_never_evaluated_is_refused(clients, model, registry, tmp_path):
    contract = registry.contract_of(registry.version(model, 1))
    manifest = TrainingManifest(model, "s", 1, 1, ("x",), "abc", {}, "def", {}, {}, 0.5, {})
    registry.log_version(NewVersion(contract, manifest, tmp_path / "files"))
    decision = promote(clients, model, 4, "ann", by_hand=True)
    assert decision.action == "refuse"
    assert "never evaluated" in decision.reason


def test_while_the_newest_skew_is_above_the_declared_rate_nobody_promotes_and_it_is_recorded(clients, model, notices):
    def measured(mismatched: int) -> None:
        kinds = {"ttl_ignored": mismatched} if mismatched else {}
        store_summary(clients, "skew", SkewSummary(model, ("", ""), 9, 9, mismatched, 0.0, kinds), "run")

    promote(clients, model, 1, "ann")
    notices()
    measured(3)
    for by_hand in (False, True):
        assert promote(clients, model, 2, "ann", by_hand=by_hand).action == "refuse"
    assert aliases(clients, model) == (1, None)
    assert told(clients, model)[-1] == ("refuse", 2, 1, "ann")
    assert "skew: 3 of 9 predictions differ (ttl_ignored 3)" in clients.ledger.entries(model)[-1].reason
    assert notices() == []
    measured(0)
    assert promote(clients, model, 2, "ann").action == "promote"


def test_a_rollback_goes_one_version_back_and_is_told(clients, model, notices):
    promote(clients, model, 1, "ann")
    promote(clients, model, 2, "ann")
    notices()
    decision = roll_back(clients, model, "too many complaints", "bob")
    assert decision.action == "rollback"
    assert aliases(clients, model) == (1, None)
    assert told(clients, model)[-1] == ("rollback", 1, 2, "bob")
    assert clients.ledger.entries(model)[-1].reason == "too many complaints"
    assert notices() == [model]


def test_what_was_rolled_back_comes_back_only_by_hand(clients, model):
    promote(clients, model, 1, "dagster")
    promote(clients, model, 2, "dagster")
    roll_back(clients, model, "bad", "bob")
    assert promote(clients, model, 2, "dagster", "run-9").action == "refuse"
    assert aliases(clients, model)[0] == 1
    assert promote(clients, model, 2, "ann", by_hand=True).action == "promote"
    assert aliases(clients, model) == (2, 1)


def test_the_first_version_cannot_be_rolled_back(clients, model):
    with pytest.raises(NothingToRollBackToError):
        roll_back(clients, model, "bad", "bob")
    promote(clients, model, 1, "ann")
    with pytest.raises(NothingToRollBackToError):
        roll_back(clients, model, "bad", "bob")
    assert aliases(clients, model) == (1, None)


def test_a_promotion_killed_before_the_ledger_is_completed_by_the_next(clients, model, monkeypatch):
    promote(clients, model, 1, "ann")
    with monkeypatch.context() as patch:
        patch.setattr("mlplatform.clients.ledger.Ledger.append", _killed)
        with pytest.raises(KeyboardInterrupt):
            promote(clients, model, 2, "dagster", "run-1")
    assert aliases(clients, model) == (2, 1)
    assert promote(clients, model, 2, "dagster", "run-2").action == "promote"
    assert told(clients, model) == [("promote", 1, None, "ann"), ("promote", 2, 1, "dagster")]
    assert serving_state(clients, model).unrecorded is None


def test_a_step_tried_again_in_its_run_records_once(clients, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clients.redis, "publish", _killed)
        with pytest.raises(KeyboardInterrupt):
            promote(clients, model, 1, "dagster", "run-1")
    promote(clients, model, 1, "dagster", "run-1")
    assert told(clients, model) == [("promote", 1, None, "dagster")]


def test_a_canary_is_named_weighted_and_taken_away_and_the_ledger_and_the_services_know(clients, model, notices):
    promote(clients, model, 1, "ann")
    notices()
    assert set_canary_weight(clients, model, 5, "ann", "too early").reasons == (
        "no version carries the alias 'canary', so nothing could answer its 5 %",
    )
    assert set_side(clients, model, CANARY, 2, "ann", "trial").changed
    assert set_canary_weight(clients, model, 5, "ann", "trial").changed
    assert traffic_state(clients, model).shares() == (("champion", 1, 95), ("canary", 2, 5))
    assert notices() == [model, model]
    again = set_canary_weight(clients, model, 5, "ann", "trial")
    assert (again.changed, again.refused, notices()) == (False, False, [])
    set_canary_weight(clients, model, 0, "ann", "over")
    set_side(clients, model, CANARY, None, "ann", "over")
    assert traffic_state(clients, model).shares() == (("champion", 1, 100),)
    assert told(clients, model)[1:] == [
        ("canary", 2, None, "ann"),
        ("traffic", 2, 2, "ann"),
        ("traffic", 2, 2, "ann"),
        ("canary", None, 2, "ann"),
    ]
    assert serving_state(clients, model).unrecorded is None


def test_a_version_that_failed_its_gates_may_be_shadow_but_not_canary(clients, model):
    assert "has not passed its gates" in set_side(clients, model, CANARY, 3, "ann", "trial").reasons[0]
    assert set_side(clients, model, SHADOW, 3, "ann", "look").changed
    assert traffic_state(clients, model).aliases == {SHADOW: 3}


def test_rules_on_record_that_are_none_are_told_and_can_be_replaced(clients, model, registry):
    registry.set_model_tag(model, TRAFFIC_TAG, '{"canary": 5}')
    state = traffic_state(clients, model)
    assert state.rules is None
    assert "the rules on record are none" in state.fault
    assert set_rules(clients, model, TrafficRules(), "ann", "mend").changed
    assert traffic_state(clients, model).rules == TrafficRules()
    assert registry.model_tags(model)[TRAFFIC_TAG] == TrafficRules().canonical_json()


def test_the_weight_changes_and_the_rest_of_the_rules_stays(clients, model):
    set_side(clients, model, CANARY, 2, "ann", "trial")
    set_rules(clients, model, TrafficRules(canary=CanaryRule(weight=1, salt="x"), shadow_share=10), "ann", "trial")
    set_canary_weight(clients, model, 5, "ann", "more")
    assert traffic_state(clients, model).rules == TrafficRules(canary=CanaryRule(weight=5, salt="x"), shadow_share=10)


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
