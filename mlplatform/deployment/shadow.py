"""A challenger in the shadow beside the champion: the same requests, answered by both; pure.

Belongs here: the paired comparison and its table by slice. Does not belong here: collecting the pairs, who is copied (the service).

Each request is its own pair, so what differs between requests cancels. The differences are bounded, and a confidence sequence for their
mean comes from the bet on one sample (`confidence.sums_log_e`). It assumes one mean; where the mean drifts, an interval above m still
refuses "the running mean was never above m", which is what a comparison asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlplatform.deployment.confidence import Floats, Sums, interval


@dataclass(frozen=True)
class Pairs:
    """Inputs that both answered. Arrays of one length, shadow and champion at the same place. What a shadow did not answer is in the
    service's own count of shadows.

    NaN: not known (no label). `predictions` in [0, `ceiling`], `losses` in [0, `loss_ceiling`]; cut them before.
    `slices`: by column the value of each request.
    """

    shadow_predictions: Floats
    champion_predictions: Floats
    shadow_latencies_ms: Floats
    champion_latencies_ms: Floats
    shadow_losses: Floats | None = None
    champion_losses: Floats | None = None
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """Sums of the differences shadow - champion by measure. Key: (slice column, value), ("", "") for all."""

    sums: Mapping[tuple[str, str], Mapping[str, Sums]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measure of one slice: mean difference with the confidence sequence, over `n` pairs. NaN and the widest where n is 0."""

    slice: tuple[str, str]
    measure: str
    n: int
    mean: float
    low: float
    high: float


def pair(batch: Pairs, ceiling: float = 1.0, loss_ceiling: float = 1.0) -> Paired:
    """The sums. Raises ValueError for a value outside its interval.

    - `prediction`: difference over the ceiling; `distance`: its absolute value.
    - `loss`: difference over the loss ceiling, where both are labelled.
    - `slower`: 1 or -1 for the slower of the two. A share instead of a mean: one stalled request cannot tip it.
    """
    ours, theirs = batch.shadow_predictions, batch.champion_predictions
    prediction = _difference(ours, theirs, ceiling, "prediction")
    measures = {
        "prediction": prediction,
        "distance": np.abs(prediction),
        "slower": np.sign(batch.shadow_latencies_ms - batch.champion_latencies_ms),
    }
    if batch.shadow_losses is not None and batch.champion_losses is not None:
        measures["loss"] = _difference(batch.shadow_losses, batch.champion_losses, loss_ceiling, "loss")
    found = {("", ""): _sums(measures, np.ones(len(ours), dtype=bool))}
    for column, values in batch.slices.items():
        where = np.asarray(values)
        found |= {(column, str(value)): _sums(measures, where == value) for value in np.unique(where)}
    return Paired(found)


def table(paired: Paired, alpha: float) -> tuple[Row, ...]:
    """Every measure of every slice. Alpha is split over all rows and both sides, so that all intervals hold together at all times.

    A slice that appears later makes the others' share of alpha smaller: what was read before was at a larger one.
    """
    rows = [(key, name, sums) for key, by_name in paired.sums.items() for name, sums in by_name.items()]
    out = []
    for key, name, sums in rows:
        low, high = interval(sums, alpha / (2 * len(rows)), 1.0)
        out.append(Row(key, name, int(sums.n), float(sums.mean), low, high))
    return tuple(out)


def _difference(ours: Floats, theirs: Floats, ceiling: float, what: str) -> Floats:
    for values in (ours, theirs):
        known = values[~np.isnan(values)]
        if known.size and (known.min() < 0 or known.max() > ceiling):
            raise ValueError(f"{what}: values outside [0, {ceiling:g}]; cut them first")
    return np.asarray((ours - theirs) / ceiling)


def _sums(measures: Mapping[str, Floats], where: "np.ndarray") -> dict[str, Sums]:
    out = {}
    for name, values in measures.items():
        known = values[where & ~np.isnan(values)]
        out[name] = Sums.from_list((known.size, known.sum(), (known * known).sum()))
    return out
