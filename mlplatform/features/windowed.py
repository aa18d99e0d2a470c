"""Windowed views: from a recipe's events to the declared aggregations of each row.

Belongs here: bringing events into order, blocks of entities, and which slice each aggregation is computed from. Does not
belong here: positions (`slices`), values of slices (`exact`, `extremes`), computed views and the final shape of rows (`engine`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mlplatform.features.exact import PrefixSums, prefix_sums
from mlplatform.features.extremes import minima
from mlplatform.features.plan import TIME, TIMESTAMP, FeatureError, ViewPlan, microseconds
from mlplatform.features.slices import Runs, Timeline, at_events, at_ticks

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Events and rows held at a time (of whole entities): each is a handful of numbers for every aggregation.
_BLOCK = 500_000


def aggregates(plan: ViewPlan, tables: Mapping[str, pl.DataFrame], first: int, last: int) -> pl.DataFrame:
    """Join keys, `event_timestamp` and one Float64 column per aggregation (NaN where there is nothing to aggregate).

    The view's rows of `first … last` (microseconds, both included; ticks, or for an event-triggered view any times), by
    entity and time. Raises FeatureError.
    """
    assert plan.recipe.events is not None  # a plan with aggregations has events
    events = _within(plan, plan.recipe.events({name: tables[name] for name in plan.recipe.inputs}), first, last)
    if events.is_empty():
        return events.select(*plan.join_keys, TIME).with_columns(pl.lit(None, pl.Float64).alias(a.name) for a in plan.aggregations)
    entities = events.select(plan.join_keys).unique().sort(plan.join_keys).with_row_index("_entity")
    # Two sorts of one column each take half the time of one sort of both.
    ordered = events.join(entities, on=plan.join_keys).drop(plan.join_keys).sort(TIME).sort("_entity", maintain_order=True)
    return pl.concat(_rows(plan, block, entities.select(plan.join_keys)) for block in _blocks(plan, ordered, first, last))


def _within(plan: ViewPlan, events: pl.DataFrame, first: int, last: int) -> pl.DataFrame:
    """The events that rows of `first … last` may look at. An event without a join key belongs to no entity."""
    columns = list(dict.fromkeys(a.column for a in plan.aggregations))
    if missing := [c for c in (*plan.join_keys, TIME, *columns) if c not in events.columns]:
        raise FeatureError(f"view {plan.name}: events() gave no column {missing}; its aggregations or join keys need them")
    if events.schema[TIME] != TIMESTAMP:
        raise FeatureError(f"view {plan.name}: event_timestamp is {events.schema[TIME]}, it must be Datetime('us', 'UTC')")
    # A running sum reaches back to the first event there is.
    running = any(a.window is None for a in plan.aggregations)
    after = -(2**63) if running else _starts(plan, np.array([first]), microseconds(plan.longest_window)).item()
    moment = pl.col(TIME).to_physical()
    # Adding zero turns -0.0 into 0.0: which of the two is the smaller would depend on their order.
    values = [pl.col(c).cast(pl.Float64).fill_null(float("nan")) + 0.0 for c in columns]
    chosen = events.lazy().select(*plan.join_keys, TIME, *values)
    chosen = chosen.filter(moment > after, moment <= last, pl.all_horizontal(pl.col(plan.join_keys).is_not_null()))
    found = chosen.collect()
    for column in columns:
        if found[column].is_infinite().any():
            raise FeatureError(f"view {plan.name}: events() gave an infinite {column}; make it null, or bound it in the recipe")
    return found


def _starts(plan: ViewPlan, moments: Integers, window: int) -> Integers:
    """`window_start` of each moment, in microseconds."""
    assert plan.hop is not None  # declared with the windows
    hop = microseconds(plan.hop)
    starts: Integers = (moments - window) // hop * hop
    return starts


@dataclass(frozen=True)
class _Block:
    """Some entities' events in order, each with its entity's number (0, 1, …) within the block, and the rows they bring."""

    events: pl.DataFrame
    first_entity: int
    entity: Integers
    time: Integers
    runs: Runs


def _blocks(plan: ViewPlan, events: pl.DataFrame, first: int, last: int) -> Iterator[_Block]:
    """Whole entities, of about `_BLOCK` events and rows together, or one entity of more."""
    time = events[TIME].to_physical().to_numpy()
    entity = events["_entity"].to_numpy().astype(np.int64)
    if plan.event_triggered:
        runs = at_events(entity, time, first, last)
    else:
        runs = at_ticks(entity, time, first, last, microseconds(plan.cadence), microseconds(plan.longest_window))
    begins = np.append(np.flatnonzero(np.diff(entity, prepend=-1)), len(entity))
    size = np.add.reduceat(runs.counts + 1, begins[:-1])
    before = np.cumsum(size) - size
    block = np.stack([before // _BLOCK, np.arange(len(size)) // Timeline.fits(time)])
    changes = np.flatnonzero(np.any(np.diff(block, prepend=-1), axis=0))
    for one, following in zip(changes, np.append(changes[1:], len(size)), strict=True):
        begin, end = int(begins[one]), int(begins[following])
        yield _Block(events[begin:end], int(one), entity[begin:end] - one, time[begin:end], runs.part(begin, end))


def _rows(plan: ViewPlan, block: _Block, entities: pl.DataFrame) -> pl.DataFrame:
    event, moments = block.runs.rows()
    entity, timeline = block.entity[event], Timeline(block.entity, block.time)
    ends = timeline.until(entity, moments)
    columns = {c: _Column(block.events[c].to_numpy()) for c in dict.fromkeys(a.column for a in plan.aggregations)}
    found: dict[str, Floats] = {}
    for window in dict.fromkeys(a.window for a in plan.aggregations):
        begins = timeline.begin(entity) if window is None else timeline.until(entity, _starts(plan, moments, microseconds(window)))
        for name, column in columns.items():
            slices = _Slices(column, begins, ends)
            found |= {a.name: slices.aggregated(a.function) for a in plan.aggregations if (a.window, a.column) == (window, name)}
    rows = entities[block.first_entity + entity].with_columns(pl.Series(TIME, moments).cast(TIMESTAMP))
    return rows.with_columns(pl.Series(a.name, found[a.name]) for a in plan.aggregations)


class _Column:
    """What a block's events say in one column: `values` without the NaN of those that say nothing."""

    def __init__(self, values: Floats) -> None:
        known = ~np.isnan(values)
        self.values = values[known]
        self.known_before = np.append(0, np.cumsum(known))

    @cached_property
    def sums(self) -> PrefixSums:
        return prefix_sums(self.values)


class _Slices:
    """The slices `begins[i] … ends[i] - 1` of a block's events, in one column."""

    def __init__(self, column: _Column, begins: Integers, ends: Integers) -> None:
        self._column = column
        self._events = begins, ends

    def aggregated(self, function: str) -> Floats:
        """`function` of each slice. Over no values a sum and a count are 0; a mean, minimum and maximum are NaN."""
        match function:
            case "sum":
                return self._sums
            case "count":
                return self._counts.astype(np.float64)
            case "mean":
                means = np.full(len(self._counts), np.nan)
                np.divide(self._sums, self._counts, out=means, where=self._counts > 0)
                return means
            case "min":
                return minima(self._column.values, *self._known)
            case "max":
                return -minima(-self._column.values, *self._known)
            case _:
                raise FeatureError(f"the engine has no function {function!r}; it knows sum, count, mean, min, max")

    @cached_property
    def _known(self) -> tuple[Integers, Integers]:
        """The slices among the column's values."""
        begins, ends = self._events
        return self._column.known_before[begins], self._column.known_before[ends]

    @cached_property
    def _counts(self) -> Integers:
        return self._known[1] - self._known[0]

    @cached_property
    def _sums(self) -> Floats:
        return self._column.sums.between(*self._known)
