"""Metrics per value of each slice column: where a model that is good on the whole is not.

Belongs here: cutting test rows into slices and scoring each. Does not belong here: judging the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from numpy.typing import ArrayLike

from mlplatform.evaluation.metrics import auc_interval, checked, ece, mean_interval, row_log_loss, wilson
from mlplatform.evaluation.quantile_metrics import checked as checked_quantiles
from mlplatform.evaluation.quantile_metrics import score_quantiles

SMALL_ROWS = 200
MAX_VALUES = 40


def slice_metrics(
    y: ArrayLike, p: ArrayLike, frame: pl.DataFrame, columns: Sequence[str], small_rows: int = SMALL_ROWS, max_values: int = MAX_VALUES
) -> tuple[Mapping[str, Any], ...]:
    """One mapping per slice, JSON-able (None where a metric cannot be had), largest slice of each column first.

    `frame` has a row per prediction, in order, with the slice `columns`. Keys: column, value (None: the column is null
    there), pooled (0, or how many rare values the slice "(other)" stands for), rows, small (fewer than `small_rows`: read
    with care), base_rate with base_rate_low and _high (Wilson), mean_prediction, auc and log_loss, each with _low and _high, ece.
    Values beyond the `max_values` largest are pooled, so the rows of a column's slices always add up to all rows.
    Raises ValueError where the frame has another number of rows, or lacks a column.
    """
    labels, predictions = checked(y, p)
    return tuple(
        _named(column, value, pooled, rows, small_rows, _binary_numbers(labels[rows], predictions[rows]))
        for column, value, pooled, rows in _cut(frame, columns, len(labels), max_values)
    )


def quantile_slices(
    y: ArrayLike,
    q: ArrayLike,
    levels: Sequence[float],
    frame: pl.DataFrame,
    columns: Sequence[str],
    small_rows: int = SMALL_ROWS,
    max_values: int = MAX_VALUES,
) -> tuple[Mapping[str, Any], ...]:
    """As `slice_metrics`, for quantiles (n, levels) of a label that is a number: mean_label, mean_prediction, mae with mae_low and
    _high, pinball with pinball_low and _high, coverage with coverage_low and _high, width."""
    labels, quantiles = checked_quantiles(y, q, levels)
    with_interval = ("mae", "pinball", "coverage")
    bounds = (f"{name}{side}" for name in with_interval for side in ("", "_low", "_high"))
    names = ("mean_label", "mean_prediction", *bounds, "width")
    found = []
    for column, value, pooled, rows in _cut(frame, columns, len(labels), max_values):
        metrics = score_quantiles(labels[rows], quantiles[rows], levels)
        found.append(_named(column, value, pooled, rows, small_rows, {name: metrics[name] for name in names}))
    return tuple(found)


def _cut(
    frame: pl.DataFrame, columns: Sequence[str], expected: int, max_values: int
) -> Iterator[tuple[str, str | None, int, npt.NDArray[Any]]]:
    """(column, value, rare values pooled in it, its rows' places) of each slice."""
    if frame.height != expected:
        raise ValueError(f"{frame.height} rows of slice columns for {expected} predictions")
    if missing := set(columns) - set(frame.columns):
        raise ValueError(f"slice columns missing from the test rows: {sorted(missing)}")
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
            yield column, value, 0, np.asarray(rows)
        if rest := groups.slice(kept).height:
            yield column, "(other)", rest, groups.slice(kept)["row"].explode().to_numpy()


def _named(
    column: str, value: str | None, pooled: int, rows: npt.NDArray[Any], small_rows: int, numbers: Mapping[str, float]
) -> Mapping[str, Any]:
    return {"column": column, "value": value, "pooled": pooled, "rows": len(rows), "small": len(rows) < small_rows} | {
        name: float(number) if np.isfinite(number) else None for name, number in numbers.items()
    }


def _binary_numbers(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    low, high = wilson(y.sum(), len(y))
    area, area_low, area_high = auc_interval(y, p)
    loss, loss_low, loss_high = mean_interval(row_log_loss(y, p))
    return {
        "base_rate": y.mean(),
        "base_rate_low": low,
        "base_rate_high": high,
        "mean_prediction": p.mean(),
        "auc": area,
        "auc_low": area_low,
        "auc_high": area_high,
        "log_loss": loss,
        "log_loss_low": loss_low,
        "log_loss_high": loss_high,
        "ece": ece(y, p),
    }
