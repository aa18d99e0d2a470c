"""How the answers of a model are measured, by its task; everything that measures goes through here.

Belongs here: which metrics, baselines, slices and order of better belong to which task. Does not belong here: computing them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from mlplatform.evaluation.baselines import baseline_predictions, constant_quantiles
from mlplatform.evaluation.metrics import row_brier, row_log_loss, score
from mlplatform.evaluation.quantile_metrics import row_pinball, score_quantiles
from mlplatform.evaluation.slices import quantile_slices, slice_metrics
from mlplatform.specs import ModelSpec

# (labels, answers) -> metrics by name
Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


def scorer(spec: ModelSpec) -> Score:
    """What evaluation, comparison with the champion and monitoring measure by: labels clipped as the model declares."""
    if spec.quantiles:
        return lambda y, q: score_quantiles(label_of(spec, y), q, spec.quantiles)
    return partial(score, cost=spec.cost)


def label_of(spec: ModelSpec, y: ArrayLike) -> np.ndarray:
    """Labels within `spec.label_range`."""
    labels = np.asarray(y, dtype=np.float64)
    return labels if spec.label_range is None else np.clip(labels, *spec.label_range)


def row_loss(spec: ModelSpec, y: np.ndarray, answers: np.ndarray) -> np.ndarray | None:
    """The loss per row (n,) whose mean is the champion gate's metric; None where that metric is no such mean (AUC) or no loss."""
    metric = spec.champion_gate.metric
    if spec.champion_gate.higher_is_better:
        return None
    if spec.quantiles:
        return row_pinball(label_of(spec, y), answers, spec.quantiles).mean(axis=1) if metric == "pinball" else None
    losses = {"log_loss": row_log_loss, "brier": row_brier}
    return losses[metric](y, answers) if metric in losses else None


def slices_of(spec: ModelSpec, y: ArrayLike, answers: ArrayLike, frame: pl.DataFrame) -> tuple[Mapping[str, Any], ...]:
    if spec.quantiles:
        return quantile_slices(label_of(spec, y), answers, spec.quantiles, frame, spec.slices)
    return slice_metrics(y, answers, frame, spec.slices)


def baselines_of(
    spec: ModelSpec, train: pl.DataFrame, test: pl.DataFrame, numeric: Sequence[str], categorical: Sequence[str]
) -> dict[str, np.ndarray]:
    """Answers of the task's baselines for the test rows, by name."""
    if spec.quantiles:
        return {"constant": constant_quantiles(train, test.height, spec.quantiles)}
    return baseline_predictions(train, test, numeric, categorical, spec.seed)


def shown_metrics(spec: ModelSpec) -> tuple[str, ...]:
    """What a comparison of versions shows first."""
    return ("pinball_p50", "mae", "pinball", "coverage") if spec.quantiles else ("auc", "log_loss", "brier", "ece", "saving")


def by_day_columns(spec: ModelSpec) -> tuple[str, ...]:
    """What a table over days shows of the served answers."""
    return ("mae", "pinball", "coverage", "mean_label", "mean_prediction") if spec.quantiles else _BINARY_BY_DAY


_BINARY_BY_DAY = ("auc", "log_loss", "base_rate", "mean_prediction")
