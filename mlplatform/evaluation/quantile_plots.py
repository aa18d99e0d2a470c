"""Pictures of an evaluation of quantiles, as PNG bytes.

Belongs here: drawing numbers the room computed. Does not belong here: computing metrics, pictures of probabilities (`plots`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlplatform.evaluation.plots import column_of, slice_label
from mlplatform.evaluation.quantile_metrics import calibration_table, checked
from mlplatform.figures import BLUE, GREEN, GREY, ORANGE, blank, png

_GROUPS = 10


def quantile_calibration(y: ArrayLike, q: ArrayLike, levels: Sequence[float], champion: ArrayLike | None = None) -> bytes:
    """The share of labels at or below each quantile against its level, overall and in tenths of the rows by their predicted median."""
    labels, quantiles = checked(y, q, levels)
    figure, axes = blank()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    order = np.argsort(quantiles[:, list(levels).index(0.5)], kind="stable")
    for rows in np.array_split(order, _GROUPS):
        if len(rows):
            axes.plot(levels, calibration_table(labels[rows], quantiles[rows], levels)["observed"], color=GREY, alpha=0.5, linewidth=0.8)
    for name, answers, colour in (("this version", quantiles, BLUE), ("champion", champion, ORANGE)):
        if answers is not None:
            table = calibration_table(labels, answers, levels)
            observed = table["observed"].to_numpy()
            errors = np.maximum(0, np.stack([observed - table["low"].to_numpy(), table["high"].to_numpy() - observed]))
            axes.errorbar(levels, observed, yerr=errors, color=colour, marker="o", markersize=4, capsize=2, label=name)
    axes.set(xlabel="level", ylabel="labels at or below", xlim=(0, 1), ylim=(0, 1), title="Quantile calibration (grey: tenths by median)")
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def error_histogram(y: ArrayLike, q: ArrayLike, levels: Sequence[float]) -> bytes:
    """How far labels lie from the predicted median; the outermost hundredths are left out of view."""
    labels, quantiles = checked(y, q, levels)
    errors = labels - quantiles[:, list(levels).index(0.5)]
    figure, axes = blank()
    low, high = np.quantile(errors, (0.01, 0.99)) if len(errors) else (-1.0, 1.0)
    axes.hist(errors, bins=np.linspace(low, high, 60).tolist(), color=BLUE, alpha=0.6)
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="label - median", ylabel="rows", title="Errors of the median")
    return png(figure)


def quantile_slice_bars(slices: Sequence[Mapping[str, Any]], column: str, nominal: float, shown: int = 20) -> bytes:
    """Mean absolute error, and coverage with the share the outer quantiles promise, of the `shown` largest slices of `column`.

    Raises ValueError where no slice of that column was scored.
    """
    rows = [s for s in slices if s["column"] == column][:shown]
    if not rows:
        raise ValueError(f"no slices of column '{column}'")
    figure, _ = blank(height_in=max(2.4, 0.22 * len(rows) + 1.2))
    figure.clear()
    left, right = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(rows))[::-1]
    for axes, name, colour in ((left, "mae", BLUE), (right, "coverage", GREEN)):
        value = column_of(rows, name)
        spread = np.maximum(0, np.stack([value - column_of(rows, f"{name}_low"), column_of(rows, f"{name}_high") - value]))
        axes.errorbar(value, at, xerr=spread, color=colour, fmt="o", markersize=4, capsize=2)
        axes.set_title(f"{name.upper() if name == 'mae' else name.capitalize()} by {column}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.axvline(nominal, color=GREY, linestyle="--", linewidth=1)
    left.set_yticks(at, [slice_label(s) for s in rows], fontsize=7)
    return png(figure)
