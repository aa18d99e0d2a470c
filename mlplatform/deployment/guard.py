"""Where the registry says something else than the ledger, and what to do about each such place; pure.

Belongs here: comparing. Does not belong here: reading or writing either side.

A difference has two causes. Either a change was cut off between its alias and its entry, or somebody moved an alias by hand in MLflow.
What may answer callers is recorded late; what may not (no seal, rejected, not approved) is put back to what the ledger says.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mlplatform.contracts import CANARY, PRODUCTION, SHADOW
from mlplatform.deployment.history import Served


@dataclass(frozen=True)
class Difference:
    """`alias` is carried by the version `found` (None: by none), the ledger says `recorded`. `why`: put it back, for this reason; empty:
    record it. The alias is empty for the traffic rules."""

    alias: str
    found: int | None
    recorded: int | None
    why: str = ""

    def __str__(self) -> str:
        if not self.alias:
            return "the traffic rules in MLflow are not those of the ledger"
        versions = (f"version {v}" if v is not None else "nothing" for v in (self.found, self.recorded))
        return "the alias '{}' names {}, the ledger says {}".format(self.alias, *versions) + (f": {self.why}" if self.why else "")


def differences(recorded: Served, found: Served, unfit: Mapping[int, str]) -> tuple[Difference, ...]:
    """`unfit`: why a version must not answer callers, for those that must not."""
    pairs = (
        (PRODUCTION, found.production, recorded.production),
        (CANARY, found.canary, recorded.canary),
        (SHADOW, found.shadow, recorded.shadow),
    )
    wrong = []
    for alias, have, wanted in pairs:
        if have == wanted:
            continue
        why = ""
        if have is None:
            why = "it was deleted, and nothing serves without it" if alias == PRODUCTION else ""
        elif alias != SHADOW and have in unfit:
            why = f"version {have} must not answer: {unfit[have]}"
        wrong.append(Difference(alias, have, wanted, why))
    if recorded.rules != found.rules:
        wrong.append(Difference("", None, None))
    return tuple(wrong)
