"""Drift of inputs and predictions against what the model was trained on, measured and reported by Evidently.

Belongs here: choosing rows, columns and method, running the report, reading its scores, a compact plot. Does not belong
here: acting on drift (retrain.py).

Method. By default the population stability index over equal-width bins, sum((r-c)·ln(r/c)), with the usual reading that
above 0.25 a distribution has shifted (Siddiqi 2006, "Credit Risk Scorecards", ch. 6), the same for numbers and categories.
It is a description, not a calibrated alarm: windows of days differ from months of training data by season and weather
alone, and Evidently's own default calls most columns drifted on an ordinary day. Alarms with a known rate of false ones
need a reference of like windows.

Outliers. Equal-width bins over a range that one absurd value has stretched put everything else into one bin, and see
nothing. Numbers are therefore held within half the width of the reference's 1st to 99th percentile beyond it, on both
sides: what lies further out counts in the outermost bins.

Missing values. Evidently drops them, and so never sees that a source fell silent. A column whose share of missing values
differs by a hundredth or more is therefore compared a second time, as present or missing; its score is the larger of the
two. (A smaller difference stays below every threshold of THRESHOLDS, and each comparison costs time.)
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from mlplatform.figures import BLUE, GREY, ORANGE, blank, png
from mlplatform.records import DriftSummary

# Distances that work on numbers and categories alike and grow with drift. p-value tests are left out on purpose: with this
# many rows they reject for differences of no importance.
Method = Literal["psi", "jensenshannon", "hellinger"]

# Where a distribution is called drifted unless the caller says otherwise: see the module's text for psi, Evidently's own
# defaults for the two distances between 0 and 1.
THRESHOLDS: Mapping[Method, float] = {"psi": 0.25, "jensenshannon": 0.1, "hellinger": 0.1}
MAX_ROWS = 20_000
MIN_ROWS = 200
_PRESENCE_SHARE = 0.01


@dataclass(frozen=True)
class _Pair:
    """One comparison: a column of both sides, text for categories and Float64 for numbers, null where there is no value."""

    column: str
    title: str
    category: bool
    reference: pl.Series
    current: pl.Series


def data_drift(
    reference: pl.DataFrame,
    current: pl.DataFrame,
    columns: Sequence[str],
    *,
    model: str,
    html: Path | None = None,
    categorical: Collection[str] = (),
    method: Method = "psi",
    threshold: float | None = None,
    min_rows: int = MIN_ROWS,
    seed: int = 0,
    kind: str = "data_drift",
) -> DriftSummary | None:
    """Drift of each of `columns` in `current` against `reference`; writes Evidently's report to `html` where given.

    Text, booleans and the columns named in `categorical` (codes) are compared as categories, other columns as numbers. Each
    side is sampled to MAX_ROWS rows with `seed`, so that a report of 60 columns takes seconds.
    `threshold` None: the method's in THRESHOLDS.
    Returns None where either side has fewer than `min_rows` rows: nothing was measured, which is not "no drift". A column
    with no value at all on either side cannot be compared: it is in `not_compared`, and counts neither as drifted nor as
    a column. Raises ValueError for a column either frame lacks, or none that can be compared.
    """
    for name, frame in (("reference", reference), ("current", current)):
        if absent := set(columns) - set(frame.columns):
            raise ValueError(f"the {name} rows lack columns {sorted(absent)}")
    if min(reference.height, current.height) < max(1, min_rows):
        return None
    limit = THRESHOLDS[method] if threshold is None else threshold
    sides = (_sampled(reference, seed), _sampled(current, seed))
    pairs = [pair for column in columns for pair in _pairs(column, sides[0][column], sides[1][column], column in categorical)]
    if not pairs:
        raise ValueError(f"none of the columns {list(columns)} has a value")
    scores: dict[str, float] = {}
    for pair, value in zip(pairs, _evidently(pairs, method, limit, html), strict=True):
        scores[pair.column] = max(value, scores.get(pair.column, value))
    return DriftSummary(
        model=model,
        kind=kind,
        reference_rows=reference.height,
        current_rows=current.height,
        drifted=sum(value >= limit for value in scores.values()),
        columns=len(scores),
        scores=scores,
        threshold=limit,
        method=method,
        not_compared=tuple(c for c in columns if c not in scores),
    )


def prediction_drift(
    reference: np.ndarray,
    current: np.ndarray,
    *,
    model: str,
    html: Path | None = None,
    method: Method = "psi",
    threshold: float | None = None,
    min_rows: int = MIN_ROWS,
    seed: int = 0,
) -> DriftSummary | None:
    """Drift of the predictions (1-D arrays) against those for the reference rows, as `data_drift` over one column `prediction`."""
    return data_drift(
        pl.DataFrame({"prediction": np.asarray(reference, dtype=np.float64)}),
        pl.DataFrame({"prediction": np.asarray(current, dtype=np.float64)}),
        ["prediction"],
        model=model,
        html=html,
        method=method,
        threshold=threshold,
        min_rows=min_rows,
        seed=seed,
        kind="prediction_drift",
    )


def drift_plot(summary: DriftSummary, shown: int = 25) -> bytes:
    """The `shown` largest scores with the threshold, as PNG bytes."""
    largest = sorted(summary.scores.items(), key=lambda item: item[1])[-shown:]
    figure, axes = blank(height_in=max(2.0, 0.22 * len(largest) + 1.0))
    colours = [ORANGE if value >= summary.threshold else BLUE for _, value in largest]
    axes.barh([name for name, _ in largest], [value for _, value in largest], color=colours)
    axes.axvline(summary.threshold, color=GREY, linestyle="--", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel=summary.method, title=f"{summary.drifted} of {summary.columns} above {summary.threshold:g}")
    return png(figure)


def _sampled(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    return frame.sample(MAX_ROWS, seed=seed) if frame.height > MAX_ROWS else frame


def _pairs(column: str, reference: pl.Series, current: pl.Series, named: bool) -> list[_Pair]:
    """What to compare of one column: its values where both sides have some, and its presence where that differs."""
    kinds = [s.dtype for s in (reference, current) if s.dtype != pl.Null]  # an all-null column has no type of its own
    category = named or any(not (dtype.is_numeric() or dtype.is_temporal()) for dtype in kinds)
    old, new = _plain(reference, category), _plain(current, category)
    there = (old.is_not_null(), new.is_not_null())
    if not category:
        old, new = _held(old, new)
    pairs = []
    if all(t.any() for t in there):  # values on both sides
        pairs.append(_Pair(column, column, category, old, new))
    shares = [float(t.mean() or 0.0) for t in there]  # an empty side never gets here: too few rows
    if any(shares) and (not pairs or abs(shares[0] - shares[1]) >= _PRESENCE_SHARE):
        pairs.append(_Pair(column, f"{column} (present)", True, there[0].cast(pl.String), there[1].cast(pl.String)))
    return pairs


def _held(reference: pl.Series, current: pl.Series) -> tuple[pl.Series, pl.Series]:
    low, high = reference.quantile(0.01), reference.quantile(0.99)
    if low is None or high is None or low == high:
        return reference, current  # no width to measure by, and no way to tell a new value from an outlier
    margin = (high - low) / 2
    return reference.clip(low - margin, high + margin), current.clip(low - margin, high + margin)


def _plain(values: pl.Series, category: bool) -> pl.Series:
    if values.dtype.is_temporal():
        values = values.to_physical()
    if values.dtype.is_numeric() or values.dtype == pl.Null:
        numbers = values.cast(pl.Float64)
        # Codes may be integers on one side and floats on the other: the same text for both.
        values = numbers.set(~numbers.is_finite(), None)
    return values.cast(pl.String if category else pl.Float64)


def _evidently(pairs: Sequence[_Pair], method: str, threshold: float, html: Path | None) -> list[float]:
    """Evidently's score of each pair, in order; each side's columns under the pairs' titles."""
    import pandas as pd

    with warnings.catch_warnings():
        # Evidently 0.7.23 reads numpy.core, and pulls in litestar's old names, while it is imported; nothing of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift

    definition = DataDefinition(
        numerical_columns=[p.title for p in pairs if not p.category], categorical_columns=[p.title for p in pairs if p.category]
    )
    current, reference = (
        Dataset.from_pandas(
            pd.DataFrame({p.title: getattr(p, side).to_list() if p.category else getattr(p, side).to_numpy() for p in pairs}),
            data_definition=definition,
        )
        for side in ("current", "reference")
    )
    report = Report([ValueDrift(column=p.title, method=method, threshold=threshold) for p in pairs])
    result = report.run(current_data=current, reference_data=reference)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        result.save_html(str(html))
    measured = {metric["config"]["column"]: float(metric["value"]) for metric in result.dict()["metrics"]}
    return [measured[p.title] for p in pairs]
