"""The deployment ledger: an append-only Delta table per model that says what served, since when, and why.

Belongs here: appending an entry to the chain, reading entries back in order, gathering what `verify` compares. Does not belong here:
deciding what to deploy, what a hash is of (`ledger_chain`).
"""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Final

import polars as pl

from mlplatform.clients.lake import Key, Lake, TableMovedError
from mlplatform.ledger_chain import Head, Line, Verification, in_order, next_line, verify
from mlplatform.records import LedgerEntry

SCHEMA = pl.Schema(
    {
        "sequence": pl.Int64,
        "at": pl.Datetime("us", "UTC"),
        "model": pl.String,
        "action": pl.String,
        "alias": pl.String,
        "version": pl.Int64,
        "previous_version": pl.Int64,
        "actor": pl.String,
        "reason": pl.String,
        "run_id": pl.String,
        "evidence": pl.String,
        # Null in entries written before there was a chain.
        "previous_hash": pl.String,
        "hash": pl.String,
    }
)

MOVES = ("promote", "rollback")  # the actions after which `version` serves

_HEAD: Final = "ledger_head"  # in each commit's metadata: the entry it added
_TRIES: Final = 60
_LONGEST_PAUSE_S: Final = 0.5


class LedgerBusyError(RuntimeError):
    """Others wrote without a pause: the entry is not written."""


@dataclass(frozen=True)
class Ledger:
    """Deployment history of all models in `lake`, one table ("deployment", model) each."""

    lake: Lake

    def key(self, model: str) -> Key:
        return ("deployment", model)

    def append(self, entry: LedgerEntry, entry_id: str | None = None) -> bool:
        """Writes one entry in one commit, behind the last one. With `entry_id`, an entry already written under it is left as it is
        and False is returned: a step that was killed may be repeated. Raises ValueError for a time without a zone, LedgerBusyError
        where others kept coming first.

        The commit holds only where no other came since the chain's end was read: of two writers at once, the second reads again and
        goes behind the first. The table refuses updates and deletes by Delta's own `delta.appendOnly`.
        """
        if entry.at.tzinfo is None:
            raise ValueError("a ledger entry takes a time with a zone")
        for attempt in range(_TRIES):
            try:
                return self._append(entry, entry_id)
            except TableMovedError:
                time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.01 * 2**attempt)))  # noqa: S311  # spreads writers, hides nothing
        raise LedgerBusyError(f"the ledger of {entry.model} took {_TRIES} tries and others came first each time: try again")

    def _append(self, entry: LedgerEntry, entry_id: str | None) -> bool:
        key = self.key(entry.model)
        # The version before the lines: lines newer than it make the commit fail, which is right.
        read_at = self.lake.version(key) if self.lake.exists(key) else -1
        line = next_line(entry.model, self.lines(entry.model), _as_read(entry))
        row = {
            "sequence": line.sequence,
            "at": entry.at.astimezone(UTC),
            "model": entry.model,
            "action": entry.action,
            "alias": entry.alias,
            "version": entry.version,
            "previous_version": entry.previous_version,
            "actor": entry.actor,
            "reason": entry.reason,
            "run_id": entry.run_id,
            "evidence": json.dumps(dict(entry.evidence), sort_keys=True),
            "previous_hash": line.previous_hash,
            "hash": line.hash,
        }
        return self.lake.append(
            key,
            pl.DataFrame([row], schema=SCHEMA),
            partitioned=False,
            # Each id is an application of its own: ids may come in any order, and each is committed once.
            transaction=None if entry_id is None else (f"ledger:{entry_id}", 1),
            metadata={"run_id": entry.run_id, _HEAD: f"{line.sequence}:{line.hash}"},
            read_at=read_at,
            configuration={"delta.appendOnly": "true"},
        )

    def lines(self, model: str) -> tuple[Line, ...]:
        """Every entry with its place in the chain, in the order written; empty before the first."""
        key = self.key(model)
        if not self.lake.exists(key):
            return ()
        return in_order(_line(row) for row in self.lake.read(key).iter_rows(named=True))

    def entries(self, model: str) -> tuple[LedgerEntry, ...]:
        """Every entry in the order written (entries written at the same moment: by their time); empty before the first."""
        return tuple(line.entry for line in self.lines(model))

    def current(self, model: str) -> LedgerEntry | None:
        """The last entry that moved what serves; None before the first promotion."""
        return next((entry for entry in reversed(self.entries(model)) if entry.action in MOVES), None)

    def verify(self, model: str, heads: Iterable[Head] = ()) -> Verification:
        """Whether every entry is as it was written, and where it was; see `ledger_chain.verify`.

        Beside `heads` the chain must hold every head that a commit still in Delta's log names: rows taken out of the data files show
        although their own hashes are gone with them.
        """
        return verify(model, self.lines(model), (*self._committed(model), *heads))

    def _committed(self, model: str) -> list[Head]:
        key = self.key(model)
        if not self.lake.exists(key):
            return []
        return [Head.parse(str(c[_HEAD]), f"Delta's commit {c['version']}") for c in self.lake.commits(key) if _HEAD in c]


def _as_read(entry: LedgerEntry) -> LedgerEntry:
    """The entry as it will come back: its evidence is what JSON makes of it."""
    evidence: dict[str, Any] = json.loads(json.dumps(dict(entry.evidence)))
    return LedgerEntry(**{**{name: getattr(entry, name) for name in entry.__dataclass_fields__}, "evidence": evidence})


def _line(row: dict[str, Any]) -> Line:
    content = {name: row[name] for name in SCHEMA if name not in ("sequence", "previous_hash", "hash")}
    entry = LedgerEntry(**content | {"evidence": json.loads(content["evidence"])})
    return Line(row["sequence"], entry, row.get("previous_hash"), row.get("hash"))
