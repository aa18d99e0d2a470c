"""Metrics of quantile forecasts of a number, with 95 % intervals where they are cheap.

Belongs here: functions from labels and quantiles to numbers. Does not belong here: thresholds to pass (gates.py), probabilities
(metrics.py).

Everywhere: `y` is a 1-D array of n finite labels, `q` of shape (n, levels) the predicted quantiles at `levels` (ascending, the median
among them). Wrong shapes and infinite labels raise ValueError. A missing prediction (NaN) makes every metric NaN: a gate fails on it.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from mlplatform.evaluation.metrics import Floats, mean_interval, wilson


def checked(y: ArrayLike, q: ArrayLike, levels: Sequence[float]) -> tuple[Floats, Floats]:
    """Both as float64, or ValueError saying what is wrong with them."""
    labels, quantiles = np.asarray(y, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if labels.ndim != 1 or quantiles.shape != (len(labels), len(levels)):
        raise ValueError(f"labels and quantiles must be (n,) and (n, {len(levels)}), not {labels.shape} and {quantiles.shape}")
    if not np.isfinite(labels).all():
        raise ValueError("labels must be finite numbers")
    return labels, quantiles


def row_pinball(y: Floats, q: Floats, levels: Sequence[float]) -> Floats:
    """(n, levels): the pinball loss of each quantile, in the label's unit (R. Koenker and G. Bassett, "Regression Quantiles",
    Econometrica 46, 1978). At the median it is half of the absolute error."""
    error = y[:, None] - q
    level = np.asarray(levels)
    losses: Floats = np.maximum(level * error, (level - 1) * error)
    return losses


def calibration_table(y: ArrayLike, q: ArrayLike, levels: Sequence[float]) -> pl.DataFrame:
    """Per level: `level`, `rows`, `observed` share of labels at or below the quantile, `low` and `high` (Wilson)."""
    labels, quantiles = checked(y, q, levels)
    below = (labels[:, None] <= quantiles).sum(axis=0)
    n = np.full(len(levels), len(labels))
    low, high = wilson(below, n)
    return pl.DataFrame({"level": list(levels), "rows": n, "observed": below / np.maximum(n, 1), "low": low, "high": high})


def score_quantiles(y: ArrayLike, q: ArrayLike, levels: Sequence[float]) -> dict[str, float]:
    """Every metric of these rows, flat: rows, mean_label, mean_prediction (of the median), mae (with `_low`, `_high`), `pinball_p50`
    and so on for each level, pinball (their mean, with `_low`, `_high`), coverage (share of labels between the outer quantiles, with
    `_low`, `_high`), width (mean distance of the outer quantiles), calibration_error (mean over levels of |observed - level|) and
    crossed (share of rows with a quantile below a lower one)."""
    labels, quantiles = checked(y, q, levels)
    n = len(labels)
    losses = row_pinball(labels, quantiles, levels)
    measured = not np.isnan(quantiles).any() and n > 0
    inside = ((labels >= quantiles[:, 0]) & (labels <= quantiles[:, -1])).astype(np.float64)
    covered_low, covered_high = wilson(inside.sum(), n)
    median = quantiles[:, list(levels).index(0.5)]
    metrics: dict[str, float] = {"rows": float(n), "mean_label": _mean(labels), "mean_prediction": _mean(median)}
    for name, values in (("mae", np.abs(labels - median)), ("pinball", losses.mean(axis=1))):
        value, low, high = mean_interval(values)
        metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    metrics |= {f"pinball_p{100 * level:g}": _mean(np.asarray(losses[:, place])) for place, level in enumerate(levels)}
    observed = (labels[:, None] <= quantiles).mean(axis=0) if n else np.full(len(levels), np.nan)
    metrics |= {
        "coverage": _mean(inside),
        "coverage_low": float(covered_low),
        "coverage_high": float(covered_high),
        "width": _mean(np.asarray(quantiles[:, -1] - quantiles[:, 0])),
        "calibration_error": float(np.abs(observed - np.asarray(levels)).mean()),
        "crossed": _mean(np.asarray((np.diff(quantiles, axis=1) < 0).any(axis=1), dtype=np.float64)),
    }
    return metrics if measured else {name: value if name in ("rows", "mean_label") else np.nan for name, value in metrics.items()}


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else np.nan
