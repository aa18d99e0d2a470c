"""The deployment ledger: an append-only Delta table per model that says what served, since when, and why.

Belongs here: appending an entry, reading entries back in order. Does not belong here: deciding what to deploy.
"""

import json
from dataclasses import dataclass
from datetime import UTC

import polars as pl

from mlplatform.clients.lake import Key, Lake
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
    }
)

MOVES = ("promote", "rollback")  # the actions after which `version` serves


@dataclass(frozen=True)
class Ledger:
    """Deployment history of all models in `lake`, one table ("deployment", model) each."""

    lake: Lake

    def key(self, model: str) -> Key:
        return ("deployment", model)

    def append(self, entry: LedgerEntry, entry_id: str | None = None) -> bool:
        """Writes one entry in one commit. With `entry_id`, an entry already written under it is left as it is and False is
        returned: a step that was killed may be repeated. Raises ValueError for a time without a zone.

        The table refuses updates and deletes by Delta's own `delta.appendOnly`.
        """
        if entry.at.tzinfo is None:
            raise ValueError("a ledger entry takes a time with a zone")
        key = self.key(entry.model)
        # Each id is an application of its own: ids may come in any order, and each is committed once.
        transaction = None if entry_id is None else (f"ledger:{entry_id}", 1)
        row = {
            "sequence": self.lake.row_count(key) if self.lake.exists(key) else 0,
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
        }
        written = self.lake.append(
            key, pl.DataFrame([row], schema=SCHEMA), partitioned=False, transaction=transaction, metadata={"run_id": entry.run_id}
        )
        self._forbid_changes(key)
        return written

    def entries(self, model: str) -> tuple[LedgerEntry, ...]:
        """Every entry in the order written (entries written at the same moment: by their time); empty before the first."""
        key = self.key(model)
        if not self.lake.exists(key):
            return ()
        rows = self.lake.read(key).sort("sequence", "at").drop("sequence")
        return tuple(LedgerEntry(**{**row, "evidence": json.loads(row["evidence"])}) for row in rows.iter_rows(named=True))

    def current(self, model: str) -> LedgerEntry | None:
        """The last entry that moved what serves; None before the first promotion."""
        return next((entry for entry in reversed(self.entries(model)) if entry.action in MOVES), None)

    def _forbid_changes(self, key: Key) -> None:
        table = self.lake.table(key)
        if table.metadata().configuration.get("delta.appendOnly") != "true":
            table.alter.set_table_properties({"delta.appendOnly": "true"})
