"""Metrics of probability forecasts for a binary outcome, with 95 % intervals where they are cheap.

Belongs here: functions from labels and predictions to numbers. Does not belong here: thresholds to pass (gates.py).

Everywhere: `y` is a 1-D array of 0 and 1, `p` the predicted probability of 1, of equal length. Wrong shapes, labels other
than 0 and 1, and probabilities outside [0, 1] raise ValueError. A missing prediction (NaN) makes every metric NaN, and so
does a metric the rows cannot give (AUC of a single class): a gate fails on NaN, it never passes by default.

The intervals take rows as independent. Rows that share an hour or an origin are not, so the truth is wider.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from mlplatform.specs import CostMatrix

Floats = NDArray[np.float64]

ECE_BINS = 15
Z95 = 1.959963984540054  # standard normal quantile at 0.975
_RESAMPLES = 2000


def checked(y: ArrayLike, p: ArrayLike) -> tuple[Floats, Floats]:
    """Both arrays as float64, or ValueError saying what is wrong with them."""
    labels, predictions = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(f"labels and predictions must be 1-D and of equal length, not {labels.shape} and {predictions.shape}")
    if not np.isin(labels, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if ((predictions < 0) | (predictions > 1)).any():
        raise ValueError("predictions must be probabilities between 0 and 1")
    return labels, predictions


def midranks(values: Floats) -> Floats:
    """Ranks from 1, ties sharing the mean of theirs."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[position]
    return ranks


def auc(y: ArrayLike, p: ArrayLike) -> float:
    """Area under the ROC curve: P(a positive ranks above a negative), ties counting half (Mann-Whitney U / n1·n0)."""
    return auc_interval(y, p)[0]


def auc_interval(y: ArrayLike, p: ArrayLike) -> tuple[float, float, float]:
    """(AUC, low, high). Variance after DeLong 1988, computed from midranks as in Sun & Xu 2014 ("Fast Implementation of
    DeLong's Algorithm", IEEE SPL 21). The bounds are NaN where a class has a single row."""
    labels, predictions = checked(y, p)
    positive = labels == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0 or np.isnan(predictions).any():
        return np.nan, np.nan, np.nan
    ranks = midranks(predictions)
    # Placement values: for each positive the share of negatives below it, for each negative the share of positives above.
    above_negatives = (ranks[positive] - midranks(predictions[positive])) / n0
    below_positives = 1 - (ranks[~positive] - midranks(predictions[~positive])) / n1
    area = float(above_negatives.mean())
    if n1 == 1 or n0 == 1:
        return area, np.nan, np.nan
    half = Z95 * float(np.sqrt(above_negatives.var(ddof=1) / n1 + below_positives.var(ddof=1) / n0))
    return area, max(0.0, area - half), min(1.0, area + half)


def row_log_loss(y: ArrayLike, p: ArrayLike) -> Floats:
    """-log P(observed) per row, in nats. Probabilities are kept off 0 and 1 by float64's epsilon, as scikit-learn does."""
    labels, predictions = checked(y, p)
    eps = np.finfo(np.float64).eps
    kept = np.clip(predictions, eps, 1 - eps)
    return -np.where(labels == 1, np.log(kept), np.log1p(-kept))


def log_loss(y: ArrayLike, p: ArrayLike) -> float:
    """Mean of `row_log_loss`; NaN for no rows."""
    return mean_interval(row_log_loss(y, p))[0]


def row_brier(y: ArrayLike, p: ArrayLike) -> Floats:
    """Squared error of the probability, per row (Brier 1950)."""
    labels, predictions = checked(y, p)
    return (labels - predictions) ** 2


def brier(y: ArrayLike, p: ArrayLike) -> float:
    """Mean of `row_brier`; NaN for no rows."""
    return mean_interval(row_brier(y, p))[0]


def mean_interval(values: Floats) -> tuple[float, float, float]:
    """(mean, low, high) by the normal approximation; NaN for no rows, NaN bounds for a single one."""
    n = len(values)
    if n == 0:
        return np.nan, np.nan, np.nan
    mean = float(values.mean())
    if n == 1:
        return mean, np.nan, np.nan
    half = Z95 * float(values.std(ddof=1)) / n**0.5
    return mean, mean - half, mean + half


def wilson(successes: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """95 % interval of a share (Wilson 1927), elementwise. (0, 1) where n is 0: nothing is known."""
    k, size = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    share = np.divide(k, size, out=np.full_like(size, 0.5), where=size > 0)
    width = 1 + np.divide(Z95**2, size, out=np.full_like(size, np.inf), where=size > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (share + Z95**2 / (2 * size)) / width
        half = Z95 / width * np.sqrt(share * (1 - share) / size + Z95**2 / (4 * size**2))
    low = np.where(size > 0, np.maximum(0.0, centre - half), 0.0)
    high = np.where(size > 0, np.minimum(1.0, centre + half), 1.0)
    return low, high


def reliability_table(y: ArrayLike, p: ArrayLike, bins: int = ECE_BINS) -> pl.DataFrame:
    """Predicted against observed, per equal-width bin of the prediction: [0, 1/bins), …, [1 - 1/bins, 1].

    Columns: bin, lower, upper, rows, mean_prediction, observed_rate (both null in an empty bin), low, high (Wilson).
    Raises ValueError for a NaN prediction: it belongs to no bin, and a table that left it out would not add up.
    """
    labels, predictions = checked(y, p)
    if np.isnan(predictions).any():
        raise ValueError("predictions contain NaN")
    # The last bin takes 1.0 too.
    index = np.minimum((predictions * bins).astype(np.int64), bins - 1)
    rows = np.bincount(index, minlength=bins)
    positives = np.bincount(index, weights=labels, minlength=bins)
    predicted = np.bincount(index, weights=predictions, minlength=bins)
    low, high = wilson(positives, rows)
    edges = np.arange(bins + 1) / bins
    filled = pl.col("rows") > 0
    return pl.DataFrame(
        {
            "bin": np.arange(bins),
            "lower": edges[:-1],
            "upper": edges[1:],
            "rows": rows,
            "p": predicted,
            "y": positives,
            "low": low,
            "high": high,
        }
    ).select(
        "bin",
        "lower",
        "upper",
        "rows",
        pl.when(filled).then(pl.col("p") / pl.col("rows")).alias("mean_prediction"),
        pl.when(filled).then(pl.col("y") / pl.col("rows")).alias("observed_rate"),
        "low",
        "high",
    )


def ece(y: ArrayLike, p: ArrayLike, bins: int = ECE_BINS) -> float:
    """Expected calibration error: |observed rate - mean prediction| over equal-width bins, weighted by rows (Naeini 2015,
    "Obtaining Well Calibrated Probabilities Using Bayesian Binning"). 15 bins unless said otherwise; NaN for no rows."""
    labels, predictions = checked(y, p)
    if len(labels) == 0 or np.isnan(predictions).any():
        return np.nan
    index = np.minimum((predictions * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=labels - predictions, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def cost_metrics(y: ArrayLike, p: ArrayLike, cost: CostMatrix, seed: int = 0) -> dict[str, float]:
    """What deciding at the cost-optimal threshold costs, against the best policy that knows no row.

    Warn where p >= cost.threshold. The best constant policy is the cheaper of always and never warning, on these rows.
    Returns threshold, warned_share, recall, precision, cost_per_row, constant_cost_per_row, saving (share of the
    constant policy's cost; 0.2 = a fifth saved), saving_low and saving_high (percentile bootstrap, 2,000 resamples of the
    four outcome counts, which is the same as resampling rows). All but the threshold are NaN where there are no rows.
    """
    labels, predictions = checked(y, p)
    n = len(labels)
    names = ("warned_share", "recall", "precision", "cost_per_row", "constant_cost_per_row", "saving", "saving_low", "saving_high")
    if n == 0 or np.isnan(predictions).any():
        return {"threshold": cost.threshold} | dict.fromkeys(names, np.nan)
    warned = predictions >= cost.threshold
    counts = np.bincount((2 * labels + warned).astype(np.int64), minlength=4)  # quiet, false alarm, miss, hit
    resampled = np.random.default_rng(seed).multinomial(n, counts / n, size=_RESAMPLES)
    savings = _saving(resampled, cost)
    low, high = np.percentile(savings, (2.5, 97.5)) if np.isfinite(savings).all() else (np.nan, np.nan)
    paid, constant = _costs(counts[None, :], cost)
    values = (
        warned.mean(),
        _share(counts[3], counts[2] + counts[3]),
        _share(counts[3], counts[1] + counts[3]),
        paid[0] / n,
        constant[0] / n,
        _saving(counts[None, :], cost)[0],
        low,
        high,
    )
    return {"threshold": cost.threshold} | {name: float(value) for name, value in zip(names, values, strict=True)}


def cost_curve(y: ArrayLike, p: ArrayLike, cost: CostMatrix, thresholds: Sequence[float]) -> Floats:
    """Cost per row of warning at or above each threshold, in the order given."""
    labels, predictions = checked(y, p)
    positives, negatives = np.sort(predictions[labels == 1]), np.sort(predictions[labels == 0])
    missed = np.searchsorted(positives, thresholds, side="left")
    false_alarms = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    paid: Floats = (cost.miss * missed + cost.false_alarm * false_alarms) / len(labels)
    return paid


def score(y: ArrayLike, p: ArrayLike, cost: CostMatrix | None = None) -> dict[str, float]:
    """Every metric of these rows, flat: rows, base_rate, mean_prediction, auc, log_loss, brier (each with `_low` and
    `_high`), ece, and `cost_metrics` where a cost is declared. Evaluation and monitoring both call this one function."""
    labels, predictions = checked(y, p)
    metrics: dict[str, float] = {
        "rows": float(len(labels)),
        "base_rate": float(labels.mean()) if len(labels) else np.nan,
        "mean_prediction": float(predictions.mean()) if len(labels) else np.nan,
    }
    intervals: dict[str, tuple[float, float, float]] = {
        "auc": auc_interval(labels, predictions),
        "log_loss": mean_interval(row_log_loss(labels, predictions)),
        "brier": mean_interval(row_brier(labels, predictions)),
    }
    for name, (value, low, high) in intervals.items():
        metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    metrics["ece"] = ece(labels, predictions)
    if cost is not None:
        metrics |= cost_metrics(labels, predictions, cost)
    return metrics


def _costs(counts: NDArray[Any], cost: CostMatrix) -> tuple[Floats, Floats]:
    """(paid, paid by the best constant policy) for rows of (quiet, false alarm, miss, hit) counts."""
    quiet, false_alarms, misses, hits = (counts[:, k].astype(np.float64) for k in range(4))
    paid = cost.false_alarm * false_alarms + cost.miss * misses
    constant = np.minimum(cost.false_alarm * (quiet + false_alarms), cost.miss * (misses + hits))
    return paid, constant


def _saving(counts: NDArray[Any], cost: CostMatrix) -> Floats:
    """Share of the constant policy's cost saved; NaN where that policy costs nothing (rows of a single class)."""
    paid, constant = _costs(counts, cost)
    return 1 - np.divide(paid, constant, out=np.full_like(paid, np.nan), where=constant > 0)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else np.nan
