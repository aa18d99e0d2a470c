"""A canary from its first percent to its end, as whoever judges it carries it out.

Belongs here: the order of writes of each step, each of which is safe to repeat. Does not belong here: the judgement
(`deployment.judge`), single writes (`traffic_state`, `serving_state`).

Killed anywhere, the same call again does what is missing. A canary's weight is 0 whenever its version changes, so no version gets
the share that was meant for another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlplatform.contracts import CANARY
from mlplatform.deployment.decide import by_hand_only, skew_reasons
from mlplatform.deployment.history import latest
from mlplatform.deployment.states import State, states
from mlplatform.orchestration.recording import record
from mlplatform.orchestration.release_state import approval_needed, declared, settle, signed_off, write_states
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, serving_state
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.orchestration.traffic_state import TrafficChange, canary_reasons, set_canary_weight, set_side, traffic_state
from mlplatform.records import LedgerEntry, SkewSummary
from mlplatform.release_policy import CanaryPolicy

Outcome = Literal["promote", "reject", "end"]


@dataclass(frozen=True)
class Released:
    """What became of a version: it serves (`promote`), is on trial (`canary`), must not answer (`refuse`), or is what it was (`none`).
    `serves`: the version that answers as champion from now on."""

    action: Literal["promote", "canary", "refuse", "none"]
    version: int
    serves: int | None
    reason: str


def release(clients: Clients, model: str, policy: CanaryPolicy, version: int, actor: str, run_id: str = "") -> Released:
    """The first step of a version whose gates passed, as the model's policy says: a trial as canary beside what serves, or
    `production` at once where nothing serves or the rollout is direct. Refused, and that recorded, where it must not answer callers.

    A newer version takes the place of a canary on trial. Safe to repeat.
    """
    settle(clients, model, actor, run_id)
    serving = serving_state(clients, model)
    if policy.rollout == "direct" or serving.production in (None, version):
        decision = promote(clients, model, version, actor, run_id)
        action = "none" if decision.action == "rollback" else decision.action
        return Released(action, version, decision.before if action == "refuse" else version, decision.reason)
    share = policy.steps[0]
    reason = f"every blocking gate passed: on trial with {share:g} % beside version {serving.production}"
    answers = latest(serving.entries)
    if answers.canary == version and answers.canary_weight:
        return Released("none", version, serving.production, f"version {version} is on trial with {answers.canary_weight:g} % already")
    reasons = (*by_hand_only(version, serving), *skew_reasons(newest_summary(clients, "skew", model, SkewSummary)))
    reasons = reasons or set_canary(clients, model, version, share, actor, reason, run_id).reasons
    if not reasons:
        return Released("canary", version, serving.production, reason)
    told = "; ".join(reasons)
    record(clients, LedgerEntry(clients.clock.now(), model, "refuse", CANARY, version, serving.production, actor, told, run_id))
    return Released("refuse", version, serving.production, told)


def release_approved(clients: Clients, model: str, version: int, actor: str, run_id: str = "") -> Released | None:
    """The first step of a version that had been waiting for a person's agreement; None where the gates alone decide about the model."""
    spec = declared(model)
    if spec is None or approval_needed(model) == "gates":
        return None
    return release(clients, model, spec.canary, version, actor, run_id)


def record_verdict(
    clients: Clients,
    model: str,
    version: int,
    verdict: str,
    reason: str,
    evidence: Mapping[str, Any],
    actor: str = "judge",
    run_id: str = "",
    verdict_id: str = "",
) -> bool:
    """An entry for what the judge said of a canary or shadow: `better`, `not worse`, `worse` or `cannot tell`, with what it is based on.

    `verdict_id` names the look (as its step and time): the same look again is not written twice. `evidence` is flat and JSON-able.
    """
    serves = clients.ledger.current(model)
    told = {"verdict": verdict, **evidence}
    entry = LedgerEntry(
        clients.clock.now(), model, "verdict", CANARY, version, serves.version if serves else None, actor, reason, run_id, told
    )
    return record(clients, entry, entry_id=f"verdict:{version}:{verdict_id}" if verdict_id else None)


def set_canary(
    clients: Clients,
    model: str,
    version: int,
    percent: float,
    actor: str,
    reason: str,
    run_id: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> TrafficChange:
    """Makes `version` the canary with this share. Refused, with nothing changed, where it must not answer callers.

    Another version's canary is over by that: its share goes first to the others.
    """
    settle(clients, model, actor, run_id)
    state = traffic_state(clients, model)
    changed = False
    if state.aliases.get(CANARY) != version:
        if reasons := canary_reasons(clients, model, version):
            return TrafficChange(False, reasons)
        set_canary_weight(clients, model, 0.0, actor, reason, run_id)
        set_side(clients, model, CANARY, version, actor, reason, run_id)
        changed = True
    weighted = set_canary_weight(clients, model, percent, actor, reason, run_id, evidence)
    return TrafficChange(changed or weighted.changed, weighted.reasons)


def finish_canary(
    clients: Clients,
    model: str,
    version: int,
    outcome: Outcome,
    actor: str,
    reason: str,
    run_id: str = "",
    evidence: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Ends the canary `version`: it serves (`promote`), must not come back (`reject`), or is what it was (`end`). Safe to repeat.

    Returns why it was not promoted; the canary then goes on as it is. A promotion moves `production` before the share is given up,
    a rejection takes the share before anything else.
    """
    settle(clients, model, actor, run_id)
    if outcome == "promote":
        decision = promote(clients, model, version, actor, run_id, because=reason, evidence=evidence)
        if decision.action == "refuse":
            return decision.reasons
    if traffic_state(clients, model).aliases.get(CANARY) == version:
        set_canary_weight(clients, model, 0.0, actor, reason, run_id, evidence)
        set_side(clients, model, CANARY, None, actor, reason, run_id)
    if outcome == "reject" and states(clients.ledger.entries(model)).get(version) is not State.REJECTED:
        told = {**signed_off(clients.registry.version(model, version)), **(evidence or {})}
        serves = clients.ledger.current(model)
        before = serves.version if serves else None
        record(clients, LedgerEntry(clients.clock.now(), model, "reject", CANARY, version, before, actor, reason, run_id, told))
        write_states(clients, model)
    return ()
