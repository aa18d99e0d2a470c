"""What served when: the ledger's answer against a simulator that writes down every moment."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlplatform.contracts import Arm, CanaryRule, Experiment, TrafficRules
from mlplatform.deployment.history import Served, changes, latest, served_at, told_action
from mlplatform.records import LedgerEntry

START = datetime(2024, 1, 1, tzinfo=UTC)
LAST_S = 400


def at(second: int) -> datetime:
    return START + timedelta(seconds=second)


def experiment(serves: str) -> Experiment:
    arms = (Arm(name="a", serves="production", weight=30), Arm(name="b", serves=serves, weight=70))
    return Experiment(name="price", salt="x", arms=arms)


def rules(weight: float, arm: str | None) -> TrafficRules:
    return TrafficRules(canary=CanaryRule(weight=weight), experiment=None if arm is None else experiment(arm))


VERSIONS = st.integers(1, 5)
MAYBE = st.none() | VERSIONS
EVENTS = st.one_of(
    st.tuples(st.sampled_from(["promote", "rollback"]), VERSIONS),
    st.tuples(st.sampled_from(["canary", "shadow"]), MAYBE),
    st.tuples(st.just("traffic"), st.tuples(st.integers(0, 100), st.none() | st.sampled_from(["2", "canary", "production"]))),
    st.tuples(st.sampled_from(["refuse", "approve", "reject", "verdict", "restore", "pass"]), VERSIONS),
)
# Seconds since the event before; a clock may be set back.
SCHEDULES = st.lists(st.tuples(st.integers(-20, 60), EVENTS), max_size=25)


def entry(when: datetime, action: str, value: Any) -> LedgerEntry:
    made = LedgerEntry(when, "m", action, "production", None if action == "traffic" else value, None, "ann", "why")
    if action in ("canary", "shadow", "traffic"):
        made = replace(made, alias="canary" if action == "traffic" else action)
    return replace(made, evidence={"rules": rules(*value).canonical_json()}) if action == "traffic" else made


def simulate(schedule: list[tuple[int, tuple[str, Any]]]) -> tuple[list[LedgerEntry], list[dict[str, Any]]]:
    """The entries, and for every second from 0 to LAST_S what is in force, by applying each event to every second from its own on."""
    seconds = [{"production": None, "canary": None, "shadow": None, "rules": TrafficRules()} for _ in range(LAST_S + 1)]
    entries, clock, reached = [], 0, 0
    for step, (action, value) in schedule:
        clock = min(max(clock + step, 0), LAST_S)
        reached = max(reached, clock)
        entries.append(entry(at(clock), action, value))
        for second in range(reached, LAST_S + 1):
            if action in ("promote", "rollback"):
                seconds[second]["production"] = value
            elif action in ("canary", "shadow"):
                seconds[second][action] = value
            elif action == "traffic":
                seconds[second]["rules"] = rules(*value)
    return entries, seconds


@given(SCHEDULES)
def test_what_served_at_any_second_is_what_a_simulation_second_by_second_says(schedule: list[tuple[int, tuple[str, Any]]]) -> None:
    entries, seconds = simulate(schedule)
    for second in range(0, LAST_S + 1, 7):
        wanted = seconds[second]
        found = served_at(entries, at(second))
        assert {"production": found.production, "canary": found.canary, "shadow": found.shadow, "rules": found.rules} == wanted
        assert sum(share for _, _, share in found.shares()) == 100 or abs(sum(share for _, _, share in found.shares()) - 100) < 1e-9
    last = latest(entries)
    assert (last.production, last.canary, last.shadow, last.rules) == tuple(seconds[LAST_S].values())


@given(SCHEDULES)
def test_the_changes_are_in_order_and_each_changes_something(schedule: list[tuple[int, tuple[str, Any]]]) -> None:
    entries, _ = simulate(schedule)
    told = [serving for _, serving in changes(entries)]
    assert [s.since for s in told] == sorted(s.since for s in told if s.since is not None)
    assert all(replace(a, since=None) != replace(b, since=None) for a, b in zip([Served(), *told], told, strict=False))


def test_a_change_counts_from_its_own_moment_on() -> None:
    entries = [entry(at(10), "promote", 1), entry(at(20), "promote", 2)]
    assert served_at(entries, at(9)).production is None
    assert served_at(entries, at(10)).production == 1
    assert served_at(entries, at(20) - timedelta(microseconds=1)).production == 1
    assert served_at(entries, at(20)).production == 2


def test_the_shares_of_canary_and_arms_are_of_the_versions_of_that_moment() -> None:
    entries = [entry(at(0), "promote", 1), entry(at(1), "canary", 3), entry(at(2), "traffic", (10, "2"))]
    assert served_at(entries, at(1)).shares() == (("champion", 1, 100),)
    assert served_at(entries, at(2)).shares() == (("price/a", 1, 27), ("price/b", 2, 63), ("canary", 3, 10))


def test_rules_that_a_later_release_no_longer_reads_leave_the_rest_told() -> None:
    odd = replace(entry(at(1), "traffic", (5, None)), evidence={"rules": '{"from": "another time"}'})
    assert served_at([entry(at(0), "promote", 1), odd], at(2)) == Served(1, since=at(0))


def test_a_change_of_the_traffic_is_told_with_the_canarys_share_and_anything_else_as_it_is() -> None:
    rules = TrafficRules(canary=CanaryRule(weight=12.5)).canonical_json()
    assert told_action("traffic", {"rules": rules}) == "traffic: 12.5 %"
    assert [told_action("traffic", e) for e in ({}, {"rules": "no rules"})] == ["traffic", "traffic"]
    assert told_action("promote", {"rules": rules}) == "promote"
