"""Feature tables as Feast declares them: reading the needed columns and days, appending, replacing.

Belongs here: Delta (and Parquet, for saved data sets) behind a Feast `FileSource`, local or S3. Does not belong here: joins.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError
from feast.data_format import DeltaFormat, ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource

from mlplatform.feature_store.join import as_utc


class MissingFeatureTableError(LookupError):
    """The view's table has never been written."""


@dataclass(frozen=True)
class FeatureTable:
    """One table: where it is, and which of its columns hold the time and the day (`day` "" = not partitioned by day).

    `day` is only trusted where it is a partition column of the table: it must then be the UTC day of the event time.
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

    def schema(self) -> pl.Schema:
        """Columns as stored, the day partition included."""
        return self._open()[0].collect_schema()

    def read(
        self,
        columns: Iterable[str] | None,
        start: datetime | None = None,
        end: datetime | None = None,
        created_by: tuple[str, datetime] | None = None,
    ) -> pl.DataFrame:
        """`columns` (None: all but the day partition) of the rows with start <= event time <= end.

        `created_by` = (column, time) leaves out rows created later. Files that cannot hold such rows are not opened.
        Raises MissingFeatureTableError, and ValueError for columns the table lacks.
        """
        frame, partitions = self._open()
        schema = frame.collect_schema()
        wanted = [name for name in schema if name != self.day] if columns is None else list(dict.fromkeys(columns))
        if missing := [name for name in wanted if name not in schema]:
            raise ValueError(f"table {self.uri} has no column {', '.join(missing)}; it has {', '.join(schema)}")
        by_day = self.day in partitions
        if start is not None:
            frame = frame.filter(as_utc(self.event, schema) >= start)
            frame = frame.filter(pl.col(self.day) >= start.date()) if by_day else frame
        if end is not None:
            frame = frame.filter(as_utc(self.event, schema) <= end)
            frame = frame.filter(pl.col(self.day) <= end.date()) if by_day else frame
        if created_by is not None:
            frame = frame.filter(as_utc(created_by[0], schema) <= created_by[1])
        return frame.select(wanted).collect()

    def append(self, rows: pl.DataFrame) -> None:
        """Appends rows, the columns of the table in any order. A new Delta table is partitioned by day."""
        if not self.delta:
            raise NotImplementedError(f"table {self.uri}: only Delta tables take appends")
        partitioned = bool(self.day) and (not self.exists() or self.day in self._open()[1])
        if partitioned:
            rows = rows.with_columns(as_utc(self.event, rows.schema).dt.date().alias(self.day))
        write_deltalake(
            self.uri, arrow(rows), mode="append", partition_by=[self.day] if partitioned else None, storage_options=dict(self.options)
        )

    def replace(self, rows: pl.DataFrame) -> None:
        """Writes the whole table anew, in one step for Delta."""
        if self.delta:
            write_deltalake(self.uri, arrow(rows), mode="overwrite", schema_mode="overwrite", storage_options=dict(self.options))
        else:
            rows.write_parquet(self.uri, storage_options=dict(self.options) or None, mkdir=True)

    def _open(self) -> tuple[pl.LazyFrame, list[str]]:
        """The table and its partition columns."""
        if not self.delta:
            return pl.scan_parquet(self.uri, storage_options=dict(self.options) or None), []
        try:
            table = DeltaTable(self.uri, storage_options=dict(self.options))
        except TableNotFoundError as missing:
            raise MissingFeatureTableError(f"feature table {self.uri} does not exist yet: materialize its asset first") from missing
        return pl.scan_delta(table, storage_options=dict(self.options) or None), table.metadata().partition_columns


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
