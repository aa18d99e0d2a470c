"""The deployment history as a picture.

Belongs here: drawing ledger entries. Does not belong here: deciding, or reading the ledger.
"""

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from mlplatform.figures import BLUE, GREEN, ORANGE, RED, blank, png
from mlplatform.records import LedgerEntry

_MARKS = {"promote": ("^", GREEN), "rollback": ("v", ORANGE), "refuse": ("x", RED)}


def timeline(entries: Sequence[LedgerEntry], until: datetime) -> bytes:
    """Which version served over time (a step per move of the alias), with a mark per promotion, rollback and refusal.

    `entries` oldest first, `until` where the last step ends. PNG bytes; an empty history gives a picture that says so.
    """
    from matplotlib.ticker import MaxNLocator

    entries = [e for e in entries if e.action in _MARKS]
    figure, axes = blank(height_in=2.8)
    axes.set(title="Deployment history", ylabel="version")
    moves = [e for e in entries if e.version is not None and e.action in ("promote", "rollback")]
    if moves:
        ends = _times([*(e.at for e in moves), max(until, moves[-1].at)])
        axes.step(ends, _versions([*moves, moves[-1]]), where="post", color=BLUE, label="serves")
    for action, (marker, colour) in _MARKS.items():
        marked = [e for e in entries if e.action == action and e.version is not None]
        if marked:
            axes.scatter(_times([e.at for e in marked]), _versions(marked), marker=marker, color=colour, zorder=3, label=action)
    if not entries:
        axes.text(0.5, 0.5, "nothing deployed yet", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return png(figure)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis_date()
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.autofmt_xdate()
    return png(figure)


def _times(moments: Sequence[datetime]) -> np.ndarray:
    from matplotlib.dates import date2num

    return np.array([date2num(m) for m in moments])  # type: ignore[no-untyped-call]  # matplotlib has none here


def _versions(entries: Sequence[LedgerEntry]) -> np.ndarray:
    return np.array([entry.version for entry in entries], dtype=np.float64)
