"""An entry of the deployment ledger, with all that goes with one: the chain's head noted in MLflow, and the alert.

Belongs here: the one way by which orchestration writes entries, and verifying what was written. Does not belong here: what happened.
"""

from typing import Final

from mlplatform.clients.alerts import Alert
from mlplatform.contracts import LEDGER_HEAD_TAG
from mlplatform.ledger_chain import Head, Verification
from mlplatform.orchestration.resources import Clients
from mlplatform.records import LedgerEntry

ALERTED: Final = ("rollback", "refuse", "reject", "restore")
_UNDECIDED: Final = "undecided"  # the kind of an alert: a trial that ended without a verdict
_TAG: Final = f"the tag {LEDGER_HEAD_TAG} in MLflow"


def record(clients: Clients, entry: LedgerEntry, entry_id: str | None = None) -> bool:
    """Appends, notes the head, alerts; False where `entry_id` was written already.

    Killed behind the entry, the noted head is an older one, which the chain still holds: the next entry notes a newer one.
    """
    written = clients.ledger.append(entry, entry_id)
    note_head(clients, entry.model)
    if written and (kind := _alert_kind(entry)):
        facts = {"by": entry.actor, "at": entry.at.isoformat(timespec="seconds"), "run": entry.run_id}
        clients.alerts.send(Alert(kind, entry.model, _told(kind, entry), {name: value for name, value in facts.items() if value}))
    return written


def _alert_kind(entry: LedgerEntry) -> str:
    """What somebody must be told of; empty where nobody must."""
    if entry.action == "verdict" and entry.evidence.get("step") == "end":
        return _UNDECIDED
    return entry.action if entry.action in ALERTED else ""


def note_head(clients: Clients, model: str) -> None:
    """Writes the chain's end where the lake's files cannot be reached from. A model that is not registered has no place for it."""
    from mlplatform.clients.registry import UnknownModelError

    lines = clients.ledger.lines(model)
    if not lines or lines[-1].hash is None:
        return
    head = Head(lines[-1].sequence, lines[-1].hash).signed(model, clients.settings.signing_key.get_secret_value())
    try:
        if clients.registry.model_tags(model).get(LEDGER_HEAD_TAG) != head:
            clients.registry.set_model_tag(model, LEDGER_HEAD_TAG, head)
    except UnknownModelError:
        return


def verify_ledger(clients: Clients, model: str) -> Verification:
    """The chain, against the head noted in MLflow too. Raises RegistryUnreachableError where that cannot be read."""
    from mlplatform.clients.registry import UnknownModelError

    try:
        noted = clients.registry.model_tags(model).get(LEDGER_HEAD_TAG, "")
    except UnknownModelError:
        noted = ""
    if not noted:
        return clients.ledger.verify(model)
    try:
        head = Head.parse(noted, _TAG, model, clients.settings.signing_key.get_secret_value())
    except ValueError as fault:
        found = clients.ledger.verify(model)
        return Verification(model, found.entries, found.hashed, found.head, found.anchored, (*found.faults, str(fault)))
    return clients.ledger.verify(model, [head])


def alert_broken(clients: Clients, found: Verification) -> None:
    """Tells of a chain that does not hold."""
    clients.alerts.send(Alert("ledger", found.model, f"{found.model}: the deployment ledger is not as it was written: {found.faults[0]}"))


def _told(kind: str, entry: LedgerEntry) -> str:
    before = "nothing" if entry.previous_version is None else f"version {entry.previous_version}"
    what = {
        "rollback": f"version {entry.version} serves again, instead of {before}",
        "refuse": f"version {entry.version} is refused; {before} goes on serving",
        "reject": f"version {entry.version} is rejected",
        "restore": f"the alias '{entry.alias}' was moved to {before} and is put back",
        _UNDECIDED: f"the canary, version {entry.version}, ends without a verdict; {before} goes on serving",
    }[kind]
    return f"{entry.model}: {what} ({entry.reason})"
