"""What the command line asks about releases: what served, whether the ledger holds, what serves now.

Belongs here: gathering, as plain JSON-able values. Does not belong here: printing tables (`cli_release`), changing anything.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlplatform.printing import short_time
from mlplatform.queries import QuestionError, entry_row

if TYPE_CHECKING:
    from mlplatform.orchestration.resources import Clients
    from mlplatform.records import LedgerEntry
    from mlplatform.settings import Settings


def served(entries: Sequence["LedgerEntry"], at: datetime) -> dict[str, Any]:
    """What served at `at`: `served` is the entry that put the production version there (None: nothing served), `traffic` who answered."""
    from mlplatform.deployment.history import MOVES, changes, served_at

    found = served_at(entries, at)
    moves = [entry for entry, then in changes(entries) if entry.action in MOVES and then.since is not None and then.since <= at]
    return {
        "at": at.isoformat(),
        "served": entry_row(moves[-1]) if moves else None,
        "traffic": {
            "production": found.production,
            "canary": found.canary,
            "canary_percent": found.canary_weight,
            "shadow": found.shadow,
            "variants": _variants(found.shares()) if found.production is not None else [],
            "since": found.since.isoformat() if found.since else None,
        },
    }


def served_text(told: dict[str, Any]) -> str:
    entry, traffic = told["served"], told["traffic"]
    if entry is None:
        return "nothing served yet"
    text = f"version {entry['version']} served, since {short_time(entry['at'])} ({entry['action']} by {entry['actor']})"
    if len(traffic["variants"]) > 1:
        text += ": " + ", ".join(f"{v['variant']} version {v['version']} {v['percent']:g} %" for v in traffic["variants"])
    return text + (f"; shadow version {traffic['shadow']}" if traffic["shadow"] is not None else "")


def verified(settings: "Settings", model: str) -> dict[str, Any]:
    """Whether the ledger is as it was written. Raises RegistryUnreachableError where the head noted in MLflow cannot be read."""
    from mlplatform.orchestration.recording import verify_ledger
    from mlplatform.orchestration.resources import Clients

    found = verify_ledger(Clients(settings), model)
    return {
        "entries": found.entries,
        "hashed": found.hashed,
        "head": None if found.head is None else str(found.head),
        "anchored": found.anchored,
        "faults": list(found.faults),
    }


def verified_lines(told: dict[str, Any]) -> list[str]:
    if told["faults"]:
        return [f"ALTERED  {fault}" for fault in told["faults"]]
    before = told["entries"] - told["hashed"]
    older = f", {before} of them from before there were hashes" if before else ""
    return [f"unaltered: {told['entries']} entries{older}; head {told['head'] or 'none yet'}"]


def deployment(clients: "Clients", model: str, last: int) -> dict[str, Any]:
    """What serves now, beside the states of the newest versions and the newest entries, newest first. Raises QuestionError for a model
    without versions."""
    from mlplatform.clients.registry import UnknownModelError
    from mlplatform.contracts import CANARY, GATES_TAG, PREVIOUS, SHADOW, TRAINED_BY_TAG
    from mlplatform.deployment.states import State, states
    from mlplatform.orchestration.release_state import found_differences, unverified
    from mlplatform.orchestration.traffic_state import traffic_state

    try:
        versions = clients.registry.versions(model)
    except UnknownModelError as missing:
        raise QuestionError(f"no version of {model} is registered yet: `mlplatform demo`, or materialize model/{model}") from missing
    state, entries = traffic_state(clients, model), clients.ledger.entries(model)
    by_version = states(entries)
    canary = state.aliases.get(CANARY)
    verdicts = [entry for entry in entries if entry.action == "verdict" and canary in (None, entry.version)]
    return {
        "model": model,
        "variants": _variants(state.shares()) if state.aliases else [],
        "previous": state.aliases.get(PREVIOUS),
        "shadow": state.aliases.get(SHADOW),
        "rules_fault": state.fault or None,
        "differences": [str(difference) for difference in found_differences(clients, model)],
        "versions": [
            {
                "version": v.version,
                "state": str(by_version.get(v.version, State.CANDIDATE)),
                "aliases": ", ".join(v.aliases),
                "gates": v.tags.get(GATES_TAG, "never evaluated"),
                "sealed": "no" if unverified(clients, v) else "yes",
                "trained_by": v.tags.get(TRAINED_BY_TAG, ""),
                "created": v.created_at.isoformat(timespec="seconds"),
            }
            for v in versions[:last]
        ],
        "verdict": entry_row(verdicts[-1]) if verdicts else None,
        "no_verdict": "none" if canary is None else f"none yet of version {canary}",
        "entries": [entry_row(entry) for entry in reversed(entries[-last:])],
    }


def verdict_text(row: dict[str, Any]) -> str:
    return f"version {row['version']}: {row['evidence'].get('verdict', '')} ({row['reason']}), since {short_time(row['at'])}"


def _variants(shares: Sequence[tuple[str, int | None, float]]) -> list[dict[str, Any]]:
    return [{"variant": name, "version": version, "percent": percent} for name, version, percent in shares]
