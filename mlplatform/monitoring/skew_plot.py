"""Skew as a picture.

Belongs here: drawing a summary. Does not belong here: measuring.
"""

import numpy as np

from mlplatform.figures import BLUE, GREY, ORANGE, RED, png
from mlplatform.records import SkewSummary


def skew_plot(summary: SkewSummary) -> bytes:
    """Per source the share of predictions with a fault; per view how long newer values waited, against the declared budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(summary.by_source)
    views = [s for s in sources if "budget_s" in s]
    figure = Figure(figsize=(8.4, 1.6 + 0.26 * max(len(sources), 1)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    share, lag = figure.subplots(1, 2)
    share.barh([s["source"].rpartition(".")[2] for s in sources], [s["rate"] for s in sources], color=RED)
    share.set(title="Predictions that differ", xlim=(0, max([s["rate"] for s in sources] + [0.01])), xlabel="share")
    places = np.arange(len(views))
    for name, colour, height in (("budget_s", GREY, 0.8), ("lag_max_s", ORANGE, 0.5), ("lag_p50_s", BLUE, 0.25)):
        label = {"budget_s": "declared budget", "lag_max_s": "longest", "lag_p50_s": "median"}[name]
        lag.barh(places, [(v[name] or 0.0) / 60 for v in views], height=height, color=colour, alpha=0.7, label=label)
    lag.set_yticks(places, [v["source"] for v in views])
    lag.set(title="A newer value waited", xlabel="minutes")
    for axes in (share, lag):
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if views:
        lag.legend(fontsize=7, frameon=False)
    return png(figure)
