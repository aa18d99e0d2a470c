"""What became of each prediction: its label, once that is known.

Belongs here: joining predictions with labelled rows, and telling which days a late label restates. Does not belong here:
metrics, tables.

Every prediction has exactly one row in `outcomes/<model>`, in one of three states: `known` (it has a label), `pending` (the
label may still arrive) and `missing` (it should have arrived by now; it is counted, and may still turn into `known`).
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import polars as pl

from mlplatform.monitoring.drain import input_column
from mlplatform.specs import RequestField

KNOWN, PENDING, MISSING = "known", "pending", "missing"
_IDENTITY = ("request_id", "input_index", "variant")
_OUTCOME = ("state", "label", "label_known_at")


def join_outcomes(
    predictions: pl.DataFrame, labelled: pl.DataFrame, row_key: Sequence[str], now: datetime, max_label_delay: timedelta
) -> pl.DataFrame:
    """The predictions with `state`, `label` (Float64, null unless known) and `label_known_at`: same rows, same order.

    `labelled` has the columns of `row_key`, `label` and `label_known_at`. A label counts from the moment it is known: rows
    known after `now`, or with a null label, are not there yet. Of several labels for one key the one known last counts (a
    correction). A prediction waits for `max_label_delay` after it was asked for, then it is missing.
    Raises ValueError where two labels of one key became known at the same moment and differ, or a column is missing.
    """
    keys = [input_column(name) for name in row_key]
    if absent := (set(keys) - set(predictions.columns)) | ({*row_key, "label", "label_known_at"} - set(labelled.columns)):
        raise ValueError(f"outcomes cannot be joined without {sorted(absent)}: a model's row key must be made of its request fields")
    labels = _newest_labels(labelled, row_key, now).select(
        *(pl.col(name).cast(predictions.schema[key]).alias(key) for name, key in zip(row_key, keys, strict=True)),
        pl.col("label").cast(pl.Float64),
        pl.col("label_known_at").dt.cast_time_unit("us"),
    )
    due = pl.col("requested_at") + max_label_delay
    state = pl.when(pl.col("label").is_not_null()).then(pl.lit(KNOWN)).when(due < now).then(pl.lit(MISSING)).otherwise(pl.lit(PENDING))
    joined = predictions.drop(_OUTCOME, strict=False).join(labels, on=keys, how="left", validate="m:1", maintain_order="left")
    return joined.with_columns(state.alias("state")).select(*predictions.drop(_OUTCOME, strict=False).columns, *_OUTCOME)


def outcome_columns(row_key: Sequence[str], slices: Sequence[str], fields: Sequence[RequestField]) -> tuple[RequestField, ...]:
    """The request fields a model's predictions need as columns: those it is keyed and sliced by, in declared order.

    A slice column that is no request field is left out (nobody sends it). Raises ValueError for a key that is none: the
    answered request could never be found among the labelled rows.
    """
    names = {f.name for f in fields}
    if unknown := set(row_key) - names:
        raise ValueError(f"row key {sorted(unknown)} is not among the request fields: outcomes could not be joined")
    return tuple(f for f in fields if f.name in {*row_key, *slices})


def days_to_rewrite(fresh: pl.DataFrame, stored: pl.DataFrame | None) -> tuple[date, ...]:
    """The partitions (`event_date`, ascending) in which `stored` is not what `fresh` says now.

    Both as `join_outcomes` returns them, over the same days; `stored` None where nothing was ever written. A day differs
    where a prediction is new or gone, or its state, label or the time of it changed.
    """
    if stored is None:
        return tuple(fresh["event_date"].unique().sort())
    columns = ("event_date", *_IDENTITY, *_OUTCOME)
    now, before = fresh.select(columns), stored.select(columns)
    changed = [a.join(b, on=columns, how="anti", nulls_equal=True)["event_date"] for a, b in ((now, before), (before, now))]
    return tuple(pl.concat(changed).unique().sort())


def _newest_labels(labelled: pl.DataFrame, row_key: Sequence[str], now: datetime) -> pl.DataFrame:
    known = labelled.filter(pl.col("label").is_not_null() & (pl.col("label_known_at") <= now.astimezone(UTC)))
    newest = known.filter(pl.col("label_known_at") == pl.col("label_known_at").max().over(row_key)).unique([*row_key, "label"])
    repeated = newest.height - newest.n_unique(list(row_key))
    if repeated:
        raise ValueError(f"{repeated} keys {tuple(row_key)} have two labels known at the same moment")
    return newest
