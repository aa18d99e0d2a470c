"""Challenger and champion on the same rows: the mean difference of their losses, and how sure it is.

Belongs here: arithmetic of paired differences, grouped by day. Does not belong here: which loss a model has (measures.py) and what
is tolerated (gates.py).
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

MIN_DAYS = 10
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Mean of challenger minus champion per row, in the loss's unit; `upper` bounds it from above with `CONFIDENCE`."""

    difference: float
    upper: float
    days: int
    rows: int


def paired_difference(challenger: ArrayLike, champion: ArrayLike, days: ArrayLike) -> Paired | None:
    """The comparison of two losses (n,) on the same rows, `days` (n,) naming each row's day; None under `MIN_DAYS` days or where a
    loss is not finite: it cannot be told. Raises ValueError for shapes that differ.

    Rows of one day share its weather and are not independent: the day is the unit. The variance is the cluster-robust one of a mean,
    G/(G-1) times the sum of squared day totals of residuals over n squared, the bound from t with G-1 degrees of freedom
    (A. C. Cameron and D. L. Miller, "A Practitioner's Guide to Cluster-Robust Inference", J. Human Resources 50, 2015, sections II and VI).
    """
    mine, theirs, day = np.asarray(challenger, dtype=np.float64), np.asarray(champion, dtype=np.float64), np.asarray(days)
    if mine.ndim != 1 or not mine.shape == theirs.shape == day.shape:
        raise ValueError(f"losses and days must be 1-D and of equal length, not {mine.shape}, {theirs.shape} and {day.shape}")
    difference = mine - theirs
    names, place = np.unique(day, return_inverse=True)
    groups, rows = len(names), len(difference)
    if groups < MIN_DAYS or not np.isfinite(difference).all():
        return None
    mean = float(difference.mean())
    residuals = np.bincount(place, weights=difference - mean, minlength=groups)
    error = float(np.sqrt(groups / (groups - 1) * (residuals**2).sum())) / rows
    return Paired(mean, mean + _t_quantile(groups - 1) * error, groups, rows)


def _t_quantile(freedom: int) -> float:
    """Student's t at `CONFIDENCE`, by the expansion in 1/freedom of Abramowitz and Stegun 26.7.5:
    off by under 1e-4 from MIN_DAYS - 1 up."""
    z = NormalDist().inv_cdf(CONFIDENCE)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
