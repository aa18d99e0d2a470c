"""When and whence rows reached the platform, and which of them it has already.

Belongs here: the stamps of a raw row, and the decision that makes a stream's entries arrive exactly once. Does not belong
here: reading a source or writing a table.

Exactly once, although a run may die anywhere between reading and acknowledging: entries are committed to the raw table in
stream order, together with the last id as the table's transaction number, and acknowledged after that. So an entry that
comes again is stored already if and only if its id is not above the committed one:

    committed = stream_id_of(lake.transaction(raw, application))          # None before the first commit
    batch = unseen(parse(client.read(…), contract, now), committed, …)
    lake.append(raw, stamp(batch.rows, …), transaction=(application, transaction_number(batch.last_id)))
    client.ack(stream, group, ids)                                        # of everything read, also what was not new
"""

from dataclasses import replace
from datetime import datetime, timedelta

import polars as pl

from mlplatform.ingestion.cast import TIMESTAMP
from mlplatform.ingestion.errors import SourceNonsenseError, shown
from mlplatform.ingestion.stream import StreamBatch
from mlplatform.records import DayRange
from mlplatform.specs import Catalog

# A Delta transaction number has 63 bits: milliseconds in the upper 42 (until the year 2109), the sequence in the lower 21.
SEQUENCE_BITS = 21


def stamp(rows: pl.DataFrame, received_at: datetime, time_column: str | None = None, days: DayRange | None = None) -> pl.DataFrame:
    """Adds what a raw row has beyond its contract: `received_at`, `stream_id` and, for a partitioned source, `event_date`.

    `received_at` and `stream_id` stay where the reader set them ('' where not from a stream). `event_date` is the UTC day
    of `time_column`; of a row without that time, the day it was received, brought into `days` where they are given, so
    that the row lies in a partition being written and validation finds it.
    """
    known = pl.col("received_at").fill_null(_moment(received_at)) if "received_at" in rows.columns else _moment(received_at)
    stream_id = pl.col("stream_id").fill_null("") if "stream_id" in rows.columns else pl.lit("")
    stamped = rows.with_columns(known.cast(TIMESTAMP).alias("received_at"), stream_id.alias("stream_id"))
    if time_column is None:
        return stamped
    fallback = pl.col("received_at").dt.date()
    if days is not None:
        fallback = fallback.clip(days.first, days.last)
    return stamped.with_columns(pl.coalesce(pl.col(time_column).dt.date(), fallback).alias("event_date"))


def check_days(stamped: pl.DataFrame, days: DayRange, time_column: str, source: str) -> None:
    """Raises SourceNonsenseError where a source that was asked for `days` sent a row of another day."""
    outside = stamped.filter(~pl.col("event_date").is_between(days.first, days.last))
    if not outside.is_empty():
        example = outside.get_column(time_column)[0]
        raise SourceNonsenseError(
            source,
            f"{outside.height} of {stamped.height} rows lie outside {days.first} … {days.last}, such as {time_column} {example}",
            "Mend the source's days: a row must come with the UTC day of its time",
            column=time_column,
            example=shown(example),
        )


def partition_days(catalog: Catalog, now: datetime) -> DayRange:
    """The days that have a partition, or will have one by tomorrow: clocks of sources may be ahead of ours."""
    last = now.date() + timedelta(days=1)
    return DayRange(catalog.start, max(catalog.start, min(last, catalog.end - timedelta(days=1)) if catalog.end else last))


def stream_order(stream_id: str) -> tuple[int, int]:
    """`<ms>-<seq>` as numbers: ids compare numerically, as text "9-0" would come after "10-0"."""
    ms, _, seq = stream_id.partition("-")
    return int(ms), int(seq or 0)


def transaction_number(stream_id: str) -> int:
    """A stream id as one number of 63 bits that orders as the ids do."""
    ms, seq = stream_order(stream_id)
    if seq >> SEQUENCE_BITS or ms >> (63 - SEQUENCE_BITS):
        raise ValueError(f"stream id {stream_id} does not fit: at most {2**SEQUENCE_BITS} entries a millisecond, until the year 2109")
    return (ms << SEQUENCE_BITS) | seq


def stream_id_of(number: int) -> str | None:
    """The id behind a transaction number; None for -1, a table without a commit."""
    return None if number < 0 else f"{number >> SEQUENCE_BITS}-{number & (2**SEQUENCE_BITS - 1)}"


def unseen(batch: StreamBatch, rows_committed: str | None, malformed_committed: str | None) -> StreamBatch:
    """The batch without the entries above which the raw table, and the quarantine, have committed already.

    Each frame goes by its own table's last committed id: a run may have died between the two commits.
    """
    return replace(batch, rows=_above(batch.rows, rows_committed), malformed=_above(batch.malformed, malformed_committed))


def _above(rows: pl.DataFrame, committed: str | None) -> pl.DataFrame:
    if committed is None:
        return rows
    ms, seq = stream_order(committed)
    parts = pl.col("stream_id").str.splitn("-", 2)
    row_ms = parts.struct.field("field_0").cast(pl.UInt64)
    row_seq = parts.struct.field("field_1").cast(pl.UInt64)
    return rows.filter((row_ms > ms) | ((row_ms == ms) & (row_seq > seq)))


def _moment(received_at: datetime) -> pl.Expr:
    return pl.lit(received_at, TIMESTAMP)
