"""One model version on the test rows: metrics, baselines, champion, slices, gates, as one record.

Belongs here: putting the room's pieces together. Does not belong here: loading models or test rows; predictions come in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from mlplatform.evaluation.budget import BUDGET_GATES
from mlplatform.evaluation.gates import CHAMPION_GATE, SKEW_GATE, gate_names, judge, judge_against_champion
from mlplatform.evaluation.measures import row_loss, scorer, slices_of
from mlplatform.evaluation.paired import Paired, paired_difference
from mlplatform.evaluation.slice_gates import judge_slices, slice_gate_names
from mlplatform.records import Evaluation, GateResult
from mlplatform.specs import ModelSpec


@dataclass(frozen=True)
class Champion:
    """The version that serves now, and its predictions for the very same test rows, in the same order."""

    version: int
    predictions: ArrayLike


def evaluate(
    spec: ModelSpec,
    version: int,
    y: ArrayLike,
    p: ArrayLike,
    frame: pl.DataFrame,
    champion: Champion | None = None,
    baselines: Mapping[str, ArrayLike] | None = None,
    beside: Sequence[GateResult] = (),
) -> Evaluation:
    """The evaluation of `version` on the test rows.

    `y`, `p`: labels (n,) and answers, shape (n,) or (n, quantiles); `frame`: n rows with the spec's slice columns and, for the paired test,
    `event_timestamp`; `baselines`: predictions for the same rows by name; `beside`: gates judged by other things than the test rows.
    Raises ValueError for no rows, or predictions of another length.
    """
    measure = scorer(spec)
    labels = np.asarray(y)
    metrics = dict(measure(labels, np.asarray(p)))
    if metrics["rows"] == 0:
        raise ValueError(f"no test rows to evaluate {spec.name} version {version} on")
    # The champion's own version needs no second scoring: it is compared with itself.
    rival = (
        None if champion is None else metrics if champion.version == version else dict(measure(labels, np.asarray(champion.predictions)))
    )
    champion_version = None if champion is None else champion.version
    slices = slices_of(spec, labels, p, frame)
    gates = judge(spec.gates, metrics) + judge_slices(spec.slice_gates, slices)
    paired = None if champion is None else _paired(spec, labels, np.asarray(p), np.asarray(champion.predictions), frame)
    gates += (judge_against_champion(spec.champion_gate, version, metrics, champion_version, rival, paired),)
    return Evaluation(
        model=spec.name,
        version=version,
        rows=int(metrics["rows"]),
        metrics=metrics,
        baselines={name: measure(labels, np.asarray(predictions)) for name, predictions in (baselines or {}).items()},
        champion_version=champion_version,
        champion_metrics=rival,
        slices=slices,
        gates=(*gates, *beside),
    )


def all_gate_names(spec: ModelSpec) -> tuple[str, ...]:
    """The names of every gate of the model's evaluations, in order."""
    return (*gate_names(spec.gates), *slice_gate_names(spec.slice_gates), CHAMPION_GATE, *BUDGET_GATES, SKEW_GATE)


def _paired(spec: ModelSpec, y: np.ndarray, mine: np.ndarray, theirs: np.ndarray, frame: pl.DataFrame) -> Paired | None:
    losses = row_loss(spec, y, mine), row_loss(spec, y, theirs)
    if losses[0] is None or losses[1] is None or "event_timestamp" not in frame.columns:
        return None
    return paired_difference(losses[0], losses[1], frame["event_timestamp"].dt.date().to_numpy())
