"""Skew as a picture.

Belongs here: drawing a summary. Does not belong here: measuring.
"""

import numpy as np

from mlplatform.figures import BLUE, GREY, ORANGE, RED, png
from mlplatform.records import SkewSummary


def skew_plot(summary: SkewSummary) -> bytes:
    """Per source the share of predictions with a fault; per view how long newer values waited, as a share of the declared budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(summary.by_source)
    views = [s for s in sources if "budget_s" in s]
    figure = Figure(figsize=(8.4, 1.6 + 0.26 * max(len(sources), 1)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    share, lag = figure.subplots(1, 2)
    share.barh([s["source"].rpartition(".")[2] for s in sources], [100 * s["rate"] for s in sources], color=RED)
    share.set(title="Predictions that differ", xlim=(0, max([110 * s["rate"] for s in sources] + [1])), xlabel="% of those compared")
    places = np.arange(len(views))
    for name, label, colour, height in (("lag_max_s", "longest", ORANGE, 0.7), ("lag_p50_s", "median", BLUE, 0.3)):
        shares = [100 * (v[name] or 0.0) / v["budget_s"] for v in views]
        lag.barh(places, shares, height=height, color=colour, label=label)
    lag.axvline(100, color=GREY, linestyle="--", label="declared budget")
    lag.set_yticks(places, [v["source"] for v in views])
    lag.set(title="A newer value waited", xlabel="% of the declared budget")
    for axes in (share, lag):
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if views:
        lag.legend(fontsize=7, frameon=False)
    return png(figure)
