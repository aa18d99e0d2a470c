"""Computes the rows of a feature view over a range of times, from frames of validated rows. `plan` has the definition.

Belongs here: the one entry for a year's backfill, a day and a single tick, and what every view's rows must look like.
Does not belong here: reading or writing tables, reading declarations (`declared`), windows (`windowed`).
"""

from collections.abc import Mapping
from datetime import datetime

import numpy as np
import polars as pl

from mlplatform.features.plan import TIME, TIMESTAMP, FeatureError, ViewPlan, microseconds, since_epoch
from mlplatform.features.windowed import aggregates


def compute(plan: ViewPlan, tables: Mapping[str, pl.DataFrame], first_tick: datetime, last_tick: datetime) -> pl.DataFrame:
    """The view's rows from `first_tick` to `last_tick`, both included: multiples of the cadence, or for an event-triggered
    view any two times (`tick_range` gives those of days).

    `tables` maps each of the recipe's inputs to its validated rows on `required_days`; further rows do no harm.
    Returns the join keys, `event_timestamp` (the tick, or the event's time) and the features as Float64 (null = missing),
    sorted by time and keys. Raises FeatureError.
    """
    if missing := sorted(set(plan.recipe.inputs) - set(tables)):
        raise FeatureError(f"view {plan.name}: no rows were given for its inputs {missing}; pass an empty frame where there are none")
    first, last = _range(plan, first_tick, last_tick)
    if plan.windowed:
        aggregated = aggregates(plan, tables, first, last)
        rows = aggregated if plan.recipe.finish is None else plan.recipe.finish(aggregated)
        return _conform(plan, rows, aggregated[TIME])
    assert plan.recipe.compute is not None  # a recipe has exactly one of events and compute
    ticks = pl.Series(TIME, np.arange(first, last + 1, microseconds(plan.cadence))).cast(TIMESTAMP)
    return _conform(plan, plan.recipe.compute({name: tables[name] for name in plan.recipe.inputs}, ticks), ticks)


def _range(plan: ViewPlan, first: datetime, last: datetime) -> tuple[int, int]:
    """The range in microseconds since the epoch."""
    cadence = microseconds(plan.cadence)
    start, end = since_epoch(first), since_epoch(last)
    if not plan.event_triggered and (start % cadence or end % cadence):
        raise FeatureError(f"view {plan.name}: ticks are multiples of {plan.cadence} since 1970-01-01 UTC, not {first} … {last}")
    if end < start:
        raise FeatureError(f"view {plan.name}: the last tick {last} is before the first {first}")
    return start, end


def _conform(plan: ViewPlan, rows: pl.DataFrame, times: pl.Series) -> pl.DataFrame:
    """The declared columns in the declared order and type; refuses what the view does not allow, such as a row at none of `times`."""
    if missing := [c for c in (*plan.join_keys, TIME, *plan.features) if c not in rows.columns]:
        raise FeatureError(f"view {plan.name}: nobody computes {missing}; add an aggregation of that name or let the recipe give it")
    features = [pl.col(f).cast(pl.Float64).fill_nan(None) for f in plan.features]
    rows = rows.select(*plan.join_keys, pl.col(TIME).cast(TIMESTAMP), *features)
    strays = rows.filter(~pl.col(TIME).is_in(times.unique().implode()).fill_null(False))
    if not strays.is_empty():
        moment = "event times" if plan.event_triggered else "ticks"
        raise FeatureError(
            f"view {plan.name}: its recipe gave {strays.height} rows at times that are no {moment}, such as {strays[TIME][0]}"
        )
    rows = rows.sort(TIME, *plan.join_keys)
    identity = pl.col(TIME, *plan.join_keys)
    if rows.select(pl.all_horizontal(identity.eq_missing(identity.shift(1)))).to_series().any():
        raise FeatureError(f"view {plan.name}: its recipe gave an entity two rows at one time")
    return rows
