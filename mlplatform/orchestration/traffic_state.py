"""How a model's versions share its traffic: read from the registry, and changed there.

Belongs here: carrying a change out, for the command line and whoever judges a canary. Does not belong here: whether it may be (room
`deployment`). The registered model's tag is the one source of truth: it outlives Redis, and services that were away read it when they
come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from mlplatform.contracts import CANARY, GATES_TAG, MODELS_CHANNEL, NO_RULES, PRODUCTION, TRAFFIC_TAG, TrafficRules
from mlplatform.deployment.states import State, states, why_not
from mlplatform.deployment.traffic import SideAlias, TrafficState, refuse_rules, refuse_side
from mlplatform.orchestration.experiment_state import layer_reasons
from mlplatform.orchestration.recording import record
from mlplatform.orchestration.release_state import settle, unapproved, unverified, write_states
from mlplatform.orchestration.resources import Clients
from mlplatform.records import LedgerEntry, ModelVersion


@dataclass(frozen=True)
class TrafficChange:
    """What came of it: done, refused (for `reasons`), or neither where it was so already."""

    changed: bool
    reasons: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        return bool(self.reasons)


def traffic_state(clients: Clients, model: str) -> TrafficState:
    """Raises UnknownModelError for a model that was never registered."""
    versions = clients.registry.versions(model)
    aliases = {alias: v.version for v in versions for alias in v.aliases}
    gates = {v.version: _verdict(clients, v) for v in versions}
    text = clients.registry.model_tags(model).get(TRAFFIC_TAG, "")
    try:
        rules = TrafficRules.model_validate_json(text) if text.strip() else NO_RULES
    except ValidationError as error:
        return TrafficState(model, aliases, gates, None, f"the rules on record are none: {error.errors()[0]['msg']}")
    return TrafficState(model, aliases, gates, rules)


def _verdict(clients: Clients, version: ModelVersion) -> str:
    """What the gates said, as far as the version's seal bears it out."""
    said = version.tags.get(GATES_TAG, "never evaluated")
    why = unverified(clients, version)
    return f"passed, but {why}" if why and said == "passed" else said


def canary_reasons(clients: Clients, model: str, version: int) -> tuple[str, ...]:
    """Why a version must not be canary: gates, approval, or a state that has no canary. Raises UnknownModelError."""
    reasons = refuse_side(traffic_state(clients, model), CANARY, version)
    if reasons:
        return reasons
    now = states(clients.ledger.entries(model)).get(version, State.CANDIDATE)
    why = why_not(version, now, State.CANARY)
    return (*((why,) if why else ()), *unapproved(clients, clients.registry.version(model, version)))


def set_rules(
    clients: Clients,
    model: str,
    wanted: TrafficRules,
    actor: str,
    reason: str,
    run_id: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> TrafficChange:
    """Publishes traffic rules: the tag, the notice to the services, then the ledger. Refused ones change nothing.

    Killed before the entry, the next change records it first (`settle`).
    """
    settle(clients, model, actor, run_id)
    state = traffic_state(clients, model)
    if wanted.sticky_on and (champion := clients.registry.by_alias(model, PRODUCTION)) is not None:
        state = replace(state, contract=clients.registry.contract_of(champion))
    if reasons := (*refuse_rules(state, wanted), *layer_reasons(clients, model, wanted)):
        return TrafficChange(False, reasons)
    if state.rules == wanted:
        return TrafficChange(False)
    clients.registry.set_model_tag(model, TRAFFIC_TAG, wanted.canonical_json())
    clients.redis.publish(MODELS_CHANNEL, model)
    version = state.aliases.get(CANARY)
    told = {**(evidence or {}), "rules": wanted.canonical_json(), "before": state.rules.canonical_json() if state.rules else ""}
    record(clients, LedgerEntry(clients.clock.now(), model, "traffic", CANARY, version, version, actor, reason, run_id, told))
    return TrafficChange(True)


def set_canary_weight(
    clients: Clients,
    model: str,
    percent: float,
    actor: str,
    reason: str,
    run_id: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> TrafficChange:
    """The canary's share of the entities, all else as it is; unreadable rules are replaced."""
    rules = traffic_state(clients, model).rules or NO_RULES
    # Validated anew: a copy would take any number.
    canary = {**rules.canary.model_dump(), "weight": percent}
    wanted = TrafficRules.model_validate({**rules.model_dump(), "canary": canary})
    return set_rules(clients, model, wanted, actor, reason, run_id, evidence)


def set_side(
    clients: Clients, model: str, alias: SideAlias, version: int | None, actor: str, reason: str, run_id: str = ""
) -> TrafficChange:
    """Gives `canary` or `shadow` to a version, or takes it away (None). Refused ones change nothing."""
    settle(clients, model, actor, run_id)
    state = traffic_state(clients, model)
    before = state.aliases.get(alias)
    if before == version:
        return TrafficChange(False)
    if version is None:
        clients.registry.delete_alias(model, alias)
    elif reasons := canary_reasons(clients, model, version) if alias == CANARY else refuse_side(state, alias, version):
        return TrafficChange(False, reasons)
    else:
        clients.registry.set_alias(model, alias, version)
    clients.redis.publish(MODELS_CHANNEL, model)
    record(clients, LedgerEntry(clients.clock.now(), model, alias, alias, version, before, actor, reason, run_id))
    write_states(clients, model)
    return TrafficChange(True)
