"""What to do about a model version: promote, refuse, roll back or nothing; pure, from what was read to what to write.

Belongs here: decisions over evaluations, aliases and ledger entries. Does not belong here: reading or moving them.

A move is: alias `previous`, then alias `production`, then the ledger. Killed anywhere between, the next decision over what
is then there asks for the rest: writes are repeated until `production` is right, and a move the ledger missed is recorded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from mlplatform.contracts import PREVIOUS, PRODUCTION
from mlplatform.records import Evaluation, LedgerEntry, SkewSummary


class NothingToRollBackToError(LookupError):
    """No version served before the one that serves now."""


@dataclass(frozen=True)
class Move:
    """`production` went from `before` to `version`."""

    action: Literal["promote", "rollback"]
    version: int
    before: int | None


@dataclass(frozen=True)
class Serving:
    """What the registry and the ledger say before a decision. Versions are None where the alias does not exist."""

    model: str
    production: int | None
    previous: int | None
    entries: Sequence[LedgerEntry] = ()

    @property
    def unrecorded(self) -> Move | None:
        """A move of `production` the ledger does not know of: cut off before its entry, or made by hand."""
        served = _served(_moves(self.entries))
        if self.production is None or served[-1:] == (self.production,):
            return None
        top = served[-1] if served else None
        # A promotion leaves `previous` at what served before it; a rollback leaves it further down.
        back = self.production in served[:-1] and self.previous != top
        return Move("rollback" if back else "promote", self.production, top if top is not None else self.previous)

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move of `production`, oldest first, the unrecorded one last."""
        late = self.unrecorded
        return (*_moves(self.entries), *((late,) if late else ()))

    @property
    def served(self) -> tuple[int, ...]:
        """Versions to go back through, the newest last: a promotion adds one, a rollback takes away those above its target."""
        return _served(self.moves)

    @property
    def rolled_back(self) -> frozenset[int]:
        """Versions somebody took out of service and nobody has promoted since."""
        out: set[int] = set()
        for move in self.moves:
            out.discard(move.version)
            if move.action == "rollback" and move.before is not None:
                out.add(move.before)
        return frozenset(out)


@dataclass(frozen=True)
class AliasWrite:
    """Set `alias` to `version`, or delete it where the version is None. Both may be repeated."""

    alias: str
    version: int | None


@dataclass(frozen=True)
class Decision:
    """What to do, in order: `writes`, then append `ledger_entries(…)`.

    `version` is the one decided about, `before` the one that served before it (for a refusal: that goes on serving).
    """

    model: str
    action: Literal["promote", "refuse", "rollback", "none"]
    version: int
    before: int | None
    reasons: tuple[str, ...]
    writes: tuple[AliasWrite, ...] = ()
    late: Move | None = None  # an earlier move the ledger missed, recorded first

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)


def decide(evaluation: Evaluation, serving: Serving) -> Decision:
    """Promotes a version whose blocking gates all passed, refuses any other; see `decide_promotion`."""
    failed = tuple(f"{gate.name}: {gate.reason}" for gate in evaluation.gates if gate.blocking and not gate.passed)
    return decide_promotion(evaluation.version, failed, serving)


def decide_promotion(version: int, failed: Sequence[str], serving: Serving, by_hand: bool = False) -> Decision:
    """Whether `version` shall serve. `failed`: why not, one text per failed blocking gate.

    A version that serves already is left alone, gates or not: taking it away is a rollback, and somebody's decision. For
    the same reason a version that was rolled back is refused, gates or not, unless a person asks for it (`by_hand`);
    otherwise the next run would undo the rollback.
    """
    model, now, late = serving.model, serving.production, serving.unrecorded
    if now == version:
        if late is not None and late.action == "promote":
            return Decision(model, "promote", version, late.before, ("completes a promotion that was cut off before it was recorded",))
        return Decision(model, "none", version, now, (f"version {version} serves already",), late=late)
    reasons = (*failed, *(() if by_hand else by_hand_only(version, serving)))
    if reasons:
        return Decision(model, "refuse", version, now, reasons, late=late)
    reason = "every blocking gate passed" if now is not None else "every blocking gate passed; nothing served before"
    return Decision(model, "promote", version, now, (reason,), _write(now, version), late)


def by_hand_only(version: int, serving: Serving) -> tuple[str, ...]:
    """Why only a person may let the version answer callers: somebody took it out of service."""
    return (f"version {version} was rolled back: only a person may promote it again",) if version in serving.rolled_back else ()


def skew_reasons(newest: SkewSummary | None) -> tuple[str, ...]:
    """Why skew stops a promotion: measured, and above the declared rate. Not where it was never measured (nothing served yet)."""
    return (newest.refusal,) if newest is not None and newest.refusal else ()


def decide_rollback(serving: Serving, reason: str) -> Decision:
    """Back to the version that served before, by the ledger; by the alias `previous` where the ledger knows of none.

    Two rollbacks in a row go two versions back, not back and forth. Raises NothingToRollBackToError.
    """
    model, now, late, served = serving.model, serving.production, serving.unrecorded, serving.served
    if now is None:
        raise NothingToRollBackToError(f"no version of {model} serves: nothing to roll back")
    if late is not None and late.action == "rollback":
        return Decision(model, "rollback", now, late.before, (reason, "completes a rollback that was cut off before it was recorded"))
    earlier = served[:-1]
    if not earlier and serving.previous is not None and serving.previous != now:
        earlier = (serving.previous,)
    if not earlier:
        raise NothingToRollBackToError(f"version {now} of {model} is the first that served: nothing to go back to")
    below = earlier[-2] if len(earlier) > 1 else None
    return Decision(model, "rollback", earlier[-1], now, (reason,), _write(below, earlier[-1]), late)


def ledger_entries(
    decision: Decision, at: datetime, actor: str, run_id: str = "", evidence: Mapping[str, Any] | None = None
) -> tuple[LedgerEntry, ...]:
    """The entries to append once the decision's writes are done: a late one for a move the ledger missed, then its own.

    "none" has no entry of its own. `at`: the time of the decision; `evidence`: flat and JSON-able.
    """
    entries: tuple[LedgerEntry, ...] = ()
    if late := decision.late:
        reason = f"recorded late: version {late.version} was found serving without an entry"
        entries = (LedgerEntry(at, decision.model, late.action, PRODUCTION, late.version, late.before, actor, reason, run_id),)
    if decision.action == "none":
        return entries
    own = LedgerEntry(
        at,
        decision.model,
        decision.action,
        PRODUCTION,
        decision.version,
        decision.before,
        actor,
        decision.reason,
        run_id,
        dict(evidence or {}),
    )
    return (*entries, own)


def _write(previous: int | None, version: int) -> tuple[AliasWrite, ...]:
    # `previous` first: cut off in between, `production` still names what serves and the way back is already right.
    return AliasWrite(PREVIOUS, previous), AliasWrite(PRODUCTION, version)


def _moves(entries: Iterable[LedgerEntry]) -> tuple[Move, ...]:
    found = []
    for entry in entries:
        if entry.alias == PRODUCTION and entry.version is not None and entry.action in ("promote", "rollback"):
            found.append(Move("promote" if entry.action == "promote" else "rollback", entry.version, entry.previous_version))
    return tuple(found)


def _served(moves: Iterable[Move]) -> tuple[int, ...]:
    stack: list[int] = []
    for move in moves:
        if move.action == "promote":
            if stack[-1:] != [move.version]:
                stack.append(move.version)
            continue
        # What lies above the target is gone; a target the history never saw serve is all that is left.
        while stack and stack[-1] != move.version:
            stack.pop()
        stack = stack or [move.version]
    return tuple(stack)
