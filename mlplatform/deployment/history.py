"""What served at a moment, from the ledger's entries; pure.

Belongs here: folding entries into who answers. Does not belong here: reading the ledger, deciding what comes next.

The order written is the order of events. A clock that was set back does not change it: an entry counts from the latest time among
it and all entries before it. From `at` on, inclusive.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from mlplatform.contracts import CANARY, CANARY_VARIANT, CHAMPION_VARIANT, NO_RULES, PRODUCTION, SHADOW, TrafficRules
from mlplatform.records import LedgerEntry

MOVES: Final = ("promote", "rollback")


@dataclass(frozen=True)
class Served:
    """Who answers, as the ledger tells it. `since`: when it last changed; None before anything did."""

    production: int | None = None
    canary: int | None = None
    shadow: int | None = None
    rules: TrafficRules = NO_RULES
    since: datetime | None = None

    @property
    def canary_weight(self) -> float:
        """Percent of the entities the canary answers: nothing where no version is canary."""
        return 0.0 if self.canary is None else self.rules.canary.weight

    def version_of(self, serves: str) -> int | None:
        """The version an arm of an experiment names, by number or alias."""
        if serves.isdigit():
            return int(serves)
        return {PRODUCTION: self.production, CANARY: self.canary, SHADOW: self.shadow}.get(serves)

    def shares(self) -> tuple[tuple[str, int | None, float], ...]:
        """(variant, version, percent of the entities) of everything that answers callers; the version None where an alias is not there."""
        rest = 100 - self.canary_weight
        rows: list[tuple[str, int | None, float]] = [(CHAMPION_VARIANT, self.production, rest)]
        if (experiment := self.rules.experiment) is not None:
            held = rest if experiment.layer is None else rest * (experiment.layer.end - experiment.layer.start) / 100
            rows = [(CHAMPION_VARIANT, self.production, rest - held)] if held < rest else []
            rows += [(f"{experiment.name}/{arm.name}", self.version_of(arm.serves), held * arm.weight / 100) for arm in experiment.arms]
        return (*rows, *([(CANARY_VARIANT, self.canary, self.canary_weight)] if self.canary_weight else []))


def changes(entries: Iterable[LedgerEntry]) -> Iterator[tuple[LedgerEntry, Served]]:
    """Each entry that changed who answers or is asked, with what served from then on."""
    now, latest = Served(), None
    for entry in entries:
        latest = entry.at if latest is None else max(latest, entry.at)
        after = replace(_after(now, entry), since=now.since)
        if after != now:
            now = replace(after, since=latest)
            yield entry, now


def served_at(entries: Sequence[LedgerEntry], at: datetime) -> Served:
    """What served at `at` (a time with a zone); `entries` in the order written."""
    found = Served()
    for _, serving in changes(entries):
        if serving.since is None or serving.since > at:
            break
        found = serving
    return found


def latest(entries: Sequence[LedgerEntry]) -> Served:
    """What serves after the last entry."""
    return next((served for _, served in reversed([*changes(entries)])), Served())


def told_action(action: str, evidence: Mapping[str, Any]) -> str:
    """An entry's action for a person: a change of the traffic with the canary's share."""
    try:
        rules = TrafficRules.model_validate_json(str(evidence["rules"])) if action == "traffic" else None
    except (KeyError, ValidationError):
        return action
    return action if rules is None else f"traffic: {rules.canary.weight:g} %"


def _after(now: Served, entry: LedgerEntry) -> Served:
    if entry.alias == PRODUCTION and entry.action in MOVES:
        return now if entry.version is None else replace(now, production=entry.version)
    if entry.action == CANARY:
        return replace(now, canary=entry.version)
    if entry.action == SHADOW:
        return replace(now, shadow=entry.version)
    if entry.action == "traffic":
        try:
            return replace(now, rules=TrafficRules.model_validate_json(entry.evidence.get("rules") or NO_RULES.canonical_json()))
        except ValidationError:
            # Only rules that were valid when written are recorded; a later release that no longer reads them must still tell the rest.
            return now
    return now
