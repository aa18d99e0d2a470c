"""The point-in-time join: which stored row of a view was the newest one known at each question's time.

Belongs here: the join over two Polars frames. Does not belong here: reading tables, Feast, names of features.

A stored row can be used from the moment it is both known and made available, `max(event time, created)`. At T the usable
row with the greatest (event time, created) counts. That is no plain as-of join: the row that became available last may
be an older one that came late. But a row that finds a greater one already available never counts at any T, because
what is available stays so. With these rows left out, the rest stand in the same order by availability and by (event time,
created), and an as-of join on availability is exact.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import polars as pl

TIME = pl.Datetime("us", "UTC")

# Columns of the narrow frames below; join keys become __k0, __k1, …
_AT = "__at"
_EVENT = "__event"
_CREATED = "__created"
_USABLE = "__usable"
_ROW = "__row"
_RANK = "__rank"


class JoinKeyTypeError(TypeError):
    """A join key has types on both sides that cannot be compared."""


def latest_known(
    questions: pl.DataFrame,
    rows: pl.DataFrame,
    *,
    on: Mapping[str, str],
    at: str,
    event: str,
    created: str | None,
    ttl: timedelta | None = None,
    later_corrections: bool = False,
) -> pl.Series:
    """For each question the position of its row in `rows`, UInt32 of the length and order of `questions`; null where none.

    `on` maps each join key's column in `questions` to that in `rows` (empty for a view without entities). The row is the
    newest by (event, created) with event <= at and, unless `later_corrections`, created <= at; null where at - event > ttl
    (ttl None or 0: never expires). Null join keys match nothing. Of rows equal in key, event and created the last one counts.
    Timestamps without a zone are UTC. Raises JoinKeyTypeError; ValueError for a question without a time.
    """
    left, right, keys = _narrow(questions, rows, on, at, event, created)
    right = _usable_rows(right, keys, later_corrections or created is None)
    in_order = left.get_column(_AT).is_sorted()
    # Stated once, because Polars cannot check order within groups (and would warn about that).
    found = (left if in_order else left.sort(_AT)).join_asof(
        right.select(*keys, _USABLE, _EVENT, pl.col(_ROW).alias("__match")),
        left_on=_AT,
        right_on=_USABLE,
        by=keys or None,
        strategy="backward",
        check_sortedness=False,
    )
    match = pl.col("__match")
    if ttl:
        match = pl.when(pl.col(_AT) - pl.col(_EVENT) <= ttl).then(match)
    found = found.select(_ROW, match.alias("__match"))
    return (found if in_order else found.sort(_ROW)).get_column("__match")


def newest(rows: pl.DataFrame, *, keys: Sequence[str], event: str, created: str | None) -> pl.DataFrame:
    """One row per entity: the greatest by (event, created), the last of equal ones. Rows with a null key are left out."""
    order = [event] if created is None else [event, created]
    kept = rows.drop_nulls(list(keys)) if keys else rows
    kept = kept.sort(order, maintain_order=True)
    return kept.unique(subset=list(keys), keep="last", maintain_order=True) if keys else kept.tail(1)


def as_utc(name: str, schema: pl.Schema) -> pl.Expr:
    """A timestamp column in UTC, microseconds; a column without a zone is UTC. Raises TypeError for other types."""
    kind = schema[name]
    if not isinstance(kind, pl.Datetime):
        raise TypeError(f"column {name} is {kind}, not a timestamp")
    if kind == TIME:
        return pl.col(name)  # untouched, so that a scan can skip files by it
    column = pl.col(name).dt.replace_time_zone("UTC") if kind.time_zone is None else pl.col(name).dt.convert_time_zone("UTC")
    return column.dt.cast_time_unit("us")


def _narrow(
    questions: pl.DataFrame, rows: pl.DataFrame, on: Mapping[str, str], at: str, event: str, created: str | None
) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    """Both sides reduced to keys, times and row number, under names that cannot meet a caller's."""
    keys = [f"__k{i}" for i in range(len(on))]
    pairs = list(zip(keys, on.items(), strict=True))
    left = questions.select(as_utc(at, questions.schema).alias(_AT), *(pl.col(mine).alias(k) for k, (mine, _) in pairs)).with_row_index(
        _ROW
    )
    right = rows.select(
        as_utc(event, rows.schema).alias(_EVENT),
        as_utc(created or event, rows.schema).alias(_CREATED),
        *(pl.col(theirs).alias(k) for k, (_, theirs) in pairs),
    ).with_row_index(_ROW)
    if left.get_column(_AT).has_nulls():
        raise ValueError(f"column {at} has nulls: a row without a time has no features")
    for key, (mine, theirs) in pairs:
        kind = common_key_type(left.schema[key], right.schema[key], mine, theirs)
        left, right = (side.with_columns(_key_as(kind, side.schema[key], key)) for side in (left, right))
    # Null equals null in a `by` group; here an unknown key matches nothing.
    return left, right.drop_nulls([*keys, _EVENT, _CREATED]), keys


def common_key_type(left: pl.DataType, right: pl.DataType, mine: str, theirs: str) -> pl.DataType:
    """Int64 or String: the type both sides of a join key are compared in. Raises JoinKeyTypeError."""
    families = {_family(left), _family(right)} - {"null"}
    if families <= {"string"}:
        return pl.String()
    if families <= {"int"} or (families <= {"int", "float"} and _family(right) == "int"):
        return pl.Int64()
    raise JoinKeyTypeError(f"join key {mine} is {left}, the view's {theirs} is {right}: they cannot be compared")


def _family(kind: pl.DataType) -> str:
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return "string"
    if kind.is_integer():
        return "int"
    if kind.is_float():
        return "float"
    return "null" if kind == pl.Null else str(kind)


def _key_as(kind: pl.DataType, have: pl.DataType, key: str) -> pl.Expr:
    """pandas turns integers with gaps into floats: NaN is a missing key, and a broken number equals none."""
    if not have.is_float():
        return pl.col(key).cast(kind)
    whole = pl.col(key).fill_nan(None)
    exact = whole.cast(pl.Int64, strict=False)
    return pl.when(exact.cast(pl.Float64) == whole).then(exact).alias(key)


def _usable_rows(right: pl.DataFrame, keys: list[str], later_corrections: bool) -> pl.DataFrame:
    """The rows that count at some T, sorted by `__usable`, the time from which they do."""
    ordered = right.sort(_EVENT, _CREATED, maintain_order=True)
    late = pl.col(_CREATED) > pl.col(_EVENT)
    if later_corrections or not right.select(late.any()).item():
        # Available as soon as known: the last of those with equal event time is the one created last.
        return ordered.with_columns(pl.col(_EVENT).alias(_USABLE))
    ranked = (
        ordered.with_row_index(_RANK).with_columns(pl.max_horizontal(_EVENT, _CREATED).alias(_USABLE)).sort(_USABLE, maintain_order=True)
    )
    if not keys:
        return ranked.filter(pl.col(_RANK) == pl.col(_RANK).cum_max())
    # An entity whose rows all came on time has none to leave out, and there the ranks need not be followed.
    suspects = ranked.join(ranked.filter(late).select(keys), on=keys, how="semi", maintain_order="left")
    overtaken = suspects.filter(pl.col(_RANK) < pl.col(_RANK).cum_max().over(keys))
    return ranked.join(overtaken, on=_RANK, how="anti", maintain_order="left")
