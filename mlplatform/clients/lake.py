"""The lake: Delta tables under one root, local or S3, addressed by asset key.

Belongs here: reading, replacing and appending whole frames, idempotently, with the run that did it in the commit.
Does not belong here: knowing what any table means.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from mlplatform.records import DayRange

Key = tuple[str, ...]
_Place = tuple[Key, str, int, DayRange | None]  # table, its id, its version, the days read

# Every partitioned table has this column: the UTC day of its time column.
DAY = "event_date"

# What `read` keeps, in bytes: several views read the same days of the same tables, one after the other.
_KEPT_BYTES = 256 * 2**20
_LARGEST_KEPT = _KEPT_BYTES // 4


class MissingTableError(LookupError):
    """The table has never been written."""


class UnreadableTableError(DeltaError):  # type: ignore[misc]  # deltalake has no types for its exceptions
    """The table is there, and its log cannot be read."""


class TableMovedError(Exception):
    """Somebody else wrote the table since it was read: read it again."""


@dataclass(frozen=True)
class Lake:
    """Delta tables under `root`. `storage_options` as deltalake takes them (empty for local folders)."""

    root: str
    storage_options: Mapping[str, str] = field(default_factory=dict)
    # Opening a table reads its whole log; one that is open already only looks for newer commits.
    _open: dict[Key, DeltaTable] = field(default_factory=dict, init=False, repr=False, compare=False)
    # A version of a table never changes, so what was read of it stays true. The frame read longest ago is first.
    _kept: dict[_Place, pl.DataFrame] = field(default_factory=dict, init=False, repr=False, compare=False)

    def uri(self, key: Key) -> str:
        return "/".join((self.root.rstrip("/"), *key))

    def exists(self, key: Key) -> bool:
        return key in self._open or bool(DeltaTable.is_deltatable(self.uri(key), self._options()))

    def table(self, key: Key, version: int | None = None) -> DeltaTable:
        """The Delta table itself, at its newest version or at `version`. Raises MissingTableError where nothing was ever written."""
        if version is None and key in self._open:
            table = self._open[key]
            if self._may_be_behind(key, table.version()):
                table.update_incremental()
            return table
        try:
            table = DeltaTable(self.uri(key), version=version, storage_options=self._options())
        except TableNotFoundError as missing:
            raise MissingTableError(f"table {'/'.join(key)} does not exist yet: materialize the asset first") from missing
        except DeltaError as nonsense:
            raise UnreadableTableError(f"table {'/'.join(key)} cannot be read: {nonsense}") from nonsense
        if version is None:
            self._open[key] = table
        return table

    def _may_be_behind(self, key: Key, version: int) -> bool:
        # Versions have no gaps (Delta protocol, "Delta Log Entries"), so the file of the next commit tells whether there is
        # one. Asking a local folder for one name is some hundred times cheaper than listing the log, as the update does.
        if "://" in self.root:
            return True
        log = Path(self.uri(key)) / "_delta_log"
        return (log / f"{version + 1:020d}.json").exists() or not (log / f"{version:020d}.json").exists()

    def _target(self, key: Key) -> DeltaTable | str:
        """What to write to: the open table, or the place of one that does not exist yet."""
        return self.table(key) if self.exists(key) else self.uri(key)

    def scan(self, key: Key, days: DayRange | None = None, version: int | None = None) -> pl.LazyFrame:
        """Lazy frame of a table; `days` reads only the partitions of those days."""
        frame = pl.scan_delta(self.table(key, version), storage_options=self._options())
        return frame if days is None else frame.filter(pl.col(DAY).is_between(days.first, days.last))

    def read(self, key: Key, days: DayRange | None = None, version: int | None = None) -> pl.DataFrame:
        """The rows of a table, in no order. Small frames of the newest version are kept for the next reader: do not change
        them in place."""
        if version is not None:
            return self.scan(key, days, version).collect()
        place = (key, *self.identity(key), days)
        frame = self._kept.pop(place, None)
        if frame is None:
            frame = self.scan(key, days).collect()
            for outdated in [kept for kept in self._kept if kept[0] == key and kept[1:3] != place[1:3]]:
                del self._kept[outdated]
        self._keep(place, frame)
        return frame

    def _keep(self, place: _Place, frame: pl.DataFrame) -> None:
        if frame.estimated_size() <= _LARGEST_KEPT:
            self._kept[place] = frame
        while sum(kept.estimated_size() for kept in self._kept.values()) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]

    @contextmanager
    def _writing(self, key: Key, rows: pl.DataFrame, replaced: DayRange | None) -> Iterator[None]:
        """Around one commit that adds `rows`, in place of those of the days `replaced`: kept frames follow it.

        Only where nobody else committed meanwhile, which the version tells, and the rows are of the table's own types.
        """
        before = self.identity(key) if key in self._open else None
        yield
        if before is None or self.identity(key) != (before[0], before[1] + 1):
            return
        for place in [kept for kept in self._kept if kept[:3] == (key, *before)]:
            frame, days = self._kept.pop(place, None), place[3]
            if frame is None:  # one that was kept before it in this loop took its room
                continue
            if DAY not in rows.columns or set(rows.columns) != set(frame.columns):
                continue
            added = rows if days is None else rows.filter(pl.col(DAY).is_between(days.first, days.last))
            added = added.select(frame.columns)
            if added.schema != frame.schema:
                continue
            if replaced is not None:
                frame = frame.filter(~pl.col(DAY).is_between(replaced.first, replaced.last))
            self._keep((key, before[0], before[1] + 1, days), pl.concat([frame, added], rechunk=True))

    def replace(
        self,
        key: Key,
        rows: pl.DataFrame,
        days: DayRange | None = None,
        metadata: Mapping[str, str] | None = None,
        *,
        widen: bool = False,
    ) -> int:
        """Replaces the whole table, or the partitions of `days`, in one commit. Returns the version it left.

        Rows outside `days` are an error of Delta's own check, so a wrong day never slips in. `widen` as in `append`.
        """
        if days is None:
            write_deltalake(
                self._target(key),
                _plain(rows),
                mode="overwrite",
                schema_mode="overwrite",
                storage_options=self._options(),
                commit_properties=_commit(metadata),
            )
        elif not self.exists(key):
            write_deltalake(
                self.uri(key), _plain(rows), partition_by=[DAY], storage_options=self._options(), commit_properties=_commit(metadata)
            )
        else:
            with self._writing(key, rows, days):
                write_deltalake(
                    self._target(key),
                    _plain(rows),
                    mode="overwrite",
                    schema_mode="merge" if widen else None,
                    predicate=f"{DAY} >= '{days.first}' AND {DAY} <= '{days.last}'",
                    partition_by=[DAY],
                    storage_options=self._options(),
                    commit_properties=_commit(metadata),
                )
        return self.version(key)

    def append(
        self,
        key: Key,
        rows: pl.DataFrame,
        *,
        partitioned: bool = True,
        transaction: tuple[str, int] | None = None,
        metadata: Mapping[str, str] | None = None,
        read_at: int | None = None,
        widen: bool = False,
        configuration: Mapping[str, str] | None = None,
    ) -> bool:
        """Appends rows in one commit. With `transaction` (application, number), a number not above the last one is a
        replay: nothing is written and False is returned. `widen`: columns the table lacks are added to it, null in its other rows.
        `configuration`: Delta's table properties, set where this write makes the table.

        `read_at`: the version the rows were chosen against (-1: there was no table). Raises TableMovedError, with nothing
        written, where the table has another one by now.
        """
        if transaction is not None and self.transaction(key, transaction[0]) >= transaction[1]:
            return False
        with self._writing(key, rows, None):
            if read_at is not None:
                self._append_at(key, rows, partitioned, _commit(metadata, transaction, retries=0), read_at, configuration)
                return True
            write_deltalake(
                self._target(key),
                _plain(rows),
                mode="append",
                schema_mode="merge" if widen else None,
                partition_by=[DAY] if partitioned else None,
                configuration=dict(configuration) if configuration and not self.exists(key) else None,
                storage_options=self._options(),
                commit_properties=_commit(metadata, transaction),
            )
        return True

    def _append_at(
        self,
        key: Key,
        rows: pl.DataFrame,
        partitioned: bool,
        commit: CommitProperties,
        read_at: int,
        configuration: Mapping[str, str] | None,
    ) -> None:
        if (self.version(key) if self.exists(key) else -1) != read_at:
            raise TableMovedError("/".join(key))
        try:
            write_deltalake(
                self._target(key) if read_at >= 0 else self.uri(key),
                _plain(rows),
                mode="append" if read_at >= 0 else "error",
                # A view that has grown by a feature: rows written before have null there.
                schema_mode="merge" if read_at >= 0 else None,
                partition_by=[DAY] if partitioned else None,
                configuration=dict(configuration) if configuration and read_at < 0 else None,
                storage_options=self._options(),
                # No second try: it would go behind the commit that came first, whatever that one wrote.
                commit_properties=commit,
            )
        except (CommitFailedError, DeltaError) as error:
            if self.exists(key) and self.version(key) != read_at:
                raise TableMovedError("/".join(key)) from error
            raise

    def compact(self, key: Key, metadata: Mapping[str, str] | None = None, target_bytes: int = 8_000_000) -> int:
        """Merges small files into files of about `target_bytes`, without changing a row. Returns how many went into others.

        The old files stay until a vacuum, for readers of older versions.
        """
        merged = self.table(key).optimize.compact(target_size=target_bytes, commit_properties=_commit(metadata))
        return int(merged["numFilesRemoved"])

    def transaction(self, key: Key, application: str) -> int:
        """The last transaction number `application` committed to the table, -1 before the first."""
        if not self.exists(key):
            return -1
        number = self.table(key).transaction_version(application)
        return -1 if number is None else number

    def last_metadata(self, key: Key, name: str) -> str | None:
        """The newest commit's value of a custom metadata entry, None where no commit has one."""
        if not self.exists(key):
            return None
        table = self.table(key)
        # Most often the last commit has it; the whole history is long.
        for commits in (table.history(1), table.history()):
            if (found := next((str(commit[name]) for commit in commits if name in commit), None)) is not None:
                return found
        return None

    def commits(self, key: Key, limit: int | None = None) -> list[dict[str, Any]]:
        """The newest `limit` commits (all unless said), newest first, as deltalake tells them, under their right `version`.

        deltalake 1.6 lists the newest commits whatever version a table was opened at, and counts down from that version: the
        numbers are right only for a table that was the newest before and after.
        """
        while True:
            table = self.table(key)
            version = table.version()
            found: list[dict[str, Any]] = table.history(limit)
            if self.table(key).version() == version:
                return found

    def recent_metadata(self, key: Key, name: str, commits: int = 20) -> str | None:
        """As `last_metadata`, looking at the last few commits only."""
        if not self.exists(key):
            return None
        return next((str(commit[name]) for commit in self.commits(key, commits) if name in commit), None)

    def version(self, key: Key) -> int:
        return int(self.table(key).version())

    def identity(self, key: Key) -> tuple[str, int]:
        """(table id, version): with time travel this names the exact content."""
        table = self.table(key)
        return str(table.metadata().id), table.version()

    def row_count(self, key: Key, days: DayRange | None = None) -> int:
        if days is None:
            return int(self.table(key).count())  # from the log's statistics: no file is read
        return int(self.scan(key, days).select(pl.len()).collect().item())

    def maximum(self, key: Key, column: str) -> Any:
        """The largest value of a column, from the log's statistics: no file is read. None for a table without rows."""
        files = pl.DataFrame(pa.table(self.table(key).get_add_actions(flatten=True)))
        return files[f"max.{column}"].max() if f"max.{column}" in files.columns else None

    def time_of(self, key: Key, version: int) -> datetime:
        """When the commit of `version` was made (wall clock). Raises LookupError where the log no longer has it."""
        found = next((c for c in self.commits(key) if c["version"] == version), None)
        if found is None:
            raise LookupError(f"table {'/'.join(key)} has no commit {version} in its log")
        return datetime.fromtimestamp(found["timestamp"] / 1000, UTC)

    def make_root(self) -> None:
        if "://" not in self.root:
            Path(self.root).mkdir(parents=True, exist_ok=True)

    def _options(self) -> dict[str, str]:
        return dict(self.storage_options)


def with_day(rows: pl.DataFrame, time_column: str) -> pl.DataFrame:
    """Adds the partition column: the UTC day of `time_column` (a UTC timestamp)."""
    return rows.with_columns(pl.col(time_column).dt.date().alias(DAY))


def day_literals(days: Sequence[date]) -> list[str]:
    return [d.isoformat() for d in days]


def _commit(metadata: Mapping[str, Any] | None, transaction: tuple[str, int] | None = None, retries: int | None = None) -> CommitProperties:
    return CommitProperties(
        custom_metadata={k: str(v) for k, v in (metadata or {}).items()},
        max_commit_retries=retries,
        app_transactions=[Transaction(*transaction)] if transaction else None,
    )


def _plain(rows: pl.DataFrame) -> Any:
    """Arrow without dictionaries: Delta stores plain strings, and categoricals would come back as such anyway."""
    return rows.with_columns(pl.col(pl.Categorical).cast(pl.String)).to_arrow()
