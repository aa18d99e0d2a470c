"""Computes the rows of a feature view at its ticks, from frames of validated rows.

Belongs here: the one entry for a year's backfill, a day and a single tick, and what every view's rows must look like.
Does not belong here: reading or writing tables, reading declarations (`declared`), windows (`windowed`).
"""

from collections.abc import Mapping
from datetime import datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mlplatform.features.plan import TIME, TIMESTAMP, FeatureError, ViewPlan, microseconds, since_epoch
from mlplatform.features.windowed import aggregates


def compute(plan: ViewPlan, tables: Mapping[str, pl.DataFrame], first_tick: datetime, last_tick: datetime) -> pl.DataFrame:
    """The view's rows at every tick from `first_tick` to `last_tick`, both included and multiples of the cadence.

    `tables` maps each of the recipe's inputs to its validated rows on `required_days`; further rows do no harm.
    Returns the join keys, `event_timestamp` (the tick) and the features as Float64 (null = missing), sorted by tick and
    keys. A windowed view has a row for each entity with an event in the view's longest window. Raises FeatureError.
    """
    if missing := sorted(set(plan.recipe.inputs) - set(tables)):
        raise FeatureError(f"view {plan.name}: no rows were given for its inputs {missing}; pass an empty frame where there are none")
    ticks = _ticks(plan, first_tick, last_tick)
    if plan.windowed:
        rows = aggregates(plan, tables, ticks)
        if plan.recipe.finish is not None:
            rows = plan.recipe.finish(rows)
    else:
        assert plan.recipe.compute is not None  # a recipe has exactly one of events and compute
        rows = plan.recipe.compute({name: tables[name] for name in plan.recipe.inputs}, pl.Series(TIME, ticks).cast(TIMESTAMP))
    return _conform(plan, rows, ticks)


def _ticks(plan: ViewPlan, first: datetime, last: datetime) -> NDArray[np.int64]:
    """The ticks in microseconds since the epoch."""
    cadence = microseconds(plan.cadence)
    start, end = since_epoch(first), since_epoch(last)
    if start % cadence or end % cadence:
        raise FeatureError(f"view {plan.name}: ticks are multiples of {plan.cadence} since 1970-01-01 UTC, not {first} … {last}")
    if end < start:
        raise FeatureError(f"view {plan.name}: the last tick {last} is before the first {first}")
    return np.arange(start, end + 1, cadence, dtype=np.int64)


def _conform(plan: ViewPlan, rows: pl.DataFrame, ticks: NDArray[np.int64]) -> pl.DataFrame:
    """The declared columns in the declared order and type; refuses what the view does not allow."""
    if missing := [c for c in (*plan.join_keys, TIME, *plan.features) if c not in rows.columns]:
        raise FeatureError(f"view {plan.name}: nobody computes {missing}; add an aggregation of that name or let the recipe give it")
    features = [pl.col(f).cast(pl.Float64).fill_nan(None) for f in plan.features]
    rows = rows.select(*plan.join_keys, pl.col(TIME).cast(TIMESTAMP), *features)
    strays = rows.filter(~pl.col(TIME).to_physical().is_in(ticks.tolist()))
    if not strays.is_empty():
        raise FeatureError(f"view {plan.name}: its recipe gave {strays.height} rows at times that are no ticks, such as {strays[TIME][0]}")
    if rows.select(*plan.join_keys, TIME).is_duplicated().any():
        raise FeatureError(f"view {plan.name}: its recipe gave an entity two rows at one tick")
    return rows.sort(TIME, *plan.join_keys)
