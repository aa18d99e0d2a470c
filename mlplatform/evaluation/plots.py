"""Pictures of an evaluation, as PNG bytes; `mlplatform.figures.markdown` puts them into an asset's metadata.

Belongs here: drawing numbers the room computed. Does not belong here: computing metrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlplatform.evaluation.metrics import checked, cost_curve, ece, reliability_table
from mlplatform.figures import BLUE, GREEN, GREY, ORANGE, blank, png
from mlplatform.records import Evaluation
from mlplatform.specs import CostMatrix

_HISTOGRAM_BINS = 50


def reliability_diagram(y: ArrayLike, p: ArrayLike, champion: ArrayLike | None = None) -> bytes:
    """Observed rate against mean prediction per ECE bin, with Wilson intervals, and how many rows each bin has.

    `champion`: the champion's predictions for the same rows, drawn beside them.
    """
    figure, axes = blank()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    table = reliability_table(y, p)
    filled = table.filter(table["rows"] > 0)
    rate = filled["observed_rate"].to_numpy()
    errors = np.maximum(0, np.stack([rate - filled["low"].to_numpy(), filled["high"].to_numpy() - rate]))
    axes.errorbar(
        filled["mean_prediction"],
        rate,
        yerr=errors,
        color=BLUE,
        marker="o",
        markersize=4,
        capsize=2,
        label=f"this version (ECE {ece(y, p):.3f})",
    )
    if champion is not None:
        other = reliability_table(y, champion)
        other = other.filter(other["rows"] > 0)
        axes.plot(
            other["mean_prediction"],
            other["observed_rate"],
            color=ORANGE,
            marker="s",
            markersize=3,
            label=f"champion (ECE {ece(y, champion):.3f})",
        )
    counts = axes.twinx()
    counts.bar(table["lower"], table["rows"], width=table["upper"] - table["lower"], align="edge", color=GREY, alpha=0.2)
    counts.set_ylabel("rows")
    axes.set(xlabel="mean prediction", ylabel="observed rate", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    return png(figure)


def slice_bars(slices: Sequence[Mapping[str, Any]], column: str, overall_auc: float, shown: int = 20) -> bytes:
    """Observed rate (with interval) and mean prediction, and AUC (with interval), of the `shown` largest slices of `column`.

    Raises ValueError where no slice of that column was scored.
    """
    rows = [s for s in slices if s["column"] == column][:shown]
    if not rows:
        raise ValueError(f"no slices of column '{column}'")
    figure, left = blank(height_in=max(2.4, 0.22 * len(rows) + 1.2))
    figure.clear()
    left, right = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(rows))[::-1]
    rate = column_of(rows, "base_rate")
    interval = np.maximum(0, np.stack([rate - column_of(rows, "base_rate_low"), column_of(rows, "base_rate_high") - rate]))
    left.barh(at, rate, xerr=interval, color=BLUE, alpha=0.6, label="observed")
    left.scatter(column_of(rows, "mean_prediction"), at, color=ORANGE, marker="D", s=14, zorder=3, label="mean prediction")
    left.set_yticks(at, [slice_label(s) for s in rows], fontsize=7)
    left.legend(fontsize=7, loc="lower left", framealpha=0.9)
    left.set_title(f"Rate by {column}", fontsize=9)
    area = column_of(rows, "auc")
    spread = np.maximum(0, np.stack([area - column_of(rows, "auc_low"), column_of(rows, "auc_high") - area]))
    right.errorbar(area, at, xerr=spread, color=GREEN, fmt="o", markersize=4, capsize=2)
    right.axvline(overall_auc, color=GREY, linestyle="--", linewidth=1)
    right.set_title(f"AUC by {column} (dashed: all rows)", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def cost_plot(y: ArrayLike, p: ArrayLike, cost: CostMatrix) -> bytes:
    """Cost per row over all thresholds, with the declared threshold and the two constant policies."""
    thresholds = np.linspace(0, 1, 201)
    paid = cost_curve(y, p, cost, [*thresholds, np.inf])
    figure, axes = blank()
    axes.plot(thresholds, paid[:-1], color=BLUE, label="model")
    axes.axhline(paid[0], color=ORANGE, linestyle="--", linewidth=1, label="always warn")
    axes.axhline(paid[-1], color=GREY, linestyle="--", linewidth=1, label="never warn")
    axes.axvline(cost.threshold, color=GREEN, linewidth=1, label=f"threshold {cost.threshold:.3f}")
    axes.set(xlabel="warn at or above", ylabel="cost per row", title=f"Cost (a miss {cost.miss:g}, a false alarm {cost.false_alarm:g})")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def score_histogram(y: ArrayLike, p: ArrayLike) -> bytes:
    """How predictions are spread, for rows that turned out 0 and 1 (densities: each fills the same area)."""
    labels, predictions = checked(y, p)
    figure, axes = blank()
    edges = np.linspace(0, 1, _HISTOGRAM_BINS + 1)
    for outcome, colour in ((0, BLUE), (1, ORANGE)):
        chosen = predictions[labels == outcome]
        if len(chosen):  # the density of no rows is not zero, it does not exist
            axes.hist(chosen, bins=edges.tolist(), density=True, color=colour, alpha=0.5, label=f"outcome {outcome} ({len(chosen):,} rows)")
    axes.set(xlabel="prediction", ylabel="density", xlim=(0, 1), title="Predictions by outcome")
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def comparison(evaluation: Evaluation, metrics: Sequence[str] = ("auc", "log_loss", "brier", "ece", "saving")) -> bytes:
    """This version beside the champion and the baselines, one panel per metric, intervals where there are any.

    Baselines without a metric, or with one that could not be measured, have a gap there.
    """
    rivals: dict[str, Mapping[str, float]] = {f"v{evaluation.version}": evaluation.metrics}
    if evaluation.champion_metrics is not None and evaluation.champion_version != evaluation.version:
        rivals[f"champion v{evaluation.champion_version}"] = evaluation.champion_metrics
    rivals |= evaluation.baselines
    shown = [m for m in metrics if m in evaluation.metrics]
    figure, _ = blank(height_in=0.3 * len(rivals) + 1.4, width_in=1.9 * len(shown) + 0.8)
    figure.clear()
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    at = np.arange(len(rivals))[::-1]
    colours = [BLUE, *([ORANGE] if len(rivals) > 1 + len(evaluation.baselines) else []), *([GREY] * len(evaluation.baselines))]
    for axes, metric in zip(panels, shown, strict=True):
        for k, numbers in enumerate(rivals.values()):
            value = numbers.get(metric, np.nan)
            low, high = numbers.get(f"{metric}_low", np.nan), numbers.get(f"{metric}_high", np.nan)
            axes.errorbar(value, at[k], xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], color=colours[k], fmt="o", capsize=3)
        axes.set_title(metric.replace("_", " "), fontsize=9)
        axes.set_yticks(at, list(rivals))
        axes.set_ylim(-0.6, len(rivals) - 0.4)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def column_of(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if s[name] is None else s[name] for s in rows], dtype=np.float64)


def slice_label(entry: Mapping[str, Any]) -> str:
    value = "(missing)" if entry["value"] is None else str(entry["value"])
    pooled = f" {entry['pooled']} values" if entry["pooled"] else ""
    return f"{value}{pooled} ({entry['rows']:,}{', small' if entry['small'] else ''})"
