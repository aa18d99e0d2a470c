"""Metrics per value of each slice column: where a model that is good on the whole is not.

Belongs here: cutting test rows into slices and scoring each. Does not belong here: judging the result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from mlplatform.evaluation.metrics import auc_interval, checked, ece, log_loss, wilson

SMALL_ROWS = 200
MAX_VALUES = 40


def slice_metrics(
    y: ArrayLike, p: ArrayLike, frame: pl.DataFrame, columns: Sequence[str], small_rows: int = SMALL_ROWS, max_values: int = MAX_VALUES
) -> tuple[Mapping[str, Any], ...]:
    """One mapping per slice, JSON-able (None where a metric cannot be had), largest slice of each column first.

    `frame` has a row per prediction, in order, with the slice `columns`. Keys: column, value (None: the column is null
    there), pooled (0, or how many rare values the slice "(other)" stands for), rows, small (fewer than `small_rows`: read
    with care), base_rate with base_rate_low and _high (Wilson), mean_prediction, auc with auc_low and _high, log_loss, ece.
    Values beyond the `max_values` largest are pooled, so the rows of a column's slices always add up to all rows.
    Raises ValueError where the frame has another number of rows, or lacks a column.
    """
    labels, predictions = checked(y, p)
    if frame.height != len(labels):
        raise ValueError(f"{frame.height} rows of slice columns for {len(labels)} predictions")
    if missing := set(columns) - set(frame.columns):
        raise ValueError(f"slice columns missing from the test rows: {sorted(missing)}")
    found: list[Mapping[str, Any]] = []
    for column in columns:
        groups = (
            frame.select(pl.col(column).cast(pl.String).alias("value"))
            .with_row_index("row")
            .group_by("value", maintain_order=True)
            .agg("row")
            .sort(pl.col("row").list.len(), "value", descending=[True, False])
        )
        kept = max_values if groups.height <= max_values else max_values - 1
        for value, rows in groups.head(kept).iter_rows():
            found.append(_slice(column, value, 0, labels, predictions, np.asarray(rows), small_rows))
        if rest := groups.slice(kept).height:
            rows = groups.slice(kept)["row"].explode().to_numpy()
            found.append(_slice(column, "(other)", rest, labels, predictions, rows, small_rows))
    return tuple(found)


def _slice(
    column: str, value: str | None, pooled: int, labels: np.ndarray, predictions: np.ndarray, rows: np.ndarray, small_rows: int
) -> Mapping[str, Any]:
    y, p = labels[rows], predictions[rows]
    low, high = wilson(y.sum(), len(y))
    area, area_low, area_high = auc_interval(y, p)
    numbers = {
        "base_rate": y.mean(),
        "base_rate_low": low,
        "base_rate_high": high,
        "mean_prediction": p.mean(),
        "auc": area,
        "auc_low": area_low,
        "auc_high": area_high,
        "log_loss": log_loss(y, p),
        "ece": ece(y, p),
    }
    return {"column": column, "value": value, "pooled": pooled, "rows": len(y), "small": len(y) < small_rows} | {
        name: float(number) if np.isfinite(number) else None for name, number in numbers.items()
    }
