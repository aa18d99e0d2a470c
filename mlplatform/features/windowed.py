"""Windowed views: from a recipe's events to the declared aggregations at each tick.

Belongs here: cutting events into tiles by entity, and choosing which aggregates each window needs. Does not belong here:
the arithmetic of tiles (`tiles`), computed views and the final shape of the rows (`engine`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mlplatform.features import tiles
from mlplatform.features.plan import TIME, TIMESTAMP, FeatureError, ViewPlan, WindowPlan, microseconds

# Cells of one grid (entities × tiles) held at a time: 16 MB a grid, about ten grids alive.
_BLOCK_CELLS = 2_000_000


@dataclass(frozen=True)
class _Grid:
    """Columns of the tile grids: column k is the tile that ends at `(first + k) * hop` microseconds.

    Column 0 gathers everything before the first tick's longest window: only running sums look there.
    """

    hop: int
    first: int
    ticks: NDArray[np.int64]

    @classmethod
    def of(cls, plan: ViewPlan, ticks: NDArray[np.int64]) -> "_Grid":
        assert plan.hop is not None  # declared with the windows
        hop = microseconds(plan.hop)
        return cls(hop, int(ticks[0]) // hop - microseconds(plan.longest_window) // hop, ticks)

    @property
    def positions(self) -> NDArray[np.int64]:
        """The column of each tick."""
        return self.ticks // self.hop - self.first

    @property
    def width(self) -> int:
        return int(self.positions[-1]) + 1

    def columns_of(self, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.maximum(-(-moments // self.hop) - self.first, 0)


@dataclass(frozen=True)
class _Cells:
    """Events of some entities with the flat index of their tile in a grid of `shape`."""

    index: NDArray[np.int64]
    shape: tuple[int, int]

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Where the event lies in the longest window of some tick."""
        return self.index % self.shape[1] > 0


def aggregates(plan: ViewPlan, tables: Mapping[str, pl.DataFrame], ticks: NDArray[np.int64]) -> pl.DataFrame:
    """Join keys, tick and one Float64 column per aggregation (NaN where there is nothing to aggregate).

    One row per tick (microseconds) and entity with an event in the view's longest window up to it. Raises FeatureError.
    """
    assert plan.recipe.events is not None  # a plan with aggregations has events
    grid = _Grid.of(plan, ticks)
    events = _canonical(plan, plan.recipe.events({name: tables[name] for name in plan.recipe.inputs}), int(ticks[-1]))
    blocks = [_block(plan, entities, block, grid) for entities, block in _entity_blocks(plan, events, grid.width)]
    if not blocks:
        return events.select(*plan.join_keys, TIME).clear().with_columns(pl.lit(None, pl.Float64).alias(a.name) for a in plan.aggregations)
    return pl.concat(blocks)


def _canonical(plan: ViewPlan, events: pl.DataFrame, last_tick: int) -> pl.DataFrame:
    """The events up to the last tick, in one order whatever order they were read in: sums are added in it.

    An event without a join key belongs to no entity and is left out.
    """
    columns = list(dict.fromkeys(a.column for a in plan.aggregations))
    if missing := [c for c in (*plan.join_keys, TIME, *columns) if c not in events.columns]:
        raise FeatureError(f"view {plan.name}: events() gave no column {missing}; its aggregations or join keys need them")
    if events.schema[TIME] != TIMESTAMP:
        raise FeatureError(f"view {plan.name}: event_timestamp is {events.schema[TIME]}, it must be Datetime('us', 'UTC')")
    # NaN and null both mean that the event says nothing about the column.
    values = [pl.col(c).cast(pl.Float64).fill_nan(None) for c in columns]
    chosen = events.lazy().select(*plan.join_keys, TIME, *values)
    chosen = chosen.filter(pl.col(TIME).to_physical() <= last_tick, pl.all_horizontal(pl.col(plan.join_keys).is_not_null()))
    return chosen.sort(*plan.join_keys, TIME, *columns, nulls_last=True).collect()


def _entity_blocks(plan: ViewPlan, events: pl.DataFrame, width: int) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """(entities, their events with the entity's number in `_entity`), so many entities that a grid stays small."""
    if events.is_empty():
        return
    numbered = events.with_columns(pl.struct(plan.join_keys).rle_id().cast(pl.Int64).alias("_entity"))
    entities = numbered.group_by("_entity", maintain_order=True).first().select(plan.join_keys)
    step = max(1, _BLOCK_CELLS // width)
    starts = numbered["_entity"].search_sorted(pl.Series(range(0, entities.height + step, step))).to_list()
    for number, (begin, end) in enumerate(pairwise(starts)):
        if end > begin:
            block = numbered.slice(begin, end - begin).with_columns(pl.col("_entity") - number * step)
            yield entities.slice(number * step, step), block


def _block(plan: ViewPlan, entities: pl.DataFrame, events: pl.DataFrame, grid: _Grid) -> pl.DataFrame:
    shape = (entities.height, grid.width)
    index = events["_entity"].to_numpy() * grid.width + grid.columns_of(events[TIME].to_physical().to_numpy())
    positions = grid.positions
    at_tick, entity = np.nonzero(_alive(plan, _Cells(index, shape), grid.hop)[:, positions].T)
    values: dict[str, tiles.Floats] = {}
    for column in dict.fromkeys(a.column for a in plan.aggregations):
        numbers = events[column].to_numpy()
        known = ~np.isnan(numbers)
        wanted = [a for a in plan.aggregations if a.column == column]
        for name, result in _aggregate(plan, wanted, _Cells(index[known], shape), numbers[known], grid.hop):
            values[name] = result[entity, positions[at_tick]]
    rows = entities[entity].with_columns(pl.Series(TIME, grid.ticks[at_tick]).cast(TIMESTAMP))
    return rows.with_columns(pl.Series(a.name, values[a.name]) for a in plan.aggregations)


def _alive(plan: ViewPlan, cells: _Cells, hop: int) -> NDArray[np.bool_]:
    """Where the entity has an event in its longest window."""
    seen = cells.index[cells.inside]
    span = microseconds(plan.longest_window) // hop
    return tiles.windows(tiles.sum_tiles(seen, np.ones(len(seen)), cells.shape), [span], np.add, 0.0)[span] > 0


def _aggregate(
    plan: ViewPlan, aggregations: list[WindowPlan], cells: _Cells, values: tiles.Floats, hop: int
) -> Iterator[tuple[str, tiles.Floats]]:
    """(name, grid) for each aggregation of one column; the windows share their tiles."""
    for a in aggregations:
        if a.window is None:
            yield a.name, _running_sum(plan, a, cells, values)
    spans = {a.name: microseconds(a.window) // hop for a in aggregations if a.window is not None}
    needs: dict[str, set[int]] = {}
    for a in aggregations:
        if a.window is not None:
            for part in ("sum", "count") if a.function == "mean" else (a.function,):
                needs.setdefault(part, set()).add(spans[a.name])
    inside = cells.inside
    parts = {part: _windows_of(part, cells.index[inside], values[inside], cells.shape, wanted) for part, wanted in needs.items()}
    for a in aggregations:
        if a.window is not None:
            yield a.name, _finished(a.function, parts, spans[a.name])


def _running_sum(plan: ViewPlan, aggregation: WindowPlan, cells: _Cells, values: tiles.Floats) -> tiles.Floats:
    if np.any(values != np.rint(values)):
        raise FeatureError(
            f"view {plan.name}: the running sum {aggregation.name} takes whole numbers only; "
            "with fractions its rounding would depend on where the read began"
        )
    return np.cumsum(tiles.sum_tiles(cells.index, values, cells.shape), axis=1)


def _windows_of(
    part: str, index: NDArray[np.int64], values: tiles.Floats, shape: tuple[int, int], spans: set[int]
) -> dict[int, tiles.Floats]:
    match part:
        case "sum":
            return tiles.windows(tiles.sum_tiles(index, values, shape), spans, np.add, 0.0)
        case "count":
            return tiles.windows(tiles.sum_tiles(index, np.ones(len(values)), shape), spans, np.add, 0.0)
        case "min":
            return tiles.windows(tiles.extreme_tiles(index, values, shape, smallest=True), spans, np.minimum, np.inf)
        case "max":
            return tiles.windows(tiles.extreme_tiles(index, values, shape, smallest=False), spans, np.maximum, -np.inf)
        case _:
            raise FeatureError(f"the engine has no function {part!r}; it knows sum, count, mean, min, max")


def _finished(function: str, parts: Mapping[str, dict[int, tiles.Floats]], span: int) -> tiles.Floats:
    """The aggregate itself. Over no values a sum and a count are 0; a mean, minimum and maximum are NaN."""
    if function == "mean":
        sums, counts = parts["sum"][span], parts["count"][span]
        means = np.full(sums.shape, np.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        return means
    if function in ("min", "max"):
        extremes = parts[function][span]
        return np.where(np.isinf(extremes), np.nan, extremes)
    return parts[function][span]
