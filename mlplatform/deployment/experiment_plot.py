"""An experiment's effects as a picture.

Belongs here: drawing a result. Does not belong here: computing it.
"""

from mlplatform.deployment.experiment import ExperimentResult
from mlplatform.figures import BLUE, RED, blank, png


def effects_plot(result: ExperimentResult) -> bytes:
    """Each arm's differences from the control with their confidence sequences, those that differ in red. PNG bytes."""
    figure, axes = blank(height_in=2.8)
    axes.set(title=f"{result.experiment}: {sum(result.entities.values()):,} entities", xlabel="arm less control")
    known = [(effect, effect.estimate) for effect in result.effects if effect.estimate is not None]
    for place, (effect, estimate) in enumerate(known):
        colour = RED if effect.differs else BLUE
        axes.plot([effect.low, effect.high], [place, place], color=colour, linewidth=3)
        axes.plot([estimate], [place], "o", color=colour)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(known)), [f"{effect.arm} {effect.metric}" for effect, _ in known])
    if not known:
        axes.text(0.5, 0.5, "nothing to compare yet", ha="center", transform=axes.transAxes)
    return png(figure)
