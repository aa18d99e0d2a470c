"""A windowed view as a state machine: changes of its events go in, the rows that became due or changed come out.

Belongs here: which rows of which entities are due, and what a late event restates. Does not belong here: tiles and windows
(`stream_entity`), where events come from (`stream_changes`), writing rows (`mlplatform.orchestration`).

The rows are those that `engine.compute` gives for the same events, cell by cell, in whatever order the events come.
A row is given again when its aggregates changed; a row whose reason went away is given once more, with nulls.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from mlplatform.features.plan import TIME, TIMESTAMP, ViewPlan, WindowPlan, microseconds
from mlplatform.features.stream_entity import Cursor, Entity, Layout, Values
from mlplatform.features.stream_exact import bits_needed, to_float, to_integers

COPIES = "__copies"

Key = tuple[object, ...]
Aggregates = tuple[float | None, ...]
Rows = dict[int, Aggregates]  # by time, ascending


@dataclass
class Emission:
    """Rows to write: join keys, `event_timestamp`, features. `restated` of them replace a row given before."""

    rows: pl.DataFrame
    restated: int = 0


@dataclass
class _Gathered:
    keys: list[Key] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    values: list[Aggregates | None] = field(default_factory=list)  # None: withdrawn

    def add(self, key: Key, time: int, values: Aggregates | None) -> None:
        self.keys.append(key)
        self.times.append(time)
        self.values.append(values)


class ViewState:
    """The state of one view. Times are microseconds since 1970 UTC.

    `since`: the first moment rows are given for; events before it only fill the windows.
    """

    def __init__(self, plan: ViewPlan, since: int) -> None:
        self.plan = plan
        self.layout = Layout.of(plan)
        self.entities: dict[Key, Entity] = {}
        self.horizon = since  # rows before it are not given any more
        self._by_event = plan.event_triggered
        self._cadence = microseconds(plan.cadence)
        self._given = since - 1  # rows up to this moment have been given
        self._outputs = tuple(_Output.of(a, self.layout) for a in plan.aggregations)
        self._bits = [0] * len(self.layout.columns)
        self._waiting: list[tuple[int, Key]] = []  # heap of events that lie ahead: (time, entity)
        self._schema: dict[str, pl.DataType] = {}
        self._forgotten = since // self.layout.hop

    def advance(self, changes: pl.DataFrame | None, now: int, horizon: int | None = None) -> Emission:
        """Takes in changed events and gives the rows that are due at `now` or changed by it.

        `changes`: join keys, `event_timestamp`, the aggregated columns (Float64, null = says nothing) and `__copies`
        (+n added, -n taken away). `horizon`: rows before it are left as they are. Raises StaleStateError.
        """
        self.horizon = max(self.horizon, horizon if horizon is not None else self.horizon)
        gathered, restated = _Gathered(), _Gathered()
        by_entity = self._by_entity(changes)
        before = {key: self._given_rows(key, first) for key, (first, _) in by_entity.items()}
        for key, (_, events) in by_entity.items():
            self._apply(key, events, now)
        touched = {key: first for key, (first, _) in by_entity.items()}
        for key, first in self._fallen_due(now):
            touched[key] = min(first, touched.get(key, first))
        for key, first in touched.items():
            self._compare(key, first, now, before.get(key, {}), gathered, restated)
        if not self._by_event:
            self._ticks(now, gathered)
        self._given = max(self._given, now)
        self._forget()
        return Emission(self._frame(gathered, restated), len(restated.times))

    @property
    def given(self) -> int:
        """Rows up to this moment have been given."""
        return self._given

    def warm(self, now: int) -> None:
        """Brings every entity's windows to the last hop before `now`, so that its next row finds them there."""
        for entity in self.entities.values():
            # Between hops a tile would be taken in part, for which not every view keeps the single events.
            entity.at(self.layout, now // self.layout.hop * self.layout.hop)

    # --- taking in ---

    def _by_entity(self, changes: pl.DataFrame | None) -> dict[Key, tuple[int, list[tuple[int, Values, int]]]]:
        """Per entity the time of its first change, and its changes."""
        found: dict[Key, tuple[int, list[tuple[int, Values, int]]]] = {}
        if changes is None:
            return found
        self._schema = {name: changes.schema[name] for name in self.plan.join_keys}
        if changes.is_empty():
            return found
        columns = [self._integers(changes, i) for i in range(len(self.layout.columns))]
        times, copies = changes[TIME].to_physical().to_list(), changes[COPIES].to_list()
        keys = zip(*(changes[name].to_list() for name in self.plan.join_keys), strict=True)
        for key, time, n, *values in zip(keys, times, copies, *columns, strict=True):
            event = (time, tuple(values), n)
            if key in found:
                first, events = found[key]
                events.append(event)
                found[key] = (min(first, time), events)
            else:
                found[key] = (time, [event])
        return found

    def _integers(self, changes: pl.DataFrame, column: int) -> list[int | None]:
        values = changes[self.layout.columns[column]]
        needed = bits_needed(values)
        if needed > self._bits[column]:
            for entity in self.entities.values():
                entity.rescale(self.layout, column, needed - self._bits[column])
            self._bits[column] = needed
        return to_integers(values, self._bits[column])

    def _apply(self, key: Key, events: list[tuple[int, Values, int]], now: int) -> None:
        entity = self.entities.get(key)
        if entity is None:
            entity = self.entities[key] = Entity(self.layout)
        # What is taken away may have been added by a change of the same batch.
        for time, values, copies in sorted(events, key=_added_first):
            entity.apply(self.layout, time, values, copies)
            if self._by_event and time > now:
                heapq.heappush(self._waiting, (time, key))

    def _fallen_due(self, now: int) -> Iterator[tuple[Key, int]]:
        """Entities with an event that lay ahead and has come, with its time."""
        while self._waiting and self._waiting[0][0] <= now:
            time, key = heapq.heappop(self._waiting)
            yield key, time

    # --- giving out ---

    def _given_rows(self, key: Key, first: int) -> Rows:
        """The rows that were given for an entity from `first` on, as its events give them before the change."""
        entity = self.entities.get(key)
        first = max(first, self._first_open)
        return {} if entity is None or first > self._given else self._rows(entity, first, self._given)

    def _compare(self, key: Key, first: int, now: int, before: Rows, gathered: _Gathered, restated: _Gathered) -> None:
        entity = self.entities.get(key)
        first, last = max(first, self._first_open), now if self._by_event else self._given
        if entity is None or first > last:
            return
        after = self._rows(entity, first, last)
        for time, values in after.items():
            known = before.get(time)
            if known is None:
                gathered.add(key, time, values)
            elif known != values:
                restated.add(key, time, values)
        for time in sorted(before.keys() - after.keys()):
            restated.add(key, time, None)

    @property
    def _first_open(self) -> int:
        """Rows from here on can be given: those after the horizon, and those that never were, should the clock have leapt."""
        return min(self.horizon, self._given + 1)

    def _rows(self, entity: Entity, first: int, last: int) -> Rows:
        if self._by_event:
            times = entity.times(self.layout, first, last)
        else:
            times = list(range(-(-first // self._cadence) * self._cadence, last + 1, self._cadence))
        rows: Rows = {}
        for time in times:
            cursor = entity.at(self.layout, time)
            if cursor.totals[-1][0]:
                rows[time] = self._aggregates(cursor)
        return rows

    def _ticks(self, now: int, gathered: _Gathered) -> None:
        """The rows of all living entities at the ticks that have come since the last time."""
        first = (self._given // self._cadence + 1) * self._cadence
        for tick in range(first, now + 1, self._cadence):
            for key, entity in self.entities.items():
                cursor = entity.at(self.layout, tick)
                if cursor.totals[-1][0]:
                    gathered.add(key, tick, self._aggregates(cursor))

    def _aggregates(self, cursor: Cursor) -> Aggregates:
        return tuple([_aggregate(cursor, output, 1 << self._bits[output.column]) for output in self._outputs])

    def _frame(self, *parts: _Gathered) -> pl.DataFrame:
        """The rows as `engine.compute` gives them; withdrawn ones with nulls for features."""
        plan = self.plan
        standing = [(k, t, v) for part in parts for k, t, v in zip(part.keys, part.times, part.values, strict=True) if v is not None]
        gone = [(k, t) for part in parts for k, t, v in zip(part.keys, part.times, part.values, strict=True) if v is None]
        rows = self._keyed([k for k, _, _ in standing], [t for _, t, _ in standing])
        columns = zip(*(v for _, _, v in standing), strict=True) if standing else [()] * len(plan.aggregations)
        # As in the batch: a recipe's finish sees NaN where there is nothing to aggregate.
        rows = rows.with_columns(
            pl.Series(a.name, column, dtype=pl.Float64).fill_null(float("nan"))
            for a, column in zip(plan.aggregations, columns, strict=True)
        )
        if plan.recipe.finish is not None and standing:
            rows = plan.recipe.finish(rows)
        features = [(pl.col(f) if standing else pl.lit(None)).cast(pl.Float64).fill_nan(None).alias(f) for f in plan.features]
        rows = rows.select(*plan.join_keys, TIME, *features)
        if gone:
            withdrawn = self._keyed([k for k, _ in gone], [t for _, t in gone])
            rows = pl.concat([rows, withdrawn.with_columns(pl.lit(None, pl.Float64).alias(f) for f in plan.features)])
        return rows.sort(TIME, *plan.join_keys)

    def _keyed(self, keys: list[Key], times: list[int]) -> pl.DataFrame:
        names = self.plan.join_keys
        parts: list[Sequence[object]] = list(zip(*keys, strict=True)) if keys else [()] * len(names)
        columns = [pl.Series(name, part, dtype=self._schema.get(name, pl.Null())) for name, part in zip(names, parts, strict=True)]
        return pl.DataFrame([*columns, pl.Series(TIME, times, dtype=pl.Int64).cast(TIMESTAMP)])

    # --- forgetting ---

    def _forget(self) -> None:
        """Once a hop: what no row from the horizon on can need."""
        if self.horizon // self.layout.hop <= self._forgotten:
            return
        self._forgotten = self.horizon // self.layout.hop
        self.entities = {key: entity for key, entity in self.entities.items() if entity.forget(self.layout, self.horizon)}


@dataclass(frozen=True)
class _Output:
    """Where an aggregation finds its numbers: `column` and `window` by position, `extreme` by position among the extremes."""

    function: str
    column: int
    window: int | None  # None: a running sum
    extreme: int

    @classmethod
    def of(cls, aggregation: WindowPlan, layout: Layout) -> "_Output":
        column = layout.columns.index(aggregation.column)
        window = None if aggregation.window is None else layout.spans.index(microseconds(aggregation.window) // layout.hop)
        extreme = (column, aggregation.function == "min")
        return cls(aggregation.function, column, window, layout.extremes.index(extreme) if extreme in layout.extremes else -1)


def _aggregate(cursor: Cursor, output: _Output, one: int) -> float | None:
    """Over no values a sum and a count are 0; a mean, minimum and maximum are None."""
    at = 1 + 2 * output.column
    if output.window is None:
        return to_float(cursor.running[at], one)
    totals = cursor.totals[output.window]
    match output.function:
        case "sum":
            return to_float(totals[at], one)
        case "count":
            return float(totals[at + 1])
        case "mean":
            return to_float(totals[at], one) / totals[at + 1] if totals[at + 1] else None
        case _:
            value = cursor.extremes[output.window][output.extreme].value()
            return None if value is None else to_float(value, one)


def _added_first(event: tuple[int, Values, int]) -> int:
    return -event[2]
