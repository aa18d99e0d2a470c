"""From whatever types a source speaks to the contract's columns and dtypes: strictly, and with the culprit's name.

Belongs here: the one mapping contract dtype → Polars dtype, and every conversion into it. Does not belong here: judging
values that have the right type (nulls where none are allowed, ranges, keys): that is validation's job.

What counts as the right type:

| contract  | typed sources (JSON, SQL, Parquet)                         | text (CSV)                               |
|-----------|------------------------------------------------------------|------------------------------------------|
| string    | text                                                       | as is                                    |
| int       | integers, and floats or decimals without a fraction        | the same, written out                    |
| float     | any number; NaN is a missing value                         | the same, written out                    |
| bool      | booleans, and 0 or 1 from databases                        | true/false, t/f, 1/0 in any case         |
| date      | dates, ISO 8601 dates, timestamps at midnight              | ISO 8601 dates                           |
| timestamp | timestamps, ISO 8601; without a zone it is UTC; dates      | the same                                 |

Text is never read as a number from a typed source: a source that quotes its numbers has changed its mind about their type.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from operator import itemgetter
from typing import Any

import polars as pl

from mlplatform.ingestion.errors import missing_column, shown, wrong_value
from mlplatform.specs import Column, Contract, DType

TIMESTAMP = pl.Datetime("us", "UTC")
DTYPES: Mapping[DType, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "float": pl.Float64(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "timestamp": TIMESTAMP,
}
# What CSV writers put for a missing value; in string columns only the empty field means missing.
NULL_WORDS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")

_MASK = pl.Boolean()


@dataclass(frozen=True)
class Reading:
    """What a reader got: the contract's columns, in its order and dtypes, and what it left out.

    `dropped` names columns the source sends beyond the contract; `days` the days (ISO) that had a file, for file sources.
    """

    rows: pl.DataFrame
    dropped: tuple[str, ...] = ()
    days: tuple[date, ...] = ()


@dataclass(frozen=True)
class Records:
    """JSON objects as a frame. `rows` has one row per object; `faults` tells, by row index, why a row cannot be used."""

    rows: pl.DataFrame
    faults: Mapping[int, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()  # contract columns that no object has
    dropped: tuple[str, ...] = ()


def schema_of(contract: Contract) -> pl.Schema:
    """The Polars schema of a contract's columns, in order."""
    return pl.Schema({column.name: DTYPES[column.dtype] for column in contract.columns})


def empty_rows(contract: Contract) -> pl.DataFrame:
    """No rows, with the contract's columns."""
    return pl.DataFrame(schema=schema_of(contract))


def cast_frame(frame: pl.DataFrame, contract: Contract, source: str, *, text: bool = False, keep: Sequence[Column] = ()) -> pl.DataFrame:
    """The contract's columns of `frame`, then those of `keep` it has. `text` where every column is text (CSV).

    Raises SourceNonsenseError naming the first column that is missing or has a value of another type, with an example.
    """
    columns = [*contract.columns, *(column for column in keep if column.name in frame.columns)]
    for column in columns:
        if column.name not in frame.columns:
            raise missing_column(source, column.name, frame.columns)
    series = []
    for column in columns:
        given = frame.get_column(column.name)
        cast = _cast_text(given, column.dtype) if text else _cast_typed(given, column.dtype)
        bad = cast.is_null() & given.is_not_null()
        if text and column.dtype != "string":
            bad &= ~given.is_in(NULL_WORDS).fill_null(False)
        elif given.dtype.is_float():
            bad &= given.is_not_nan().fill_null(False)
        if bad.any():
            raise wrong_value(source, column.name, column.dtype, _example(given.filter(bad)), int(bad.sum()), len(given))
        series.append(cast)
    return pl.DataFrame(series)


def cast_records(records: Sequence[Mapping[str, Any]], contract: Contract) -> Records:
    """JSON objects → the contract's columns. A fault is told per row, so that one bad object never hides the others.

    An object without a non-nullable column's key has a fault; without a nullable one's it has a null.
    """
    faults: dict[int, str] = {}
    series: list[pl.Series] = []
    absent: list[str] = []
    for column in contract.columns:
        values = _values(records, column.name)
        kinds = set(map(type, values))
        if records and kinds == {_Absent}:
            absent.append(column.name)
        if _Absent in kinds:
            if not column.nullable:
                faults.update((i, f"has no '{column.name}'") for i, v in enumerate(values) if v is _ABSENT and i not in faults)
            values = [None if v is _ABSENT else v for v in values]
            kinds.discard(_Absent)
        if not kinds <= _JSON_KINDS[column.dtype] or (int in kinds and _has_huge(values)):
            values = _only_fitting(values, column, faults)
        cast = _cast_typed(pl.Series(column.name, values, dtype=_JSON_DTYPES[column.dtype], strict=True), column.dtype)
        if column.dtype in ("date", "timestamp"):
            unread = cast.is_null() & pl.Series([v is not None for v in values], dtype=_MASK)
            faults.update((i, _fault(column, values[i])) for i in unread.arg_true().to_list() if i not in faults)
        series.append(cast)
    known = {column.name for column in contract.columns}
    extra = {name for names in {tuple(record) for record in records} for name in names} - known
    return Records(pl.DataFrame(series), faults, tuple(absent), tuple(sorted(extra)))


# --- typed columns ------------------------------------------------------------------------------------------------


def _cast_typed(series: pl.Series, dtype: DType) -> pl.Series:
    """Null where a value does not fit; the caller compares with the nulls that were there before."""
    if series.dtype == DTYPES[dtype] and dtype != "float":
        return series
    if series.dtype == pl.Null:
        return series.cast(DTYPES[dtype])
    return _TYPED[dtype](series)


def _to_string(series: pl.Series) -> pl.Series:
    return series.cast(pl.String) if series.dtype in (pl.String, pl.Categorical, pl.Enum) else _nothing(series, pl.String())


def _to_int(series: pl.Series) -> pl.Series:
    if series.dtype.is_integer():
        return series.cast(pl.Int64, strict=False)
    if series.dtype.is_float() or series.dtype.is_decimal():
        whole = series.cast(pl.Int64, strict=False)
        exact = (whole.cast(series.dtype, strict=False) == series).fill_null(False)
        return _where(exact, whole)
    return _nothing(series, pl.Int64())


def _to_float(series: pl.Series) -> pl.Series:
    return series.cast(pl.Float64, strict=False).fill_nan(None) if series.dtype.is_numeric() else _nothing(series, pl.Float64())


def _to_bool(series: pl.Series) -> pl.Series:
    if series.dtype.is_numeric():
        return _where(((series == 0) | (series == 1)).fill_null(False), series != 0)
    return _nothing(series, _MASK)


def _to_date(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        return series.str.to_date("%Y-%m-%d", strict=False)
    if isinstance(series.dtype, pl.Datetime):
        return _where((series.dt.time() == time()).fill_null(False), series.dt.date())
    return _nothing(series, pl.Date())


def _to_timestamp(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        return _parse_iso8601(series)
    if series.dtype == pl.Date:
        return series.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if isinstance(series.dtype, pl.Datetime):
        # A time without a zone is UTC, here as everywhere in the platform.
        zoned = series.dt.convert_time_zone("UTC") if series.dtype.time_zone else series.dt.replace_time_zone("UTC")
        return _within_calendar(zoned.dt.cast_time_unit("us"))
    return _nothing(series, TIMESTAMP)


_TYPED: Mapping[DType, Callable[[pl.Series], pl.Series]] = {
    "string": _to_string,
    "int": _to_int,
    "float": _to_float,
    "bool": _to_bool,
    "date": _to_date,
    "timestamp": _to_timestamp,
}


def _parse_iso8601(text: pl.Series) -> pl.Series:
    """ISO 8601 → UTC microseconds, null where it is none. The two common forms vectorised, the rarer ones one by one."""
    parsed = _within_calendar(text.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False))
    if (parsed.is_null() & text.is_not_null()).any():
        # Without a zone, and so read as UTC.
        naive = text.str.replace(" ", "T", literal=True).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
        parsed = parsed.zip_with(parsed.is_not_null(), naive.dt.replace_time_zone("UTC"))
    rest = (parsed.is_null() & text.is_not_null()).arg_true()
    if rest.is_empty():
        return parsed
    found = [_one_iso8601(value) for value in text.gather(rest)]
    return parsed.scatter(rest, pl.Series(found, dtype=TIMESTAMP))


def _within_calendar(moments: pl.Series) -> pl.Series:
    """Null outside the years 1 … 9999: Polars counts further, but nothing that reads the table afterwards does."""
    year = moments.dt.year()
    return moments if year.is_between(1, 9999).all() else _where(year.is_between(1, 9999).fill_null(False), moments)


def _one_iso8601(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: year 1 or 9999 shifted across its end
        return None


# --- text columns -------------------------------------------------------------------------------------------------


def _cast_text(series: pl.Series, dtype: DType) -> pl.Series:
    """Null where a value is missing or does not fit."""
    if dtype == "string":
        return series.cast(pl.String)
    text = series.cast(pl.String).str.strip_chars()
    if dtype == "int":
        whole = text.cast(pl.Int64, strict=False)
        rest = whole.is_null() & text.is_not_null()
        # Writers that keep missing integers as floats put "12.0".
        return whole.zip_with(~rest, _to_int(text.cast(pl.Float64, strict=False))) if rest.any() else whole
    if dtype == "float":
        return text.cast(pl.Float64, strict=False).fill_nan(None)
    if dtype == "bool":
        lower = text.str.to_lowercase()
        known = lower.is_in(["true", "t", "1", "false", "f", "0"]).fill_null(False)
        return _where(known, lower.is_in(["true", "t", "1"]))
    return _TYPED[dtype](text.set(text.is_in(NULL_WORDS).fill_null(False), None))


# --- JSON values --------------------------------------------------------------------------------------------------


class _Absent:
    """Stands for a key an object does not have, as opposed to one that is null."""


_ABSENT = _Absent()
_NONE = type(None)
_LEAST, _BEYOND = -(2**63), 2**63  # of a 64-bit integer
_JSON_KINDS: Mapping[DType, set[type]] = {
    "string": {str, _NONE},
    "int": {int, _NONE},
    "float": {int, float, _NONE},
    "bool": {bool, _NONE},
    "date": {str, _NONE},
    "timestamp": {str, _NONE},
}
_JSON_DTYPES: Mapping[DType, pl.DataType] = {**DTYPES, "date": pl.String(), "timestamp": pl.String()}


def _values(records: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    try:
        return list(map(itemgetter(name), records))
    except KeyError:
        return [record.get(name, _ABSENT) for record in records]


def _has_huge(values: Iterable[float | None]) -> bool:
    # Bounds, not `in range(…)`: that looks through the whole range for a float.
    return any(type(v) is int and not _LEAST <= v < _BEYOND for v in values)


def _only_fitting(values: list[Any], column: Column, faults: dict[int, str]) -> list[Any]:
    """The values of the right type; the others become null and a fault of their row."""
    fitting = []
    for i, value in enumerate(values):
        kept = value
        if column.dtype == "int" and type(value) is float and value.is_integer():
            kept = int(value)
        elif column.dtype == "float" and type(value) is int and abs(value) < 2**1023:
            kept = float(value)
        if type(kept) not in _JSON_KINDS[column.dtype] or (type(kept) is int and not _LEAST <= kept < _BEYOND):
            faults.setdefault(i, _fault(column, value))
            kept = None
        fitting.append(kept)
    return fitting


def _fault(column: Column, value: object) -> str:
    return f"'{column.name}' should be {column.dtype}, is {shown(value)}"


def _example(series: pl.Series) -> object:
    # As text where Python's own calendar may not reach.
    return series.cast(pl.String)[0] if series.dtype.is_temporal() else series[0]


def _where(mask: pl.Series, values: pl.Series) -> pl.Series:
    return values.zip_with(mask, pl.Series(values.name, [None], dtype=values.dtype).new_from_index(0, len(values)))


def _nothing(series: pl.Series, dtype: pl.DataType) -> pl.Series:
    return pl.Series(series.name, [None], dtype=dtype).new_from_index(0, len(series))
