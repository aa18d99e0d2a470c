"""States of versions follow the allowed steps, and who must have agreed before a version answers callers."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.deployment.states import ALLOWED, State, approval_reasons, states, why_not
from mlplatform.records import LedgerEntry

AT = datetime(2024, 1, 1, tzinfo=UTC)
ALIAS = {"promote": "production", "rollback": "production", "refuse": "production", "canary": "canary"}


def entry(action: str, version: int | None, actor: str = "ann", before: int | None = None, **evidence: str) -> LedgerEntry:
    return LedgerEntry(AT, "m", action, ALIAS.get(action, ""), version, before, actor, "why", "", evidence)


def test_a_good_version_goes_through_every_state() -> None:
    steps = [
        (entry("pass", 2, "gates"), State.CANDIDATE),
        (entry("approve", 2), State.APPROVED),
        (entry("canary", 2), State.CANARY),
        (entry("promote", 2, before=1), State.PRODUCTION),
        (entry("canary", None), State.PRODUCTION),
        (entry("promote", 3, before=2), State.RETIRED),
        (entry("rollback", 2, before=3), State.PRODUCTION),
    ]
    for n, (_, state) in enumerate(steps):
        assert states(e for e, _ in steps[: n + 1])[2] is state


def test_a_canary_that_ends_without_a_verdict_is_what_it_was_and_a_rejected_one_stays_rejected() -> None:
    assert states([entry("canary", 2), entry("canary", None)])[2] is State.CANDIDATE
    assert states([entry("approve", 2), entry("canary", 2), entry("canary", 3)]) == {2: State.APPROVED, 3: State.CANARY}
    assert states([entry("canary", 2), entry("approve", 2), entry("canary", None)])[2] is State.APPROVED
    assert states([entry("canary", 2), entry("canary", None), entry("reject", 2)])[2] is State.REJECTED


def test_the_gates_refusal_ends_when_they_pass_and_a_persons_does_not() -> None:
    refused = [entry("refuse", 2, "gates")]
    assert states(refused)[2] is State.REJECTED
    assert states([*refused, entry("pass", 2, "gates")])[2] is State.CANDIDATE
    assert states([entry("reject", 2), entry("pass", 2, "gates")])[2] is State.REJECTED
    assert states([entry("reject", 2), entry("approve", 2)])[2] is State.APPROVED
    assert states([entry("refuse", 2, "dagster")])[2] is State.CANDIDATE  # a promotion that had to wait


@given(st.lists(st.tuples(st.sampled_from([*State]), st.integers(1, 4)), max_size=30))
def test_whatever_is_done_step_by_step_goes_only_allowed_ways_and_one_version_serves(wanted: list[tuple[State, int]]) -> None:
    entries: list[LedgerEntry] = []
    for to, version in wanted:
        before = states(entries)
        now = before.get(version, State.CANDIDATE)
        if now is to or why_not(version, now, to):
            continue
        serves = next((v for v, s in before.items() if s is State.PRODUCTION), None)
        actions = {
            State.APPROVED: [entry("approve", version)],
            State.CANARY: [entry("canary", version)],
            State.PRODUCTION: [entry("promote", version, before=serves)],
            State.REJECTED: [*([entry("canary", None)] if now is State.CANARY else []), entry("reject", version)],
        }.get(to, [])
        for made in actions:
            entries.append(made)
            after = states(entries)
            for number in after:
                was, is_now = before.get(number, State.CANDIDATE), after[number]
                assert was is is_now or is_now in ALLOWED[was], (number, was, is_now)
            before = after
    found = list(states(entries).values())
    assert found.count(State.PRODUCTION) <= 1
    assert found.count(State.CANARY) <= 1


def test_a_refused_step_says_from_where() -> None:
    assert why_not(7, State.REJECTED, State.CANARY) == "version 7 is rejected, from where it does not go to canary"


@pytest.mark.parametrize(
    ("needs", "entries", "trained_by", "told"),
    [
        ("gates", [], "", ""),
        ("gates", [entry("reject", 2)], "", "rejected by ann"),
        ("person", [], "tom", "waits for approval"),
        ("person", [entry("approve", 2, evaluation_sha256="e")], "ann", ""),
        ("person", [entry("approve", 2, evaluation_sha256="older")], "tom", "evaluated anew"),
        ("person", [entry("approve", 2, evaluation_sha256="e"), entry("reject", 2, "bob")], "tom", "rejected by bob"),
        ("other_person", [entry("approve", 2, evaluation_sha256="e")], "tom", ""),
        ("other_person", [entry("approve", 2, "tom", evaluation_sha256="e")], "tom", "somebody else"),
        ("other_person", [entry("approve", 2, evaluation_sha256="e")], "", "nobody recorded who trained"),
        ("other_person", [entry("approve", 1, evaluation_sha256="e")], "tom", "waits for approval"),
    ],
)
def test_who_must_have_agreed(needs: str, entries: list[LedgerEntry], trained_by: str, told: str) -> None:
    reasons = approval_reasons(needs, entries, 2, trained_by, "e")
    assert told in "; ".join(reasons)
    assert bool(reasons) == bool(told)
