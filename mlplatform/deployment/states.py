"""The states of a model version, from the ledger's entries, and who must have agreed before it answers callers; pure.

Belongs here: which state follows which, and why a step is refused. Does not belong here: writing tags, aliases or entries.

candidate → approved → canary → production → retired, or rejected. Where the gates alone decide (`ModelSpec.approval`), a candidate
may go on without a person's approval.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal

from mlplatform.contracts import CANARY as CANARY_ALIAS
from mlplatform.contracts import PRODUCTION as PRODUCTION_ALIAS
from mlplatform.deployment.history import MOVES
from mlplatform.records import LedgerEntry

Approval = Literal["gates", "person", "other_person"]
GATES: Final = "gates"  # the actor of entries that the offline gates wrote


class State(StrEnum):
    CANDIDATE = "candidate"
    APPROVED = "approved"
    CANARY = "canary"
    PRODUCTION = "production"
    RETIRED = "retired"
    REJECTED = "rejected"


ALLOWED: Final[Mapping[State, frozenset[State]]] = {
    State.CANDIDATE: frozenset({State.APPROVED, State.CANARY, State.PRODUCTION, State.REJECTED}),
    State.APPROVED: frozenset({State.CANARY, State.PRODUCTION, State.REJECTED}),
    # A canary that ends without a verdict is again what it was before.
    State.CANARY: frozenset({State.PRODUCTION, State.CANDIDATE, State.APPROVED, State.RETIRED, State.REJECTED}),
    State.PRODUCTION: frozenset({State.RETIRED}),
    State.RETIRED: frozenset({State.PRODUCTION, State.CANARY, State.APPROVED, State.REJECTED}),
    # The gates' own refusal ends when the gates pass, a person's only when a person approves.
    State.REJECTED: frozenset({State.APPROVED, State.CANDIDATE}),
}


def why_not(version: int, now: State, to: State) -> str:
    """Why a version must not go from `now` to `to`; empty where it may, or is there."""
    if now is to or to in ALLOWED[now]:
        return ""
    return f"version {version} is {now}, from where it does not go to {to}"


def states(entries: Iterable[LedgerEntry]) -> dict[int, State]:
    """The state of each version the ledger names, entries in the order written. A version it does not name is a candidate."""
    found: dict[int, State] = {}
    before_canary: dict[int, State] = {}
    by_person: set[int] = set()
    for entry in entries:
        if entry.alias == PRODUCTION_ALIAS and entry.action in MOVES and entry.version is not None:
            for version, state in found.items():
                if state is State.PRODUCTION and version != entry.version:
                    found[version] = State.RETIRED
            if entry.previous_version is not None and entry.previous_version != entry.version:
                found[entry.previous_version] = State.RETIRED
            found[entry.version] = State.PRODUCTION
        elif entry.action == CANARY_ALIAS:
            for version, state in found.items():
                if state is State.CANARY and version != entry.version:
                    found[version] = before_canary[version]
            if entry.version is not None and (now := found.get(entry.version, State.CANDIDATE)) not in (State.PRODUCTION, State.CANARY):
                before_canary[entry.version] = now
                found[entry.version] = State.CANARY
        elif entry.version is not None and entry.action in _VERDICTS:
            _judge(entry.version, entry, found, before_canary, by_person)
    return found


_VERDICTS: Final = ("approve", "reject", "refuse", "pass")


def _judge(version: int, entry: LedgerEntry, found: dict[int, State], before_canary: dict[int, State], by_person: set[int]) -> None:
    now = found.setdefault(version, State.CANDIDATE)
    after = now
    if entry.action == "approve":
        by_person.discard(version)
        after = State.APPROVED
    elif entry.action == "reject":
        by_person.add(version)
        after = State.REJECTED
    elif entry.action == "refuse" and entry.actor == GATES:
        after = State.REJECTED if now is State.CANDIDATE else now
    elif entry.action == "pass" and now is State.REJECTED and version not in by_person:
        after = State.CANDIDATE
    if now is State.CANARY and after is State.APPROVED:
        before_canary[version] = State.APPROVED  # it goes on as canary
    elif now is not State.PRODUCTION:
        found[version] = after


def approval_reasons(
    needs: Approval, entries: Sequence[LedgerEntry], version: int, trained_by: str, evaluation_sha256: str
) -> tuple[str, ...]:
    """Why nobody's agreement lets the version answer callers; empty where it may. `trained_by` is empty where it was not recorded.

    An approval counts for the evaluation it was given for: a version that was evaluated anew must be approved anew.
    """
    said = next((e for e in reversed(entries) if e.version == version and e.action in ("approve", "reject")), None)
    if said is not None and said.action == "reject":
        return (f"version {version} was rejected by {said.actor}: {said.reason}",)
    if needs == "gates":
        return ()
    if said is None:
        return (f"version {version} waits for approval: `mlplatform approve`",)
    reasons = []
    if said.evidence.get("evaluation_sha256") != evaluation_sha256:
        reasons.append(f"version {version} was evaluated anew since {said.actor} approved it")
    if needs == "other_person":
        reasons += same_person(version, said.actor, trained_by)
    return tuple(reasons)


def same_person(version: int, approver: str, trained_by: str) -> tuple[str, ...]:
    """Why this approver does not count where it must be somebody else than who trained the version."""
    if not trained_by:
        return (f"nobody recorded who trained version {version}, so nobody is known to be somebody else",)
    if approver == trained_by:
        return (f"version {version} was trained by {trained_by}: somebody else must approve it",)
    return ()
