"""Whether versions may share traffic: what is refused and why, and who answers how much."""

from dataclasses import replace

import pytest

from mlplatform.contracts import Arm, CanaryRule, ContractField, Experiment, Layer, ServingContract, TrafficRules
from mlplatform.deployment.traffic import TrafficState, refuse_rules, refuse_side

STATE = TrafficState(
    "m", {"production": 1, "canary": 2, "challenger": 3}, {1: "passed", 2: "passed", 3: "refused", 4: "passed"}, TrafficRules()
)


def experiment(serves: str) -> TrafficRules:
    arms = (Arm(name="a", serves="production", weight=30), Arm(name="b", serves=serves, weight=70))
    return TrafficRules(canary=CanaryRule(weight=10), experiment=Experiment(name="price", salt="x", arms=arms))


def test_without_rules_the_champion_answers_everything() -> None:
    assert STATE.shares() == (("champion", 1, 100),)


def test_arms_share_what_the_canary_leaves() -> None:
    state = TrafficState("m", STATE.aliases, STATE.gates, experiment("4"))
    assert state.shares() == (("price/a", 1, 27), ("price/b", 4, 63), ("canary", 2, 10))


def test_a_weight_without_a_canary_answers_nobody() -> None:
    state = TrafficState("m", {"production": 1}, STATE.gates, TrafficRules(canary=CanaryRule(weight=10)))
    assert state.shares() == (("champion", 1, 100),)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (experiment("9"), "the arm 'b': version 9 does not exist"),
        (experiment("challenger"), "the arm 'b': version 3 has not passed its gates (recorded: refused)"),
        (experiment("nobody"), "the arm 'b' serves the alias 'nobody', which no version carries"),
    ],
)
def test_rules_that_name_a_version_that_may_not_answer_are_refused(wanted: TrafficRules, reason: str) -> None:
    assert refuse_rules(STATE, wanted) == (reason,)


def test_a_canary_weight_needs_a_canary() -> None:
    bare = TrafficState("m", {"production": 1}, STATE.gates, TrafficRules())
    assert "no version carries the alias 'canary'" in refuse_rules(bare, TrafficRules(canary=CanaryRule(weight=5)))[0]
    assert refuse_rules(bare, TrafficRules()) == ()
    assert refuse_rules(STATE, experiment("4")) == ()


def test_a_canary_must_have_passed_its_gates_and_a_shadow_only_exist() -> None:
    assert refuse_side(STATE, "canary", 4) == ()
    assert refuse_side(STATE, "canary", 3) == ("version 3 has not passed its gates (recorded: refused)",)
    assert refuse_side(STATE, "shadow", 3) == ()
    assert refuse_side(STATE, "shadow", 9) == ("version 9 does not exist",)


def test_rules_that_draw_on_a_field_no_request_has_are_refused() -> None:
    fields = tuple(
        ContractField(name=name, dtype="string", description="", example="", constant=constant)
        for name, constant in (("customer", None), ("region", "all"))
    )
    served = replace(STATE, contract=ServingContract.model_construct(model="m", fields=fields))
    assert refuse_rules(served, TrafficRules(sticky_on=("customer",))) == ()
    [reason] = refuse_rules(served, TrafficRules(sticky_on=("customer", "region", "nofield")))
    assert reason == "sticky_on names 'region', 'nofield', which no request to m has; its fields: customer"
    assert refuse_rules(STATE, TrafficRules(sticky_on=("nofield",))) == ()  # no champion yet: nobody knows its fields


def test_a_layer_leaves_its_other_entities_to_the_champion() -> None:
    held = experiment("4").experiment
    assert held is not None
    layered = TrafficRules(canary=CanaryRule(weight=10), experiment=held.model_copy(update={"layer": Layer(name="ui", start=0, end=50)}))
    shares = TrafficState("m", STATE.aliases, STATE.gates, layered).shares()
    assert shares == (("champion", 1, 45), ("price/a", 1, 13.5), ("price/b", 4, 31.5), ("canary", 2, 10))


def test_rules_without_a_layer_are_read_by_services_that_know_none() -> None:
    assert "layer" not in experiment("4").canonical_json()
    assert TrafficRules.model_validate_json(experiment("4").canonical_json()) == experiment("4")
