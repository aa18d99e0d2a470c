"""A canary from its first percent to its end, as whoever judges it carries it out.

Belongs here: the order of writes of each step, each of which is safe to repeat. Does not belong here: the judgement
(`deployment.judge`), single writes (`traffic_state`, `serving_state`).

Killed anywhere, the same call again does what is missing. A canary's weight is 0 whenever its version changes, so no version gets
the share that was meant for another.
"""

from collections.abc import Mapping
from typing import Any, Literal

from mlplatform.contracts import CANARY
from mlplatform.deployment.states import State, states
from mlplatform.orchestration.recording import record
from mlplatform.orchestration.release_state import settle, signed_off, write_states
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote
from mlplatform.orchestration.traffic_state import TrafficChange, canary_reasons, set_canary_weight, set_side, traffic_state
from mlplatform.records import LedgerEntry

Outcome = Literal["promote", "reject", "end"]


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
        decision = promote(clients, model, version, actor, run_id, evidence=evidence)
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
