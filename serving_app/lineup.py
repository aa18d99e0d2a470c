"""Which versions a model's aliases and traffic rules ask for, as the registry says or as the cache remembers.

Belongs here: reading a registration into version references and rules. Does not belong here: loading versions, choosing among them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from mlplatform.contracts import CANARY, NO_RULES, PRODUCTION, SHADOW, TRAFFIC_TAG, TrafficRules
from mlplatform.verified import Sealed
from serving_app.model_handle import VersionRef
from serving_app.registry import MlflowRegistry, Registration


class RulesRefusedError(Exception):
    """Traffic rules that must not take effect; the message says why."""


@dataclass(frozen=True)
class Lineup:
    """The versions asked for. `arms`: one per arm of the experiment, None where it serves what the champion is.
    `rules` is None where the model's rules are refused, for the reason `fault`: then those that are in place go on."""

    champion: VersionRef | None
    canary: VersionRef | None = None
    shadow: VersionRef | None = None
    rules: TrafficRules | None = NO_RULES
    arms: tuple[VersionRef | None, ...] = ()
    fault: str = ""

    def to_json(self) -> str:
        """For the cache. The champion stands at the top, where services of before the traffic rules look for it."""
        told: dict[str, Any] = {} if self.champion is None else _ref_to_json(self.champion)
        told |= {"canary": self.canary and _ref_to_json(self.canary), "shadow": self.shadow and _ref_to_json(self.shadow)}
        told["traffic"] = (self.rules or NO_RULES).model_dump(mode="json")
        told["arms"] = [arm and _ref_to_json(arm) for arm in self.arms]
        return json.dumps(told)

    @classmethod
    def from_json(cls, model: str, told: Mapping[str, Any]) -> "Lineup | None":
        """What `to_json` wrote; None where no version of the champion stands there. Unreadable rules are no rules."""
        champion = _ref_from_json(model, told)
        if champion is None:
            return None
        canary, shadow = (_ref_from_json(model, told.get(role)) for role in ("canary", "shadow"))
        given = told.get("arms")
        arms = tuple(_ref_from_json(model, arm) for arm in given) if isinstance(given, list) else ()
        try:
            rules = TrafficRules.model_validate(told.get("traffic") or {})
        except ValidationError:
            rules = NO_RULES
        wanted = len(rules.experiment.arms) if rules.experiment else 0
        if len(arms) != wanted:
            return cls(champion, canary, shadow)
        return cls(champion, canary, shadow, rules, arms)


async def ask_registry(registry: MlflowRegistry, model: str) -> Lineup | None:
    """What the registry asks for now; None for a model it does not know. Raises RegistryError."""
    registration = await registry.registration(model)
    if registration is None:
        return None
    champion, canary, shadow = [await _alias(registry, registration, alias) for alias in (PRODUCTION, CANARY, SHADOW)]
    try:
        rules = parse_rules(registration.tags.get(TRAFFIC_TAG))
        arms = [await _arm(registry, registration, arm.name, arm.serves) for arm in rules.experiment.arms] if rules.experiment else []
    except RulesRefusedError as refused:
        return Lineup(champion, canary, shadow, rules=None, fault=str(refused))
    return Lineup(champion, canary, shadow, rules, tuple(arms))


def parse_rules(text: str | None) -> TrafficRules:
    """The rules in a tag's text; an absent or empty tag is no rules. Raises RulesRefusedError."""
    if not text or not text.strip():
        return NO_RULES
    try:
        return TrafficRules.model_validate_json(text)
    except ValidationError as error:
        first, *others = error.errors()
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        raise RulesRefusedError(f"{where + ': ' if where else ''}{first['msg']}{more}") from error


async def _alias(registry: MlflowRegistry, registration: Registration, alias: str) -> VersionRef | None:
    number = registration.aliases.get(alias)
    return None if number is None else await registry.version(registration.model, number)


async def _arm(registry: MlflowRegistry, registration: Registration, name: str, serves: str) -> VersionRef | None:
    if serves == PRODUCTION:
        return None
    number = int(serves) if serves.isdigit() else registration.aliases.get(serves)
    if number is None:
        raise RulesRefusedError(f"the arm '{name}' serves the alias '{serves}', which no version carries")
    ref = await registry.version(registration.model, number)
    if ref is None:
        raise RulesRefusedError(f"the arm '{name}' serves version {number}, which does not exist")
    return ref


def _ref_to_json(ref: VersionRef) -> dict[str, Any]:
    return {"version": ref.version, "source": ref.source, "sealed": None if ref.sealed is None else asdict(ref.sealed)}


def _ref_from_json(model: str, told: object) -> VersionRef | None:
    match told:
        case {"version": int(version), "source": str(source), **others}:
            return VersionRef(model, version, source, _sealed_from_json(others.get("sealed")))
    return None


def _sealed_from_json(told: object) -> Sealed | None:
    match told:
        case {"gates": str(gates), "evaluation": str(evaluation), "seal": str(seal)}:
            return Sealed(gates, evaluation, seal)
    return None
