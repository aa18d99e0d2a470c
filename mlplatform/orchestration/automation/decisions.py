"""The small decisions of the sensors, pure and without Dagster. (Retraining is decided in room `monitoring`.)

Belongs here: from what was read to "run, or why not". Does not belong here: reading, or Dagster's objects.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

S = TypeVar("S")


@dataclass(frozen=True)
class Tick:
    """Whether to run, why not otherwise, and what to remember."""

    run: bool
    reason: str
    cursor: str


def new_entries(waiting: Mapping[str, int | None], cursor: str | None, unfinished: bool = False) -> Tick:
    """Run when any stream has entries the group has not acknowledged. `waiting`: entries by stream, None = cannot be told.

    The cursor counts the runs asked for, so that each gets a key of its own: a failed run is asked for again. `unfinished`:
    a run asked for before is queued or at work. It will find the entries too; asking at every tick would queue runs
    faster than they end.
    """
    asked = int(cursor or 0)
    if unfinished:
        return Tick(False, "a run asked for before has not finished", str(asked))
    unknown = sorted(stream for stream, count in waiting.items() if count is None)
    total = sum(count or 0 for count in waiting.values())
    if total or unknown:
        why = f"{total} entries wait" + (f"; {', '.join(unknown)} cannot tell" if unknown else "")
        return Tick(True, why, str(asked + 1))
    return Tick(False, "no entry waits in any stream", str(asked))


def new_outcomes(last_logged: str | None, versions: Mapping[str, int], cursor: str | None, unfinished: bool = False) -> Tick:
    """Run when a prediction was logged, or a labelled table written, since the last run; not while one is `unfinished`."""
    if unfinished:
        return Tick(False, "a run asked for before has not finished", cursor or "")
    now = json.dumps({"log": last_logged, "tables": dict(sorted(versions.items()))}, sort_keys=True)
    if last_logged is None:
        return Tick(False, "no prediction was ever logged", cursor or "")
    if now == cursor:
        return Tick(False, "no prediction and no label since the last run", now)
    return Tick(True, "new predictions or labels", now)


@dataclass(frozen=True)
class Guarded:
    """Whether to settle, whether to alert of an altered ledger, what was found, and what to remember."""

    act: bool
    alert: bool
    reason: str
    cursor: str


def guard(wrong: Sequence[str], unrecorded: Sequence[str], faults: Sequence[str], cursor: str | None) -> Guarded:
    """What must be put back (`wrong`) is so at once. What is only `unrecorded` waits for a second look: a change that is under way has
    moved its alias and is about to write its entry. `faults` of the ledger alert once, and again when they change."""
    try:
        before = json.loads(cursor or "{}")
    except ValueError:
        before = {}
    seen, told = before.get("unrecorded", []), before.get("faults", [])
    still = [text for text in unrecorded if text in seen]
    now = json.dumps({"unrecorded": list(unrecorded), "faults": list(faults)}, sort_keys=True)
    found = [*wrong, *unrecorded, *faults]
    return Guarded(bool(wrong or still), bool(faults) and list(faults) != told, "; ".join(found) or "registry and ledger agree", now)


def summary_of(kind: type[S], text: str | None) -> S | None:
    """A summary record from its stored JSON; None where none was stored. Keys an older version lacked take their defaults."""
    if text is None:
        return None
    raw: dict[str, Any] = json.loads(text)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # summaries are dataclasses
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known})
