"""Entries of an event stream as rows, with the unreadable ones set aside whole.

Belongs here: taking an entry apart. Does not belong here: talking to the stream (`mlplatform.clients.stream`) or deciding
which entries are stored already (`mlplatform.ingestion.arrival`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
import polars as pl

from mlplatform.ingestion.cast import TIMESTAMP, cast_records
from mlplatform.records import DayRange
from mlplatform.specs import Contract

FIELD = "event"
PAYLOAD_LENGTH = 4096
SLICE = 100_000  # entries taken apart at a time: as Python objects they need ten times the room of their rows
MALFORMED_SCHEMA = pl.Schema({"stream_id": pl.String(), "payload": pl.String(), "error": pl.String(), "received_at": TIMESTAMP})


@dataclass(frozen=True)
class StreamBatch:
    """What a batch of entries holds: every entry is in exactly one of the two frames.

    `rows`: the contract's columns, `received_at`, `stream_id`. `malformed`: `stream_id`, `payload` (text, at most
    PAYLOAD_LENGTH characters and a note of the rest), `error`, `received_at`. `last_id`: the highest id, None for no entry.
    """

    rows: pl.DataFrame
    malformed: pl.DataFrame
    last_id: str | None
    dropped: tuple[str, ...] = ()


def parse(
    entries: Sequence[tuple[str, Mapping[str, bytes]]],
    contract: Contract,
    received_at: datetime,
    within: tuple[str, DayRange] | None = None,
) -> StreamBatch:
    """Entries in stream order → rows and malformed entries. Never raises because of an entry's content.

    Malformed: no field `event`, no JSON object, a column of another type, a column that may not be null absent, entries
    that the stream was trimmed of before they were read (no fields), and with `within` (time column, days) entries whose
    time lies on another day: no partition would ever hold them.
    """
    parts = [_parse_slice(entries[start : start + SLICE], contract, received_at, within) for start in range(0, max(len(entries), 1), SLICE)]
    return StreamBatch(
        rows=pl.concat(part.rows for part in parts),
        malformed=pl.concat(part.malformed for part in parts),
        last_id=entries[-1][0] if entries else None,
        dropped=tuple(sorted({name for part in parts for name in part.dropped})),
    )


def _parse_slice(
    entries: Sequence[tuple[str, Mapping[str, bytes]]], contract: Contract, received_at: datetime, within: tuple[str, DayRange] | None
) -> StreamBatch:
    ids: list[str] = []
    events: list[dict[str, Any]] = []
    payloads: list[bytes] = []
    unread: list[tuple[str, str, str]] = []
    for entry_id, fields in entries:
        event = _event(fields)
        if isinstance(event, dict):
            ids.append(entry_id)
            events.append(event)
            payloads.append(fields[FIELD])
        else:
            unread.append((entry_id, *event))
    records = cast_records(events, contract)
    faults = {**(_other_days(records.rows, *within) if within else {}), **records.faults}
    unread += [(ids[i], _readable(payloads[i]), fault) for i, fault in faults.items()]
    stamped = records.rows.with_columns(pl.lit(received_at, TIMESTAMP).alias("received_at"), pl.Series("stream_id", ids, dtype=pl.String))
    readable = pl.Series([True] * len(ids), dtype=pl.Boolean).scatter(list(faults), False)
    return StreamBatch(stamped.filter(readable), _malformed(unread, received_at), None, records.dropped)


def _other_days(rows: pl.DataFrame, time_column: str, days: DayRange) -> dict[int, str]:
    """Positions of the rows whose time lies on none of `days`, and why that is a fault."""
    day = pl.col(time_column).dt.date()
    strays = rows.select(pl.int_range(pl.len()).alias("at"), day.alias("day")).filter(~pl.col("day").is_between(days.first, days.last))
    return {at: f"{time_column} is on {stray}, outside the days {days.first} … {days.last}" for at, stray in strays.iter_rows()}


def _event(fields: Mapping[str, bytes]) -> dict[str, Any] | tuple[str, str]:
    """The entry's JSON object; or what can be shown of it, and why it is none."""
    payload = fields.get(FIELD)
    if payload is None:
        return _without_event(fields)
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        return _readable(payload), f"not JSON: {error}"
    return event if isinstance(event, dict) else (_readable(payload), f"not a JSON object but {type(event).__name__}")


def _malformed(unread: list[tuple[str, str, str]], received_at: datetime) -> pl.DataFrame:
    stamped = [(*entry, received_at) for entry in unread]
    return pl.DataFrame(stamped, schema=MALFORMED_SCHEMA, orient="row")


def _without_event(fields: Mapping[str, bytes]) -> tuple[str, str]:
    if not fields:
        return "", "the stream was trimmed before this entry was read: lengthen its retention"
    text = {name: value.decode(errors="replace") for name, value in fields.items()}
    return _bounded(orjson.dumps(text).decode()), f"has no field '{FIELD}'"


def _readable(payload: bytes) -> str:
    return _bounded(payload.decode(errors="replace"))


def _bounded(text: str) -> str:
    # NUL is legal in a Delta table, but ends a text, or breaks it, for much that reads one.
    clean = text.replace("\x00", "�")
    return clean if len(clean) <= PAYLOAD_LENGTH else f"{clean[:PAYLOAD_LENGTH]}… ({len(clean)} characters)"
