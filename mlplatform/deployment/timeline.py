"""The deployment history as a picture.

Belongs here: drawing ledger entries. Does not belong here: deciding, or reading the ledger.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from mlplatform.deployment.history import Served, changes
from mlplatform.figures import BLUE, GREEN, GREY, ORANGE, RED, blank, png
from mlplatform.records import LedgerEntry

_MARKS = {
    "promote": ("^", GREEN),
    "rollback": ("v", ORANGE),
    "reject": ("v", RED),
    "refuse": ("x", RED),
}
_SHADES = 8  # versions that answered beside each other in one picture are rarely more


def timeline(entries: Sequence[LedgerEntry], until: datetime) -> bytes:
    """Which version answered what share over time, with a mark per promotion, rollback, rejection and refusal at its version's height
    in a second plot below.

    `entries` oldest first, `until` where the last step ends. PNG bytes; a history in which nothing was decided gives a picture that
    says so.
    """
    from matplotlib.ticker import MaxNLocator

    served = [(now.since, now) for _, now in changes(entries) if now.since is not None]
    marked = [e for e in entries if e.action in _MARKS]
    figure, axes = blank(height_in=4.2 if served else 2.8)
    if not marked and not served:
        axes.set_title("Deployment history")
        axes.text(0.5, 0.5, "nothing deployed yet", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return png(figure)
    below = axes
    if served:
        axes.remove()
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for part in (above, below):
            part.spines[["top", "right"]].set_visible(False)
        _shares(above, served, until)
    below.set(ylabel="version")
    for action, (marker, colour) in _MARKS.items():
        found = [(e.at, float(e.version)) for e in marked if e.action == action and e.version is not None]
        if found:
            moments, versions = zip(*found, strict=True)
            below.scatter(_times(moments), np.array(versions), marker=marker, color=colour, zorder=3, label=action)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.margins(y=0.3)
    below.xaxis_date()
    if marked:
        below.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.axes[0].set_title("Deployment history")
    figure.autofmt_xdate()
    return png(figure)


def _shares(axes: Any, served: Sequence[tuple[datetime, Served]], until: datetime) -> None:
    """Percent of the entities by version, stacked."""
    moments = _times([*(at for at, _ in served), max(until, served[-1][0])])
    versions = sorted({version for _, now in served for _, version, _ in now.shares() if version is not None})
    held = np.zeros((len(versions), len(served) + 1))
    for step, (_, now) in enumerate(served):
        for _, version, percent in now.shares():
            if version is not None:
                held[versions.index(version), step] += percent
    held[:, -1] = held[:, -2]
    colours = [BLUE, ORANGE, GREEN, GREY, RED]
    shades = [colours[n % len(colours)] for n in range(len(versions))]
    axes.stackplot(moments, held, step="post", colors=shades, alpha=0.75, labels=[f"version {v}" for v in versions])
    axes.set(ylabel="percent of entities", ylim=(0, 100))
    if len(versions) <= _SHADES:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _times(moments: Sequence[datetime]) -> np.ndarray:
    from matplotlib.dates import date2num

    return np.array([date2num(m) for m in moments])  # type: ignore[no-untyped-call]  # matplotlib has none here
