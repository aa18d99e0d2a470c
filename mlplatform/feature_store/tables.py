"""Feature tables as Feast declares them: reading the needed columns and days, appending, replacing.

Belongs here: Delta (and Parquet, for saved data sets) behind a Feast `FileSource`, local or S3. Does not belong here: joins.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError
from feast.data_format import DeltaFormat, ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource

from mlplatform.feature_store.join import as_utc
from mlplatform.fingerprint import Mark, fingerprint

# A day in any zone is at most this far from the day in UTC.
_ZONES = timedelta(days=1)


class UnpinnedError(LookupError):
    """A version was named for a table that was then not read: what was read instead is not known."""


class Pins:
    """Versions by the address of their table, and which of these were read."""

    def __init__(self, versions: Mapping[str, int]) -> None:
        self._versions = {_address(uri): version for uri, version in versions.items()}
        self.left = set(self._versions)

    def take(self, uri: str) -> int | None:
        """The version to read of a table; None: the newest."""
        self.left.discard(_address(uri))
        return self._versions.get(_address(uri))


def _address(uri: str) -> str:
    """One spelling of each address: a folder may be written in several."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).resolve())


_PINNED: ContextVar[Pins] = ContextVar("pinned", default=Pins({}))  # noqa: B039  # never changed: it names no table


@contextmanager
def pinned(versions: Mapping[str, int]) -> Iterator[None]:
    """Within it, feature tables are read at these versions (Delta time travel), by the addresses that `FeatureTable.uri` has.

    Feast has no word for a version: whoever asks it for a training set must not get rows that were written since. Raises UnpinnedError
    at its end for a table that was not read, as a misspelt address would be.
    """
    pins = Pins(versions)
    token = _PINNED.set(pins)
    try:
        yield
    finally:
        _PINNED.reset(token)
    if pins.left:
        raise UnpinnedError(f"never read at its version: {', '.join(sorted(pins.left))}")


class MissingFeatureTableError(LookupError):
    """The view's table has never been written."""


@dataclass(frozen=True)
class FeatureTable:
    """One table: where it is, and which of its columns hold the time and the day (`day` "" = not partitioned by day).

    `day` is only used where it is a partition column of dates. It is then the day of the event time in UTC, or in some zone: files are
    skipped by a day more than needed, and by the exact times in the table's statistics.
    """

    uri: str
    delta: bool
    event: str = ""
    day: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: DataSource, repo_path: Path | None, options: Mapping[str, str], day: str, event: str = "") -> "FeatureTable":
        """The table of a Feast source. Raises TypeError for anything but a FileSource over Delta or Parquet."""
        if not isinstance(source, FileSource) or not isinstance(source.file_format, DeltaFormat | ParquetFormat | None):
            raise TypeError(f"source {source.name}: this offline store reads FileSource(file_format=DeltaFormat()), not {source}")
        uri = FileSource.get_uri_for_file_path(repo_path, source.path)
        delta = isinstance(source.file_format, DeltaFormat) or (source.file_format is None and not uri.endswith(".parquet"))
        return cls(uri, delta, event or source.timestamp_field, day, {**endpoint_options(source.s3_endpoint_override), **options})

    def exists(self) -> bool:
        if self.delta:
            return bool(DeltaTable.is_deltatable(self.uri, dict(self.options)))
        return "://" in self.uri or Path(self.uri).exists()

    def open(self) -> "Snapshot":
        """The table as it is now, or within `pinned` at the version that names. Raises MissingFeatureTableError."""
        if not self.delta:
            frame, partitions = pl.scan_parquet(self.uri, storage_options=dict(self.options) or None), []
        else:
            try:
                table = DeltaTable(self.uri, version=_PINNED.get().take(self.uri), storage_options=dict(self.options))
            except TableNotFoundError as missing:
                raise MissingFeatureTableError(f"feature table {self.uri} does not exist yet: materialize its asset first") from missing
            frame = pl.scan_delta(table, storage_options=dict(self.options) or None)
            partitions = table.metadata().partition_columns
        schema = frame.collect_schema()
        return Snapshot(self, frame, schema, self.day in partitions and schema[self.day] == pl.Date)

    def schema(self) -> pl.Schema:
        """Columns as stored, the day partition included."""
        return self.open().schema

    def read(self, columns: Iterable[str] | None, start: datetime | None = None, end: datetime | None = None) -> pl.DataFrame:
        """See `Snapshot.read`."""
        return self.open().read(columns, start, end)

    def append(self, rows: pl.DataFrame) -> None:
        """Appends rows, the columns of the table in any order. A new table is partitioned by day. Raises TypeError for a Parquet file."""
        if not self.delta:
            raise TypeError(f"table {self.uri}: only Delta tables take appends")
        there = self.exists()
        schema = self.open().schema if there else pl.Schema({self.day: pl.Date} if self.day else {})
        if self.day in schema and self.day not in rows.columns:
            rows = rows.with_columns(as_utc(self.event, rows.schema).dt.date().cast(schema[self.day]).alias(self.day))
        write_deltalake(
            self.uri,
            arrow(rows),
            mode="append",
            partition_by=[self.day] if self.day and not there else None,
            storage_options=dict(self.options),
            commit_properties=CommitProperties(custom_metadata=_mark(rows, schema)),
        )

    def replace(self, rows: pl.DataFrame) -> None:
        """Writes the whole table anew, in one step for Delta."""
        if self.delta:
            write_deltalake(self.uri, arrow(rows), mode="overwrite", schema_mode="overwrite", storage_options=dict(self.options))
        else:
            rows.write_parquet(self.uri, storage_options=dict(self.options) or None, mkdir=True)


@dataclass(frozen=True)
class Snapshot:
    """One version of a table: every read from it sees the same rows, whatever is written meanwhile."""

    table: FeatureTable
    frame: pl.LazyFrame
    schema: pl.Schema
    by_day: bool  # partitioned by the dates in the table's day column

    def read(
        self,
        columns: Iterable[str] | None,
        start: datetime | None = None,
        end: datetime | None = None,
        created_by: tuple[str, datetime] | None = None,
    ) -> pl.DataFrame:
        """`columns` (None: all but the day partition) of the rows with start <= event time <= end.

        `created_by` = (column, time) leaves out rows created later. Files that cannot hold such rows are not opened.
        Raises ValueError for columns the table lacks.
        """
        table, frame = self.table, self.frame
        wanted = [name for name in self.schema if name != table.day] if columns is None else list(dict.fromkeys(columns))
        if missing := [name for name in wanted if name not in self.schema]:
            raise ValueError(f"table {table.uri} has no column {', '.join(missing)}; it has {', '.join(self.schema)}")
        if start is not None:
            frame = frame.filter(as_utc(table.event, self.schema) >= start)
            frame = frame.filter(pl.col(table.day) >= start.date() - _ZONES) if self.by_day else frame
        if end is not None:
            frame = frame.filter(as_utc(table.event, self.schema) <= end)
            frame = frame.filter(pl.col(table.day) <= end.date() + _ZONES) if self.by_day else frame
        if created_by is not None:
            frame = frame.filter(as_utc(created_by[0], self.schema) <= created_by[1])
        return frame.select(wanted).collect()


def _mark(rows: pl.DataFrame, schema: pl.Schema) -> dict[str, str]:
    """The fingerprint of the rows as they will be stored in a table of `schema`; nothing for types it does not cover."""
    kinds = {name: pl.Datetime("us", kind.time_zone) if isinstance(kind, pl.Datetime) else kind for name, kind in rows.schema.items()}
    stored = [pl.col(name).cast(schema.get(name, kind)) for name, kind in kinds.items()]
    try:
        return Mark(fingerprint(rows.select(stored))).metadata()
    except (TypeError, pl.exceptions.InvalidOperationError):  # whether such rows can be stored at all, Delta says
        return {}


def endpoint_options(endpoint: str) -> dict[str, str]:
    """Options for an S3 server named in a source's `s3_endpoint_override`; the rest comes from AWS_… variables."""
    if not endpoint:
        return {}
    # Without this, deltalake and Polars refuse a plain-http server the source names in so many words.
    return {"AWS_ENDPOINT_URL": endpoint} | ({"AWS_ALLOW_HTTP": "true"} if endpoint.startswith("http://") else {})


def arrow(rows: pl.DataFrame) -> pa.Table:
    """Arrow as every reader knows it: one chunk, no dictionaries, no string views."""
    return (
        rows.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)).to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    )
