"""Whether versions may share a model's traffic as asked; pure, from what was read to what to write.

Belongs here: decisions over traffic rules, aliases and gates. Does not belong here: reading or writing them, choosing per request
(the service does that).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlplatform.contracts import CANARY, PRODUCTION, SHADOW, ServingContract, TrafficRules
from mlplatform.deployment.history import Served

SideAlias = Literal["canary", "shadow"]


@dataclass(frozen=True)
class TrafficState:
    """What the registry says: version numbers by alias, the verdict of the gates per version, the rules in force.

    `fault`: why the rules on record are none (`rules` is None then), as the services will say too. `contract`: the champion's,
    where there is a champion and it was asked for.
    """

    model: str
    aliases: Mapping[str, int]
    gates: Mapping[int, str]
    rules: TrafficRules | None
    fault: str = ""
    contract: ServingContract | None = None

    def shares(self) -> tuple[tuple[str, int | None, float], ...]:
        """(variant, version, percent of the entities) of everything that answers; a canary without a version answers nobody."""
        return self.served.shares()

    @property
    def served(self) -> Served:
        return Served(self.aliases.get(PRODUCTION), self.aliases.get(CANARY), self.aliases.get(SHADOW), self.rules or TrafficRules())

    def version_of(self, serves: str) -> int | None:
        """The version an arm names by number or alias; None where no version carries the alias."""
        return int(serves) if serves.isdigit() else self.aliases.get(serves)


def refuse_rules(state: TrafficState, wanted: TrafficRules) -> tuple[str, ...]:
    """Why these rules must not take effect, one text per fault; empty where they may.

    Whatever answers callers has passed its gates: a canary is a trial of a good version, not a way round the gates.
    """
    reasons: list[str] = []
    if state.contract is not None and (unfit := wanted.unfit_for(state.contract)):
        reasons.append(unfit)
    if wanted.canary.weight > 0 and CANARY not in state.aliases:
        reasons.append(f"no version carries the alias '{CANARY}', so nothing could answer its {wanted.canary.weight:g} %")
    for arm in wanted.experiment.arms if wanted.experiment else ():
        number = state.version_of(arm.serves)
        if number is None:
            reasons.append(f"the arm '{arm.name}' serves the alias '{arm.serves}', which no version carries")
        elif why := _unfit(state, number):
            reasons.append(f"the arm '{arm.name}': {why}")
    return tuple(reasons)


def refuse_side(state: TrafficState, alias: SideAlias, version: int) -> tuple[str, ...]:
    """Why a version must not carry the alias. A shadow answers nobody, so it needs no gates; it must exist."""
    why = _unfit(state, version)
    if alias == SHADOW and version in state.gates:
        return ()
    return (why,) if why else ()


def _unfit(state: TrafficState, version: int) -> str:
    if version not in state.gates:
        return f"version {version} does not exist"
    verdict = state.gates[version]
    return "" if verdict == "passed" else f"version {version} has not passed its gates (recorded: {verdict})"
