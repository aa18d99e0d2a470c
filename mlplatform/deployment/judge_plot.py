"""The judge's evidence as a picture.

Belongs here: drawing a verdict. Does not belong here: judging.
"""

from mlplatform.deployment.judge import Verdict
from mlplatform.figures import BLUE, GREEN, RED, blank, png

_COLOURS = {"worse": RED, "safe": GREEN, "open": BLUE}


def evidence_plot(verdict: Verdict) -> bytes:
    """Each measure's difference, canary less champion, with its confidence sequence. PNG bytes."""
    figure, axes = blank(height_in=2.8)
    axes.set(title=f"{verdict.word} after {verdict.looks} looks", xlabel="canary less champion")
    known = [f for f in verdict.findings if min(f.canary_n, f.champion_n) > 0]
    for place, finding in enumerate(known):
        colour = _COLOURS[finding.state]
        axes.plot([finding.low, finding.high], [place, place], color=colour, linewidth=3)
        axes.plot([finding.difference], [place], "o", color=colour)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(known)), [f"{f.measure} ({f.state})" for f in known])
    if not known:
        axes.text(0.5, 0.5, "nothing to compare yet", ha="center", transform=axes.transAxes)
    return png(figure)
