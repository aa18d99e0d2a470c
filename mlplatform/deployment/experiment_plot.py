"""An experiment's effects as a picture.

Belongs here: drawing a result. Does not belong here: computing it.
"""

from mlplatform.deployment.experiment import LOSS, ExperimentResult
from mlplatform.figures import BLUE, RED, blank, png


def effects_plot(result: ExperimentResult) -> bytes:
    """Each arm's differences from the control with their confidence sequences, those that differ in red. PNG bytes.

    On one scale, the label's interval as 1: minutes and losses beside each other would hide one of them.
    """
    figure, axes = blank(height_in=2.8)
    axes.set(title=f"{result.experiment}: {sum(result.entities.values()):,} entities", xlabel="arm less control, label's range = 1")
    known = [(effect, effect.estimate) for effect in result.effects if effect.estimate is not None]
    for place, (effect, estimate) in enumerate(known):
        colour, size = RED if effect.differs else BLUE, 1.0 if effect.metric == LOSS else result.unit
        axes.plot([effect.low / size, effect.high / size], [place, place], color=colour, linewidth=3)
        axes.plot([estimate / size], [place], "o", color=colour)
    axes.set_ylim(-0.5, max(len(known), 1) - 0.5)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(known)), [f"{effect.arm} {effect.metric}" for effect, _ in known])
    if not known:
        axes.text(0.5, 0.5, "nothing to compare yet", ha="center", transform=axes.transAxes)
    return png(figure)
