"""Where entities fall: weights kept, sticky, growing without moving anybody else."""

import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlplatform.contracts import Arm, CanaryRule, Experiment, Layer, TrafficRules
from mlplatform.sticky import key_of, sticky_fields, sticky_key
from serving_app.model_handle import VersionRef
from serving_app.router import ModelRouter, Slot
from serving_app.traffic import Draw

salts = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64)
percents = st.floats(0, 100, allow_nan=False)
ENTITIES = [f"customer-{i}".encode() for i in range(4000)]


def handle(version: int, model: str = "m") -> Any:
    """What the router looks at in a loaded version."""
    contract = SimpleNamespace(fields=(), views=())
    return SimpleNamespace(ref=VersionRef(model, version, "s"), name=model, version=version, digest="d", contract=contract)


CHAMPION, CANARY, B, SHADOW = (handle(i) for i in range(1, 5))


def router(rules: TrafficRules, arms: tuple[Any, ...] = ()) -> ModelRouter:
    made = ModelRouter()
    made.put(Slot(CHAMPION, canary=CANARY, shadow=SHADOW, arms=arms, rules=rules))
    return made


def drawn(rules: TrafficRules, arms: tuple[Any, ...] = (), entities: list[bytes] = ENTITIES) -> list[str]:
    made = router(rules, arms)
    choices = [made.choose("m", entity) for entity in entities]
    return [choice.variant for choice in choices if choice is not None]


def experiment(a: float, salt: str = "x") -> Experiment:
    arms = (Arm(name="a", serves="production", weight=a), Arm(name="b", serves="3", weight=100 - a))
    return Experiment(name="price", salt=salt, arms=arms)


def within_bounds(found: int, share: float, n: int) -> bool:
    """Bernstein's inequality for the binomial count (also where few are expected): a billion draws give one outside by chance."""
    log_odds, variance = math.log(2 / 1e-9), n * share * (1 - share)
    return abs(found - n * share) <= log_odds / 3 + math.sqrt(log_odds**2 / 9 + 2 * variance * log_odds)


@given(salts, percents, st.integers(0, 10**9))
def test_a_canary_answers_its_share_of_the_entities(salt: str, weight: float, first: int) -> None:
    entities = [f"e{first + i}".encode() for i in range(1000)]
    counts = Counter(drawn(TrafficRules(canary=CanaryRule(weight=weight, salt=salt)), entities=entities))
    assert within_bounds(counts["canary"], weight / 100, len(entities))
    assert counts.total() == len(entities)


@given(salts, percents, percents)
def test_arms_share_what_the_canary_leaves(salt: str, weight: float, a: float) -> None:
    counts = Counter(drawn(TrafficRules(canary=CanaryRule(weight=weight), experiment=experiment(a, salt)), (None, B), ENTITIES[:1000]))
    for variant, share in (("canary", weight / 100), ("price/a", (1 - weight / 100) * a / 100)):
        assert within_bounds(counts[variant], share, 1000)
    assert counts["champion"] == 0


@given(salts, percents, percents)
def test_a_canary_that_grows_keeps_whom_it_had_and_moves_nobody_between_the_others(salt: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    made = [TrafficRules(canary=CanaryRule(weight=w, salt=salt), experiment=experiment(30)) for w in (small, large)]
    for before, after in zip(*(drawn(rules, (None, B), ENTITIES[:500]) for rules in made), strict=True):
        assert after in (before, "canary")


def test_from_one_to_five_percent_the_first_percent_stays() -> None:
    one, five = (
        {e for e, v in zip(ENTITIES, drawn(TrafficRules(canary=CanaryRule(weight=w))), strict=True) if v == "canary"} for w in (1, 5)
    )
    assert one
    assert one < five


def test_salts_and_purposes_draw_independently() -> None:
    draws = [Draw("canary", "x"), Draw("experiment", "x"), Draw("canary", "y")]
    halves = [[draw.place(e) < 0.5 for e in ENTITIES] for draw in draws]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert within_bounds(sum(x and y for x, y in zip(halves[i], halves[j], strict=True)), 0.25, len(ENTITIES))


@given(st.binary(max_size=200), salts)
def test_a_place_is_the_same_every_time_and_below_one(entity: bytes, salt: str) -> None:
    place = Draw("canary", salt).place(entity)
    assert 0 <= place < 1
    assert Draw("canary", salt).place(entity) == place


def test_another_process_draws_the_same() -> None:
    code = "from serving_app.traffic import Draw; print(Draw('canary', 'salt').place(b'customer-7').hex())"
    told = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert told == {Draw("canary", "salt").place(b"customer-7").hex()}


def test_places_are_pinned_so_that_an_upgrade_moves_nobody() -> None:
    assert Draw("canary", "canary").place(b"customer-7") == 0.6986919313976293


def test_without_rules_the_champion_answers_and_no_entity_is_asked_for() -> None:
    made = router(TrafficRules())
    assert not made.sticky("m")
    assert made.entity("m", {"a": 1}) is None
    choice = made.choose("m")
    assert choice is not None
    assert (choice.handle, choice.variant) == (CHAMPION, "champion")
    assert made.choose("m", b"anybody") is choice
    assert [s.percent for s in made.shares("m")] == [100]
    assert made.choose("other") is None
    assert made.shadows("other") == ()


def test_a_weight_for_a_canary_that_is_not_loaded_leaves_the_traffic_with_the_champion() -> None:
    made = ModelRouter()
    made.put(Slot(CHAMPION, rules=TrafficRules(canary=CanaryRule(weight=50))))
    assert not made.sticky("m")
    assert [(s.choice.variant, s.percent) for s in made.shares("m")] == [("champion", 100)]


def test_shares_tell_the_parts_of_all_entities() -> None:
    rules = TrafficRules(canary=CanaryRule(weight=10), experiment=experiment(30))
    shares = router(rules, (None, B)).shares("m")
    assert [(s.choice.variant, s.choice.handle.version, round(s.percent, 9)) for s in shares] == [
        ("price/a", 1, 27),
        ("price/b", 3, 63),
        ("canary", 2, 10),
    ]


def test_the_shadow_gets_copies_and_never_traffic() -> None:
    made = router(TrafficRules())
    assert [(c.handle, c.variant) for c in made.shadows("m")] == [(SHADOW, "shadow")]
    assert router(TrafficRules(shadow_share=0)).shadows("m") == ()


def test_a_swap_keeps_the_variants_and_choices_are_made_once() -> None:
    made = router(TrafficRules(canary=CanaryRule(weight=100)))
    before = made.generation
    here = made.slot("m")
    assert here is not None
    made.put(replace(here, current=handle(9), previous=here.current))
    slot = made.slot("m")
    assert slot is not None
    assert (slot.current.version, slot.previous, slot.canary) == (9, CHAMPION, CANARY)
    assert made.generation == before + 1
    assert made.choose("m", b"e") is made.choose("m", b"f")
    assert made.warm(CHAMPION.ref) is CHAMPION
    assert made.warm(VersionRef("m", 7, "s")) is None


def test_the_entity_is_the_join_keys_that_the_caller_sends(make_model) -> None:
    contract = make_model().contract
    assert sticky_fields(contract) == ("customer", "shop")
    row = {"shop": "s1", "customer": 7, "price": 1.5}
    assert sticky_key(contract, row) == sticky_key(contract, {"customer": 7.0, "shop": "s1", "price": 9})
    assert sticky_key(contract, row) != sticky_key(contract, row | {"customer": 8})


@pytest.mark.parametrize("row", [None, 3, [], {}, {"a": None}, {"a": [[[]]]}, {"a": {"b": 1}}])
def test_a_row_without_usable_values_has_a_key_too(row: Any) -> None:
    assert key_of(("a",), row) == b""


def test_neighbouring_values_do_not_run_together() -> None:
    assert key_of(("a", "b"), {"a": "x", "b": "yz"}) != key_of(("a", "b"), {"a": "xy", "b": "z"})


@pytest.mark.parametrize(
    "bad",
    [
        {"canary": {"weight": 101}},
        {"canary": {"weight": -1}},
        {"canary": {"weight": float("nan")}},
        {"canary": {"weight": 5, "salt": ""}},
        {"canary": {"weight": 5, "salt": "x" * 65}},
        {"unknown": 1},
        {"experiment": {"name": "e", "salt": "s", "arms": [{"name": "a", "serves": "1", "weight": 100}]}},
        {"experiment": {"name": "e", "salt": "s", "arms": [{"name": n, "serves": "1", "weight": 49} for n in "ab"]}},
        {"experiment": {"name": "e", "salt": "s", "arms": [{"name": "a", "serves": "1", "weight": 50}] * 2}},
        {"experiment": {"name": "e", "salt": "s", "arms": [{"name": n, "serves": "no such", "weight": 50} for n in "ab"]}},
        {"shadow_share": 1000},
    ],
)
def test_rules_that_do_not_add_up_are_no_rules(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrafficRules.model_validate(bad)


@given(percents, percents, st.booleans())
def test_rules_survive_their_json(weight: float, share: float, with_experiment: bool) -> None:
    rules = TrafficRules(canary=CanaryRule(weight=weight), shadow_share=share, experiment=experiment(30) if with_experiment else None)
    assert TrafficRules.model_validate_json(rules.canonical_json()) == rules


def test_the_rules_in_the_guide_are_rules() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "traffic.md").read_text()
    [example] = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    rules = TrafficRules.model_validate_json(example)
    assert rules.experiment is not None
    assert rules.canary.weight == 5


def in_layer(name: str, start: float, end: float) -> TrafficRules:
    return TrafficRules(experiment=experiment(50).model_copy(update={"layer": Layer(name=name, start=start, end=end)}))


@given(st.floats(1, 99))
def test_experiments_of_one_layer_never_hold_the_same_entity_and_together_hold_all(cut: float) -> None:
    lower, upper = (drawn(in_layer("ui", *part), (None, B), ENTITIES[:1000]) for part in ((0, cut), (cut, 100)))
    for one, other in zip(lower, upper, strict=True):
        assert (one == "champion") != (other == "champion")
    assert within_bounds(1000 - lower.count("champion"), cut / 100, 1000)


def test_layers_draw_independently_of_each_other_and_of_the_arms() -> None:
    entities = [f"e{i}".encode() for i in range(4000)]
    one, other = (drawn(in_layer(name, 0, 50), (None, B), entities) for name in ("ui", "price"))
    pairs = Counter((a == "champion", b == "champion") for a, b in zip(one, other, strict=True))
    assert all(within_bounds(pairs[key], 0.25, 4000) for key in ((False, False), (False, True), (True, False), (True, True)))
    assert within_bounds(one.count("price/a"), 0.25, 4000)


def test_the_shares_say_what_a_layer_leaves_to_the_champion() -> None:
    made = router(in_layer("ui", 20, 60), (None, B))
    assert [(s.choice.variant, round(s.percent, 9)) for s in made.shares("m")] == [("champion", 60), ("price/a", 20), ("price/b", 20)]
