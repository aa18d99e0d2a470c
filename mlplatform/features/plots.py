"""The picture of a view: its features' distributions side by side.

Belongs here: drawing. Does not belong here: computing what is drawn (`profile`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlplatform.features.profile import FeatureProfile
from mlplatform.figures import BLUE, GREY, RED, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_CELL_IN = (2.1, 0.95)  # width, height of one feature
_BAR = (0.06, 0.24, 0.88, 0.46)  # left, bottom, width, height of the bars inside a cell


def distributions(profiles: Sequence[FeatureProfile]) -> bytes:
    """One small histogram per feature, all in one drawing area: axes for each would take ten times as long to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(profiles) // _COLUMNS)
    figure = Figure(figsize=(_CELL_IN[0] * _COLUMNS, _CELL_IN[1] * lines), dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _COLUMNS), ylim=(-lines, 0))
    axes.set_axis_off()
    for i, profile in enumerate(profiles):
        _draw(axes, profile, i % _COLUMNS, -(i // _COLUMNS) - 1)
    return png(figure)


def _draw(axes: "Axes", profile: FeatureProfile, left: int, bottom: int) -> None:
    from matplotlib.collections import PolyCollection

    x, y, width, height = left + _BAR[0], bottom + _BAR[1], _BAR[2], _BAR[3]
    text: dict[str, Any] = {"fontsize": 6, "color": GREY}
    axes.text(x, bottom + 0.78, profile.feature, fontsize=6.5)
    if not profile.counts:
        axes.text(x, y + height / 2, "no value", **text)
        return
    if profile.nulls:
        axes.text(x + width, bottom + 0.78, f"null {_share(profile.nulls / profile.rows)}", ha="right", fontsize=6, color=RED)
    heights = height * np.array(profile.counts) / max(profile.counts)
    starts = x + width * np.arange(len(heights)) / len(heights)
    step = 0.9 * width / len(heights)
    bars = [[(a, y), (a, y + h), (a + step, y + h), (a + step, y)] for a, h in zip(starts, heights, strict=True)]
    axes.add_collection(PolyCollection(bars, facecolors=BLUE, linewidths=0), autolim=False)
    axes.plot([x, x + width], [y, y], color=GREY, linewidth=0.5)
    axes.text(x, bottom + 0.1, f"{profile.edges[0]:.3g}", **text)
    axes.text(x + width / 2, bottom + 0.1, f"median {profile.quantiles[3]:.3g}", ha="center", **text)
    axes.text(x + width, bottom + 0.1, f"{profile.edges[1]:.3g}", ha="right", **text)


def _share(share: float) -> str:
    return "<1%" if share < 0.01 else f"{share:.0%}"
