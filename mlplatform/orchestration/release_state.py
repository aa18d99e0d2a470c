"""States of versions in MLflow, and bringing registry and ledger together again where they differ.

Belongs here: seals, state tags, repair, approvals and rejections, for assets, sensors and the command line alike. Does not belong
here: which step is allowed (`deployment.states`), what a difference means (`deployment.guard`).
"""

from dataclasses import replace
from typing import Final

from pydantic import ValidationError

from mlplatform.contracts import (
    CANARY,
    GATES_TAG,
    MODELS_CHANNEL,
    NO_RULES,
    PREVIOUS,
    PRODUCTION,
    SHADOW,
    STATE_TAG,
    TRAFFIC_TAG,
    TRAINED_BY_TAG,
    VERIFIED_TAG,
    TrafficRules,
)
from mlplatform.deployment.decide import Decision, Serving, ledger_entries
from mlplatform.deployment.guard import Difference, differences
from mlplatform.deployment.history import MOVES, Served, latest
from mlplatform.deployment.states import Approval, State, approval_reasons, same_person, states, why_not
from mlplatform.orchestration.recording import note_head, record
from mlplatform.orchestration.resources import Clients
from mlplatform.records import LedgerEntry, ModelVersion
from mlplatform.specs import ModelSpec
from mlplatform.verified import Identity, Sealed, evaluation_sha256, seal, why_unverified

_LATE: Final = "recorded late: it was found so without an entry"


class ReleaseRefusedError(ValueError):
    """An approval or rejection that must not be; the message says why."""


# --- seals -----------------------------------------------------------------------------------------------------------


def unverified(clients: Clients, version: ModelVersion) -> str:
    """Why the version must not answer callers, by its tags; empty where its gates passed. The service looks at its files too."""
    tags = version.tags
    identity = Identity(version.model, version.version, tags.get("contract_digest", ""), tags.get("model_sha256", ""))
    return why_unverified(clients.settings.signing_key.get_secret_value(), identity, Sealed.from_tags(tags))


def sealed_tags(clients: Clients, version: ModelVersion, evaluation: str) -> dict[str, str]:
    """The tag of a version whose gates passed with this evaluation: over the contract in the registry, not what tags say of it."""
    contract = clients.registry.contract_of(version)
    identity = Identity(version.model, version.version, contract.digest(), contract.model_sha256)
    return {VERIFIED_TAG: seal(clients.settings.signing_key.get_secret_value(), identity, evaluation)}


# --- agreement of registry and ledger --------------------------------------------------------------------------------


def found_differences(clients: Clients, model: str) -> tuple[Difference, ...]:
    """Where the registry is not as the ledger says. Raises UnknownModelError."""
    return _compared(clients, model, clients.registry.versions(model))


def settle(clients: Clients, model: str, actor: str, run_id: str = "", *, moves: bool = True) -> tuple[Difference, ...]:
    """Completes or undoes what was cut off or done by hand; returns what it found. Every step may be repeated.

    Everything that changes a deployment begins with this. `moves`: also record a move of `production` that the ledger missed, and
    renew tags; whoever decides about `production` next does both itself, once what serves is right.
    """
    versions = clients.registry.versions(model)
    seal_of_before(clients, model, versions)
    found = _compared(clients, model, versions)
    for difference in found:
        if difference.why:
            _put_back(clients, model, difference, actor, run_id)
        elif difference.alias == PRODUCTION:
            if moves:
                _record_move(clients, model, actor, run_id)
        else:
            _record_late(clients, model, difference, actor, run_id)
    if moves:
        write_states(clients, model)
        note_head(clients, model)
    return found


def write_states(clients: Clients, model: str) -> None:
    """Each version's state tag as the ledger has it."""
    by_version = states(clients.ledger.entries(model))
    for version in clients.registry.versions(model):
        state = by_version.get(version.version, State.CANDIDATE)
        if version.tags.get(STATE_TAG) != state:
            clients.registry.set_tags(version, {STATE_TAG: str(state)})


def rules_on_record(clients: Clients, model: str) -> TrafficRules | None:
    """The traffic rules in MLflow; None where they are none, so that the services keep those they had."""
    text = clients.registry.model_tags(model).get(TRAFFIC_TAG, "")
    try:
        return TrafficRules.model_validate_json(text) if text.strip() else NO_RULES
    except ValidationError:
        return None


def _compared(clients: Clients, model: str, versions: tuple[ModelVersion, ...]) -> tuple[Difference, ...]:
    aliases = {alias: v.version for v in versions for alias in v.aliases}
    recorded = replace(latest(clients.ledger.entries(model)), since=None)
    rules = rules_on_record(clients, model) or recorded.rules
    found = Served(aliases.get(PRODUCTION), aliases.get(CANARY), aliases.get(SHADOW), rules)
    carried = [v for v in versions if set(v.aliases) & {PRODUCTION, CANARY}]
    return differences(recorded, found, {v.version: why for v in carried if (why := _unfit(clients, v))})


def _unfit(clients: Clients, version: ModelVersion) -> str:
    """Why no hand may let the version answer callers: its seal, its rejection, or an approval that nobody gave. One that served before
    needs no new approval: a rollback to it does not ask for one either."""
    state = states(clients.ledger.entries(version.model)).get(version.version, State.CANDIDATE)
    reasons = () if state in (State.PRODUCTION, State.RETIRED) else unapproved(clients, version)
    return unverified(clients, version) or "; ".join(reasons)


def _put_back(clients: Clients, model: str, difference: Difference, actor: str, run_id: str) -> None:
    # The entry first: it changes nothing that the ledger says serves, and without it a move by hand would leave no trace.
    entry = LedgerEntry(
        clients.clock.now(), model, "restore", difference.alias, difference.recorded, difference.found, actor, difference.why, run_id
    )
    record(clients, entry)
    if difference.recorded is None:
        clients.registry.delete_alias(model, difference.alias)
    else:
        clients.registry.set_alias(model, difference.alias, difference.recorded)
    clients.redis.publish(MODELS_CHANNEL, model)


def _record_move(clients: Clients, model: str, actor: str, run_id: str) -> None:
    production, previous = (clients.registry.by_alias(model, alias) for alias in (PRODUCTION, PREVIOUS))
    entries = clients.ledger.entries(model)
    serving = Serving(model, production.version if production else None, previous.version if previous else None, entries)
    if (late := serving.unrecorded) is not None:
        decision = Decision(model, "none", late.version, late.before, (), late=late)
        for entry in ledger_entries(decision, clients.clock.now(), actor, run_id):
            record(clients, entry)


def _record_late(clients: Clients, model: str, difference: Difference, actor: str, run_id: str) -> None:
    now, alias = clients.clock.now(), difference.alias
    if alias:
        record(clients, LedgerEntry(now, model, alias, alias, difference.found, difference.recorded, actor, _LATE, run_id))
        return
    rules = rules_on_record(clients, model)
    if rules is not None:
        recorded = latest(clients.ledger.entries(model))
        evidence = {"rules": rules.canonical_json(), "before": recorded.rules.canonical_json()}
        record(clients, LedgerEntry(now, model, "traffic", CANARY, recorded.canary, recorded.canary, actor, _LATE, run_id, evidence))


def seal_of_before(clients: Clients, model: str, versions: tuple[ModelVersion, ...]) -> None:
    """A version that was promoted before there were seals gets its own, once: its promotion stands in the ledger without a hash."""
    bare = [v for v in versions if v.tags.get(GATES_TAG) == "passed" and VERIFIED_TAG not in v.tags]
    if not bare:
        return
    promoted = {line.entry.version for line in clients.ledger.lines(model) if line.hash is None and line.entry.action in MOVES}
    for version in bare:
        if version.version in promoted:
            clients.registry.set_tags(version, sealed_tags(clients, version, Sealed.from_tags(version.tags).evaluation))


# --- approvals -------------------------------------------------------------------------------------------------------


def declared(model: str) -> ModelSpec | None:
    """The model's declaration; None for a model that nobody declares."""
    from mlplatform.catalog.discover import catalogs

    return next((spec for catalog in catalogs() for spec in catalog.models if spec.name == model), None)


def approval_needed(model: str) -> Approval:
    """Who must agree, as the model's declaration says; the gates alone for a model nobody declares."""
    spec = declared(model)
    return "gates" if spec is None else spec.approval


def unapproved(clients: Clients, version: ModelVersion) -> tuple[str, ...]:
    """Why nobody's agreement lets the version answer callers; empty where it may."""
    evaluation = evaluation_sha256(Sealed.from_tags(version.tags).evaluation)
    trained_by = version.tags.get(TRAINED_BY_TAG, "")
    return approval_reasons(approval_needed(version.model), clients.ledger.entries(version.model), version.version, trained_by, evaluation)


def approve(clients: Clients, model: str, number: int, actor: str, reason: str, run_id: str = "") -> bool:
    """Signs a version off, with the evaluation it was judged by. False where it was signed off so already.

    Raises ReleaseRefusedError for a version whose gates did not pass, one that its own trainer approves where that does not count,
    and one whose state has no approval; UnknownModelError.
    """
    settle(clients, model, actor, run_id)
    version = clients.registry.version(model, number)
    entries = clients.ledger.entries(model)
    now = states(entries).get(number, State.CANDIDATE)
    if why := unverified(clients, version):
        raise ReleaseRefusedError(f"version {number} of {model} cannot be approved: {why}")
    if approval_needed(model) == "other_person" and (same := same_person(number, actor, version.tags.get(TRAINED_BY_TAG, ""))):
        raise ReleaseRefusedError(same[0])
    if now not in (State.APPROVED, State.CANARY) and (why := why_not(number, now, State.APPROVED)):
        raise ReleaseRefusedError(why)
    evidence = signed_off(version)
    last = next((e for e in reversed(entries) if e.version == number and e.action in ("approve", "reject")), None)
    if last is not None and (last.action, last.actor) == ("approve", actor) and last.evidence == evidence:
        return False
    _judged(clients, model, "approve", number, actor, reason, run_id, evidence)
    return True


def reject(clients: Clients, model: str, number: int, actor: str, reason: str, run_id: str = "") -> bool:
    """Keeps a version from answering callers until a person approves it. False where it was rejected already.

    Raises ReleaseRefusedError for one that serves or is canary: those are taken out of service first; UnknownModelError.
    """
    settle(clients, model, actor, run_id)
    version = clients.registry.version(model, number)
    entries = clients.ledger.entries(model)
    now = states(entries).get(number, State.CANDIDATE)
    if now in (State.PRODUCTION, State.CANARY):
        mend = "roll back" if now is State.PRODUCTION else "end the canary"
        raise ReleaseRefusedError(f"version {number} of {model} answers callers ({now}): {mend} first")
    last = next((e for e in reversed(entries) if e.version == number and e.action in ("approve", "reject")), None)
    if last is not None and last.action == "reject":
        return False
    _judged(clients, model, "reject", number, actor, reason, run_id, signed_off(version))
    return True


def signed_off(version: ModelVersion) -> dict[str, str]:
    """What a judgement of the version was about: its evaluation and where that and the model lie."""
    sealed = Sealed.from_tags(version.tags)
    return {
        "evaluation": sealed.evaluation,
        "evaluation_sha256": evaluation_sha256(sealed.evaluation),
        "gates": sealed.gates,
        "mlflow_run": version.run_id,
        "model": version.source,
        "contract_digest": version.tags.get("contract_digest", ""),
        "trained_by": version.tags.get(TRAINED_BY_TAG, ""),
    }


def _judged(
    clients: Clients, model: str, action: str, version: int, actor: str, reason: str, run_id: str, evidence: dict[str, str]
) -> None:
    entry = LedgerEntry(clients.clock.now(), model, action, "", version, None, actor, reason, run_id, evidence)
    record(clients, entry, entry_id=f"{run_id}:{action}:{version}" if run_id else None)
    write_states(clients, model)
