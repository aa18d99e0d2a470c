"""Plots of a training run as PNG bytes.

Belongs here: drawing. Does not belong here: computing what is drawn.
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from mlplatform.records import TuningResult


def learning_curves(curves: Mapping[str, Sequence[float]], kept_rounds: int) -> bytes:
    """Each curve over the rounds, with the round that was kept."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name.replace("_", " "))
    axes.axvline(kept_rounds, color="grey", linestyle="--", linewidth=1, label=f"kept: {kept_rounds} rounds")
    axes.set(xlabel="round", title="Learning curves")
    axes.legend()
    return _png(figure)


def feature_importance(importances: Mapping[str, float], top: int = 25) -> bytes:
    """The columns with the largest shares, largest on top."""
    largest = sorted(importances.items(), key=lambda item: item[1])[-top:]
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(largest)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in largest], [share for _, share in largest])
    axes.set(xlabel="share of the total", title=f"Feature importance (top {len(largest)} of {len(importances)})")
    return _png(figure)


def optimization_history(result: TuningResult) -> bytes:
    """The value of each complete trial and the best so far; pruned and failed trials as ticks on the axis."""
    complete = [(t.number, t.value) for t in result.trials if t.value is not None]
    others = [t.number for t in result.trials if t.value is None]
    better = max if result.best_value == max((v for _, v in complete), default=result.best_value) else min
    best = [better(v for _, v in complete[: i + 1]) for i in range(len(complete))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([n for n, _ in complete], [v for _, v in complete], "o", label="complete")
    axes.step([n for n, _ in complete], best, where="post", label="best so far")
    if others:
        axes.plot(others, [0.02] * len(others), "|", color="grey", transform=axes.get_xaxis_transform(), label="pruned or failed")
    axes.set(xlabel="trial", ylabel=result.metric.replace("_", " "), title=f"Study {result.study}")
    axes.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    # Figure without pyplot: no global state, no display, safe in threads.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
