"""What serves, read from registry and ledger together, and the writes that change it.

Belongs here: carrying a decision out, for the asset and the CLI alike. Does not belong here: deciding (room `deployment`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlplatform.contracts import CANARY, MODELS_CHANNEL, PREVIOUS, PRODUCTION
from mlplatform.deployment.decide import (
    Decision,
    NothingToRollBackToError,
    Serving,
    decide_promotion,
    decide_rollback,
    ledger_entries,
    skew_reasons,
)
from mlplatform.deployment.states import State, states
from mlplatform.orchestration.recording import record
from mlplatform.orchestration.release_state import settle, signed_off, unapproved, unverified, write_states
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.orchestration.traffic_state import set_canary_weight, set_side
from mlplatform.records import SkewSummary


def serving_state(clients: Clients, model: str) -> Serving:
    """The aliases and the ledger of a model."""
    production = clients.registry.by_alias(model, PRODUCTION)
    previous = clients.registry.by_alias(model, PREVIOUS)
    return Serving(
        model=model,
        production=production.version if production else None,
        previous=previous.version if previous else None,
        entries=clients.ledger.entries(model),
    )


def carry_out(clients: Clients, decision: Decision, actor: str, run_id: str = "", evidence: Mapping[str, Any] | None = None) -> None:
    """Aliases first, then the ledger, the notice to the services (they poll too, so a lost notice only costs time), then the state tags.

    Killed before the ledger's entry, the next decision writes it; killed behind it, `settle` writes the tags, which show what the ledger
    says. An alert waits until the services know.
    """
    for write in decision.writes:
        if write.version is None:
            clients.registry.delete_alias(decision.model, write.alias)
        else:
            clients.registry.set_alias(decision.model, write.alias, write.version)
    if decision.writes:
        # Before the entry too: at a rollback every tenth of a second counts, and writing the ledger takes some.
        clients.redis.publish(MODELS_CHANNEL, decision.model)
    for number, entry in enumerate(ledger_entries(decision, clients.clock.now(), actor, run_id, evidence)):
        # In a run, a step that is tried again must not write its entry twice.
        record(clients, entry, entry_id=f"{run_id}:{entry.action}:{entry.version}:{number}" if run_id else None)
    write_states(clients, decision.model)


def promote(
    clients: Clients,
    model: str,
    version: int,
    actor: str,
    run_id: str = "",
    *,
    by_hand: bool = False,
    because: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> Decision:
    """Promotes a version whose recorded evaluation passed its gates, and that was approved where the model asks for it; refuses any
    other, and records either.

    Nothing is promoted while the newest measurement of the model's skew is above the declared rate. `by_hand`: a person
    asks, which may bring back a version that was rolled back; a failed gate, or skew, stops a person too. `because`: what else speaks for
    it, beside its gates.
    """
    settle(clients, model, actor, run_id, moves=False)
    registered = clients.registry.version(model, version)
    failed = [*unapproved(clients, registered), *skew_reasons(newest_summary(clients, "skew", model, SkewSummary))]
    if why := unverified(clients, registered):
        failed.insert(0, f"gates: version {version}: {why}")
    decision = decide_promotion(version, failed, serving_state(clients, model), by_hand)
    if because and decision.action == "promote":
        decision = replace(decision, reasons=(*decision.reasons, because))
    carry_out(clients, decision, actor, run_id, {**signed_off(registered), **(evidence or {})})
    if decision.action in ("promote", "none"):  # none: repeated after it was cut off here
        _no_canary_any_more(clients, model, version, actor, f"version {version} serves everybody", run_id)
    return decision


def roll_back(
    clients: Clients, model: str, reason: str, actor: str, run_id: str = "", evidence: Mapping[str, Any] | None = None
) -> Decision:
    """Back to the version that served before. Raises NothingToRollBackToError, also where that one must not answer any more."""
    settle(clients, model, actor, run_id, moves=False)
    decision = decide_rollback(serving_state(clients, model), reason)
    if decision.writes:
        target = clients.registry.version(model, decision.version)
        rejected = states(clients.ledger.entries(model)).get(target.version) is State.REJECTED
        if why := "it was rejected since" if rejected else unverified(clients, target):
            raise NothingToRollBackToError(
                f"version {target.version} of {model}, which served before, must not answer: {why}; promote another"
            )
        if decision.before is not None:
            # First: cut off behind it, the same command is given again; the other way round nobody would look for it.
            _no_canary_any_more(clients, model, decision.before, actor, reason, run_id)
    carry_out(clients, decision, actor, run_id, evidence)
    return decision


def _no_canary_any_more(clients: Clients, model: str, version: int, actor: str, reason: str, run_id: str) -> None:
    """A version that serves, or is taken out of service, must not answer as canary beside that."""
    canary = clients.registry.by_alias(model, CANARY)
    if canary is not None and canary.version == version:
        set_canary_weight(clients, model, 0.0, actor, reason, run_id)
        set_side(clients, model, CANARY, None, actor, reason, run_id)
