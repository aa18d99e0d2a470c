"""How well the served predictions turned out, per day and overall.

Belongs here: accounting of outcomes and scoring them with the function given, a plot over days. Does not belong here: the
metrics themselves; they come in as a function, so that monitoring and evaluation cannot measure differently.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl

from mlplatform.figures import BLUE, GREEN, GREY, ORANGE, png
from mlplatform.monitoring.outcomes import KNOWN, MISSING
from mlplatform.records import PerformanceSummary

# (labels, predictions) -> metrics by name; mlplatform.evaluation.metrics.score with the model's cost bound.
Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


def summarise(outcomes: pl.DataFrame, model: str, score: Score) -> PerformanceSummary:
    """The summary over every day in `outcomes` (as `outcomes.join_outcomes` returns them; the rows of what served only).

    `metrics` is empty while no outcome is known. Each mapping of `by_day` has day, predictions, outcomes, missing, pending,
    and the metrics of its known outcomes: None where one cannot be had (a day of a single class has no AUC).
    `predictions == outcomes + missing + pending` in every day and overall. Raises ValueError without a prediction.
    """
    if outcomes.is_empty():
        raise ValueError(f"no predictions of {model} to summarise")
    days = outcomes.sort("event_date").partition_by("event_date", maintain_order=True)
    by_day = tuple(_day(rows, score) for rows in days)
    known = outcomes.filter(pl.col("state") == KNOWN)
    return PerformanceSummary(
        model=model,
        days=(by_day[0]["day"], by_day[-1]["day"]),
        predictions=outcomes.height,
        outcomes=known.height,
        missing_outcomes=outcomes.filter(pl.col("state") == MISSING).height,
        metrics=_scored(known, score) if known.height else {},
        by_day=by_day,
    )


def performance_plot(summary: PerformanceSummary) -> bytes:
    """Over days: observed rate against mean prediction, log loss, and how many outcomes are known, missing, pending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    rate, loss, counts = figure.subplots(3, 1, sharex=True)
    days = [np.datetime64(entry["day"]) for entry in summary.by_day]
    # A number's mean and pinball loss where the label is one; the rate and log loss of a binary label.
    number = any("mean_label" in entry for entry in summary.by_day)
    observed, lost = ("mean_label", "pinball") if number else ("base_rate", "log_loss")
    series = {name: _series(summary, name) for name in (observed, "mean_prediction", lost, "outcomes", "missing", "pending")}
    rate.plot(days, series[observed], color=BLUE, marker="o", markersize=3, label="observed mean" if number else "observed rate")
    rate.plot(days, series["mean_prediction"], color=ORANGE, marker="s", markersize=3, label="mean prediction")
    rate.set_title("Predicted and observed")
    if not number:
        rate.set_ylim(0, 1)
    loss.plot(days, series[lost], color=GREEN, marker="o", markersize=3, label=lost.replace("_", " "))
    bottom = np.zeros(len(days))
    for name, colour in (("outcomes", BLUE), ("pending", GREY), ("missing", ORANGE)):
        counts.bar(days, series[name], bottom=bottom, color=colour, alpha=0.7, label=name)
        bottom += series[name]
    counts.set_ylabel("predictions")
    for axes in (rate, loss, counts):
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    counts.xaxis.set_major_formatter(_dates(counts))
    return png(figure)


def _dates(axes: Any) -> Any:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=8)  # type: ignore[no-untyped-call]  # matplotlib has none here
    axes.xaxis.set_major_locator(locator)
    return ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]  # likewise


def _day(rows: pl.DataFrame, score: Score) -> dict[str, Any]:
    known = rows.filter(pl.col("state") == KNOWN)
    missing = rows.filter(pl.col("state") == MISSING).height
    metrics: dict[str, float | None] = {}
    if known.height:
        metrics = {name: value if np.isfinite(value) else None for name, value in _scored(known, score).items()}
    return metrics | {
        "day": rows["event_date"][0].isoformat(),
        "predictions": rows.height,
        "outcomes": known.height,
        "missing": missing,
        "pending": rows.height - known.height - missing,
    }


def _scored(known: pl.DataFrame, score: Score) -> dict[str, float]:
    return {name: float(value) for name, value in score(known["label"].to_numpy(), answers_of(known)).items()}


def answers_of(rows: pl.DataFrame) -> np.ndarray:
    """What was answered: quantiles (n, levels) where the rows have them, else the predictions (n,)."""
    if "quantiles" not in rows.columns or rows["quantiles"].null_count() == rows.height:
        return np.asarray(rows["prediction"].to_numpy())
    return np.array(rows["quantiles"].to_list(), dtype=np.float64)


def _series(summary: PerformanceSummary, name: str) -> np.ndarray:
    # A day without the number is a gap in the line, not a zero.
    values = [entry.get(name) for entry in summary.by_day]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
