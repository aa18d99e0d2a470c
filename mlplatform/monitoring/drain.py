"""From entries of the prediction log to rows of `predictions/<model>`.

Belongs here: reading entries, telling new ones from old, setting unreadable ones aside. Does not belong here: the stream
or the table.

How a drain is exactly once. Each of the two tables (predictions, set aside) is appended under a Delta application
transaction whose number is `position(last stream id)`; the next drain starts after it. The number is in the table's own
snapshot, so it is there if and only if the rows are, and it outlives the cleaning of the commit log. The stream may be
trimmed up to the smaller of the two positions, never before both commits are done. The service may write a record twice
(its retry of a write whose answer was lost): `request_id`, `input_index` and `variant` tell, within a drain and against what is `stored`
(a shadow's record stands beside the answer's under the same request).

Why features are a list. Versions of a model differ in features, and a column per feature would change the table's schema
at every change of the model. A row keeps the vector exactly as the model saw it, in the order of the contract that
`contract_digest` names; `with_feature_columns` spreads it into named columns for whoever needs them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from math import isfinite
from typing import Any

import polars as pl
from pydantic import ValidationError

from mlplatform.contracts import PredictionRecord, moment_of, read_records, record_count, record_lines
from mlplatform.specs import RequestField

UTC_US = pl.Datetime("us", "UTC")
Key = tuple[str, int, str]  # request_id, input_index, variant
_DTYPES: Mapping[str, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "float": pl.Float64(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "timestamp": UTC_US,
}

PREDICTIONS = pl.Schema(
    {
        "request_id": pl.String,
        "input_index": pl.Int64,
        "requested_at": UTC_US,
        "event_date": pl.Date,
        "model": pl.String,
        "version": pl.Int64,
        "variant": pl.String,
        "inputs": pl.String,
        "features": pl.List(pl.Float64),
        "feature_ages_s": pl.List(pl.Struct({"view": pl.String, "age_s": pl.Float64})),
        "imputed": pl.List(pl.String),
        "prediction": pl.Float64,
        "latency_ms": pl.Float64,
        "stream_id": pl.String,
        "contract_digest": pl.String,
        # Later columns of the table: rows stored before have null there.
        "shortfalls": pl.List(pl.Struct({"view": pl.String, "reason": pl.String})),
        "given": pl.List(pl.String),
        "code_version": pl.String,
        "quantiles": pl.List(pl.Float64),
    }
)
SET_ASIDE = pl.Schema({"stream_id": pl.String, "received_at": UTC_US, "event_date": pl.Date, "payload": pl.String, "error": pl.String})

_SEQUENCE_BITS = 20


@dataclass(frozen=True)
class Entry:
    """One entry of the stream: its id (`<milliseconds>-<number>`) and its field `record`, None where it lacks it."""

    stream_id: str
    record: str | bytes | None

    def lines(self) -> Sequence[str | bytes | None]:
        """Its lines, of which there is one at least, each with one record or more."""
        if isinstance(self.record, bytes):
            return record_lines(self.record)
        return [None] if self.record is None else record_lines(self.record)

    def count(self) -> int:
        """How many records it says it holds."""
        return sum(1 if line is None else record_count(line) for line in self.lines())


@dataclass(frozen=True)
class Drained:
    """Row accounting: `records == predictions.height + set_aside.height + already + repeated`.

    `already`: records of entries an earlier drain has committed, or that stand here twice under one id. `repeated`: records the
    service wrote a second time under another id. `last_stream_id` is of all entries read, None where there were none.
    """

    predictions: pl.DataFrame
    set_aside: pl.DataFrame
    records: int
    already: int
    repeated: int
    last_stream_id: str | None


def drain(
    entries: Iterable[Entry],
    *,
    model: str,
    fields: Sequence[RequestField],
    received_at: datetime,
    after: int = -1,
    set_aside_after: int = -1,
    stored: Callable[[Collection[date]], Collection[Key]] = lambda _: frozenset(),
    prediction_range: tuple[float, float] = (0.0, 1.0),
) -> Drained:
    """The new predictions and the new unreadable records, each beyond the last `position` its table has committed.

    `predictions` has the schema PREDICTIONS and then a column per field of `fields` (`input_column(field.name)`): name
    those the rows are keyed and sliced by. A field the request did not carry is null.
    `stored` gives the (request_id, input_index, variant) that the table has already of certain days, those of the records at hand: a
    record that lay on the service's disk may come days after the one it repeats.
    `set_aside` has the schema SET_ASIDE: lines of an entry that hold no records, each as one; and records that are of another model, whose
    prediction is not a number within `prediction_range`, or whose time or fields cannot be read. An error never stops the others.
    Raises ValueError for a stream id no Redis stream would give.
    """
    read: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    ids: set[str] = set()
    keys: set[Key] = set()
    total, repeated, last = 0, 0, -1
    for entry in entries:
        at = position(entry.stream_id)
        last = max(last, at)
        if entry.stream_id in ids or at <= min(after, set_aside_after):
            total += entry.count()
            continue
        ids.add(entry.stream_id)
        for line in entry.lines():
            try:
                records = _records(line)
            except ValueError as error:
                total += 1
                if at > set_aside_after:
                    rejected.append(_rejected(entry.stream_id, line, received_at, error))
                continue
            total += len(records)
            for record in records:
                try:
                    row = _row(entry.stream_id, record, model, fields, prediction_range)
                except (ValueError, OverflowError) as error:  # OverflowError: a number or a date no column can hold
                    if at > set_aside_after:
                        rejected.append(_rejected(entry.stream_id, record.model_dump_json(), received_at, error))
                    continue
                if at <= after:
                    continue
                if _key(row) in keys:
                    repeated += 1
                    continue
                keys.add(_key(row))
                read.append(row)
    already_there = stored({row["event_date"] for row in read}) if read else frozenset()
    fresh = [row for row in read if _key(row) not in already_there]
    repeated += len(read) - len(fresh)
    return Drained(
        predictions=pl.DataFrame(fresh, schema=predictions_schema(fields)),
        set_aside=pl.DataFrame(rejected, schema=SET_ASIDE),
        records=total,
        already=total - len(fresh) - len(rejected) - repeated,
        repeated=repeated,
        last_stream_id=stream_id_at(last) if last >= 0 else None,
    )


def predictions_schema(fields: Sequence[RequestField]) -> pl.Schema:
    """The schema of `predictions/<model>` for a model keyed and sliced by these request fields."""
    return pl.Schema({**PREDICTIONS, **{input_column(f.name): _DTYPES[f.dtype] for f in fields}})


def given(predictions: pl.DataFrame) -> pl.Series:
    """For each row the features that stood in the request, in no order that counts; none in rows stored before records said so."""
    empty = pl.lit([], dtype=pl.List(pl.String))
    return predictions.select((pl.col("given").fill_null(empty) if "given" in predictions.columns else empty).alias("given"))["given"]


def input_column(name: str) -> str:
    """The column of a request field: its own name, or `input_<name>` where a column of the log has that name already."""
    return f"input_{name}" if name in PREDICTIONS else name


def position(stream_id: str) -> int:
    """A number that grows with the stream id and fits a Delta transaction (63 bits). Raises ValueError beyond that."""
    milliseconds, _, number = stream_id.partition("-")
    # str.isdigit takes digits of other scripts too, which int() would read.
    if not (stream_id.isascii() and milliseconds.isdigit() and number.isdigit()):
        raise ValueError(f"'{stream_id}' is not a stream id")
    if int(number) >> _SEQUENCE_BITS or int(milliseconds) >> (63 - _SEQUENCE_BITS):
        raise ValueError(
            f"stream id '{stream_id}' is out of range: more than {1 << _SEQUENCE_BITS} entries in a millisecond, or a time after 2248"
        )
    return int(milliseconds) << _SEQUENCE_BITS | int(number)


def stream_id_at(at: int) -> str:
    """The stream id of a `position`; what a read starts after. `0-0`, the start of the stream, for -1."""
    return "0-0" if at < 0 else f"{at >> _SEQUENCE_BITS}-{at & ((1 << _SEQUENCE_BITS) - 1)}"


def with_feature_columns(predictions: pl.DataFrame, features: Mapping[str, Sequence[str]]) -> pl.DataFrame:
    """The predictions with a Float64 column per feature, by each row's own contract.

    `features` maps contract digests to feature names in the contract's order; the columns are the union of the names,
    null where a row's contract lacks the feature, in place of the column `features`. Rows keep their order. Raises
    ValueError for a digest that is not in the mapping, for a vector of the wrong length, and for a feature named like a
    column that is there already (rename or drop that first).
    """
    unknown = set(predictions["contract_digest"].unique()) - set(features)
    if unknown:
        raise ValueError(f"no feature names are known for contracts {sorted(unknown)}")
    names = list(dict.fromkeys(name for digest in features for name in features[digest]))
    if taken := set(names) & set(predictions.columns):
        raise ValueError(f"features have the names of other columns: {sorted(taken)}")
    lengths = predictions.group_by("contract_digest").agg(pl.col("features").list.len().unique())
    for digest, found in lengths.iter_rows():
        if found != [len(features[digest])]:
            raise ValueError(f"contract {digest} has {len(features[digest])} features, its predictions have {sorted(found)}")
    return predictions.with_columns(_feature(name, features).alias(name) for name in names).drop("features")


def _feature(name: str, features: Mapping[str, Sequence[str]]) -> pl.Expr:
    value = pl.lit(None, dtype=pl.Float64)
    for digest, order in features.items():
        if name in order:
            here = pl.col("features").list.get(list(order).index(name), null_on_oob=True)
            value = pl.when(pl.col("contract_digest") == digest).then(here).otherwise(value)
    return value


def _key(row: Mapping[str, Any]) -> Key:
    return row["request_id"], row["input_index"], row["variant"]


def _records(line: str | bytes | None) -> Sequence[PredictionRecord]:
    if line is None:
        raise ValueError("the entry has no field 'record'")
    return read_records(line)


def _row(
    stream_id: str, record: PredictionRecord, model: str, fields: Sequence[RequestField], prediction_range: tuple[float, float]
) -> dict[str, Any]:
    if record.model != model:
        raise ValueError(f"a record of model '{record.model}' in the log of '{model}'")
    low, high = prediction_range
    for answer in (record.prediction, *(record.quantiles or ())):
        if not (isfinite(answer) and low <= answer <= high):
            raise ValueError(f"prediction {answer} is not between {low} and {high}")
    requested_at = _timestamp(record.requested_at)
    for number in (record.version, record.input_index):
        _int64(number)
    row: dict[str, Any] = record.model_dump(exclude={"inputs", "feature_ages_s", "shortfalls", "requested_at"})
    row |= {input_column(f.name): _typed(f, record.inputs.get(f.name)) for f in fields}
    return row | {
        "requested_at": requested_at,
        "event_date": requested_at.date(),
        "inputs": record.model_dump_json(include={"inputs"})[len('{"inputs":') : -1],
        "feature_ages_s": [{"view": view, "age_s": age} for view, age in record.feature_ages_s.items()],
        "shortfalls": [{"view": view, "reason": reason} for view, reason in record.shortfalls.items()],
        "stream_id": stream_id,
    }


def _rejected(stream_id: str, line: str | bytes | None, received_at: datetime, error: Exception) -> dict[str, Any]:
    at = received_at.astimezone(UTC)
    payload = line.decode(errors="backslashreplace") if isinstance(line, bytes) else line
    return {"stream_id": stream_id, "received_at": at, "event_date": at.date(), "payload": payload, "error": _one_line(error)}


def _typed(field: RequestField, value: object) -> object:
    """The request's JSON value as the field's type. Raises ValueError where it is of another type."""
    if value is None:
        return None
    accepted, convert = _READERS[field.dtype]
    # To Python, True is an int; to JSON it is not.
    if not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool):
        raise ValueError(f"input '{field.name}' is no {field.dtype}: {value!r}")
    return convert(value)


def _int64(value: float) -> int:
    if value != int(value) or not -_INT64 <= value < _INT64:
        raise ValueError(f"{value!r} is no 64-bit integer")
    return int(value)


def _timestamp(text: str) -> datetime:
    moment = moment_of(text)
    if moment.tzinfo is None:
        raise ValueError(f"time '{text}' has no zone")
    return moment.astimezone(UTC)


_INT64 = 2**63
_READERS: Mapping[str, tuple[Any, Callable[[Any], object]]] = {
    "string": (str, str),
    "bool": (bool, bool),
    "int": (int | float, _int64),
    "float": (int | float, float),
    "date": (str, date.fromisoformat),
    "timestamp": (str, _timestamp),
}


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in error.errors(include_input=False, include_url=False)
        )
    return str(error)
