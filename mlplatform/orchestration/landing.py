"""From a source to its raw table: one function per kind of reader, each safe to repeat.

Belongs here: the order of reading, committing and acknowledging. Does not belong here: protocols (room `ingestion`).
"""

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

import polars as pl

from mlplatform.ingestion.arrival import check_days, stamp, stream_id_of, stream_order, transaction_number, unseen
from mlplatform.ingestion.files import read_files
from mlplatform.ingestion.http import read_window
from mlplatform.ingestion.sql import read_table
from mlplatform.ingestion.stream import StreamBatch, parse
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange
from mlplatform.specs import FileReader, HttpReader, SourceSpec, SqlReader, StreamReader

CONSUMER = "raw"  # one consumer name: a run that follows a killed one finds its entries as its own pending ones
STREAM_BATCH = 200_000  # entries a commit; more follow in the same run


@dataclass(frozen=True)
class Landed:
    """What reached the raw table. `days` are those whose rows changed; `notes` is for people."""

    rows: int
    days: DayRange | None = None
    unreadable: int = 0
    notes: dict[str, str] = field(default_factory=dict)


def land(clients: Clients, spec: SourceSpec, days: DayRange | None, run_id: str, every_day: DayRange | None = None) -> Landed:
    """Reads the source for `days` (None for a source without days) into its raw table. Raises ingestion.errors.SourceError.

    A stream brings what it holds, of whatever day; an event outside `every_day`, the days there are partitions for, is
    unreadable.
    """
    reader = spec.reader
    match reader:
        case SqlReader():
            rows = read_table(reader, clients.settings.connection(reader.connection), spec.contract).rows
            return _replace(clients, spec, rows, days, run_id)
        case HttpReader():
            return _land_window(clients, spec, reader, days, run_id)
        case FileReader():
            root = clients.settings.connection(reader.connection)
            rows = read_files(reader, root, spec.contract, days, clients.settings.storage_options(root)).rows
            return _replace(clients, spec, rows, days, run_id)
        case StreamReader():
            if days is None or spec.time_column is None:
                raise ValueError(f"source {spec.name}: a stream needs a time_column")
            archived = _land_archive(clients, spec, reader, days, run_id)
            return _merge(archived, *_drain(clients, spec, reader, days, run_id, every_day))


def _land_window(clients: Clients, spec: SourceSpec, reader: HttpReader, days: DayRange | None, run_id: str) -> Landed:
    if days is None:
        raise ValueError(f"source {spec.name}: an API read by windows needs a time_column")
    start = datetime.combine(days.first, time.min, UTC)
    end = min(datetime.combine(days.last + timedelta(days=1), time.min, UTC), clients.clock.now())
    if end <= start:
        return Landed(0)
    rows = read_window(reader, clients.settings.connection(reader.connection), spec.contract, start, end).rows
    return _replace(clients, spec, rows, days, run_id)


def _replace(clients: Clients, spec: SourceSpec, rows: pl.DataFrame, days: DayRange | None, run_id: str) -> Landed:
    stamped = stamp(rows, clients.clock.now(), spec.time_column, days)
    if days is not None and spec.time_column is not None:
        check_days(stamped, days, spec.time_column, spec.name)
    clients.lake.replace(("raw", spec.name), _with_payload(stamped), days, {"run_id": run_id})
    return Landed(rows.height, days)


def _land_archive(clients: Clients, spec: SourceSpec, reader: StreamReader, days: DayRange, run_id: str) -> Landed:
    """Days of the archive replace what the archive gave before; what the stream brought for those days stays."""
    if reader.archive is None:
        return Landed(0)
    root = clients.settings.connection(reader.archive.connection)
    reading = read_files(reader.archive, root, spec.contract, days, clients.settings.storage_options(root))
    if not reading.days:
        return Landed(0)
    there = DayRange(min(reading.days), max(reading.days))
    stamped = _with_payload(stamp(reading.rows, clients.clock.now(), spec.time_column))
    key = ("raw", spec.name)
    check_days(stamped, there, spec.time_column or "", spec.name)
    if clients.lake.exists(key):
        # What the stream brought for those days stays, and so does a day within the span whose file is gone.
        kept = (pl.col("stream_id") != "") | ~pl.col("event_date").is_in(list(reading.days))
        stamped = pl.concat([stamped, clients.lake.read(key, there).filter(kept).select(stamped.columns)])
    clients.lake.replace(key, stamped, there, {"run_id": run_id})
    return Landed(reading.rows.height, there)


def _drain(
    clients: Clients, spec: SourceSpec, reader: StreamReader, days: DayRange, run_id: str, every_day: DayRange | None
) -> list[Landed]:
    """What the stream holds now, batch by batch: commit to Delta with the last id, then acknowledge.

    What comes meanwhile is for the next run: under a steady flow a stream has no end.
    """
    landed: list[Landed] = []
    within = (spec.time_column, every_day) if spec.time_column and every_day else None
    key, application = ("raw", spec.name), f"stream:{reader.stream}"
    with clients.source_streams(reader.connection) as client:
        newest = client.last_id(reader.stream)
        while entries := client.read(reader.stream, reader.group, CONSUMER, STREAM_BATCH):
            committed = stream_id_of(clients.lake.transaction(key, application))
            batch = unseen(parse(entries, spec.contract, clients.clock.now(), within), committed, committed)
            rows = _stream_rows(batch, spec, clients.clock.now(), days)
            if rows.height and batch.last_id is not None:
                number = transaction_number(batch.last_id)
                clients.lake.append(key, rows, transaction=(application, number), metadata={"run_id": run_id})
            client.ack(reader.stream, reader.group, [entry_id for entry_id, _ in entries])
            landed.append(Landed(batch.rows.height, _days_of(rows), batch.malformed.height, _faults(batch)))
            if newest is None or stream_order(entries[-1][0]) >= stream_order(newest):
                break
    if not clients.lake.exists(key):
        # The stream was read and holds nothing: that is an empty table, not a missing one.
        nothing = parse([], spec.contract, clients.clock.now())
        clients.lake.append(key, _stream_rows(nothing, spec, clients.clock.now(), days), metadata={"run_id": run_id})
    return landed


def _stream_rows(batch: StreamBatch, spec: SourceSpec, now: datetime, days: DayRange) -> pl.DataFrame:
    """Readable and unreadable entries as raw rows; an unreadable one keeps its text in `payload` and lands on today."""
    readable = _with_payload(stamp(batch.rows, now, spec.time_column, days))
    unreadable = stamp(
        batch.malformed.select("payload", "received_at", "stream_id").with_columns(
            pl.lit(None, dtype).alias(name) for name, dtype in batch.rows.schema.items() if name not in ("received_at", "stream_id")
        ),
        now,
        spec.time_column,
        days,
    )
    return pl.concat([readable, unreadable.select(readable.columns)])


def _with_payload(rows: pl.DataFrame) -> pl.DataFrame:
    return rows if "payload" in rows.columns else rows.with_columns(pl.lit(None, pl.String).alias("payload"))


def _days_of(rows: pl.DataFrame) -> DayRange | None:
    first, last = rows["event_date"].min(), rows["event_date"].max()
    return DayRange(first, last) if isinstance(first, date) and isinstance(last, date) else None


def _faults(batch: StreamBatch) -> dict[str, str]:
    return {"first_unreadable": batch.malformed["error"][0]} if batch.malformed.height else {}


def _merge(*parts: Landed) -> Landed:
    touched = [p.days for p in parts if p.days is not None]
    days = DayRange(min(d.first for d in touched), max(d.last for d in touched)) if touched else None
    notes = {name: text for part in parts for name, text in part.notes.items()}
    return Landed(sum(p.rows for p in parts), days, sum(p.unreadable for p in parts), notes)
