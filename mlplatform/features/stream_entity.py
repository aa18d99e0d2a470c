"""One entity's tiles, and the windows that slide over them as time goes on.

Belongs here: adding and removing events, and the aggregates at a time, on exact integers. Does not belong here: frames,
which rows are due (`stream_view`), conversion to and from float64 (`stream_exact`).

Tile k holds the events of ((k-1)·hop, k·hop]. A `Cursor` stands at a time and holds the totals of every window that ends
there; moving it on adds what comes in and takes out the tiles that leave, so an event costs the same for a window of an
hour and of a month. An event at or before the cursor's time throws the cursor away; it is built anew from the tiles.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlplatform.features.plan import ViewPlan, microseconds

# Per column its value times a power of two, None where the event says nothing about the column.
Values = tuple[int | None, ...]
# Number of events, then per column the sum and the count of its values.
Numbers = list[int]


class StaleStateError(RuntimeError):
    """The state no longer holds what a change needs (single events of a closed tile): build it anew from the tables."""


@dataclass(frozen=True)
class Layout:
    """What of a view's plan its entities need. Times and `hop` in microseconds, `spans` in tiles, ascending."""

    columns: tuple[str, ...]
    hop: int
    spans: tuple[int, ...]
    # (column, True for the smallest) of each minimum and maximum.
    extremes: tuple[tuple[int, bool], ...]
    running: bool  # whether there is a running sum
    keep_events: bool  # single events are needed: rows at their times, or a minimum that may have to be found again

    @classmethod
    def of(cls, plan: ViewPlan) -> "Layout":
        assert plan.hop is not None  # windowed views only
        hop = microseconds(plan.hop)
        columns = tuple(dict.fromkeys(a.column for a in plan.aggregations))
        spans = {microseconds(a.window) // hop for a in plan.aggregations if a.window is not None}
        extremes = dict.fromkeys((columns.index(a.column), a.function == "min") for a in plan.aggregations if a.function in ("min", "max"))
        return cls(
            columns=columns,
            hop=hop,
            spans=tuple(sorted(spans)),
            extremes=tuple(extremes),
            running=any(a.window is None for a in plan.aggregations),
            keep_events=plan.event_triggered or bool(extremes),
        )

    @property
    def longest(self) -> int:
        return self.spans[-1]

    def nothing(self) -> Numbers:
        return [0] * (1 + 2 * len(self.columns))


class Tile:
    """`numbers` of all its events; the events themselves, by time, while the tile is open; then its `extremes`."""

    __slots__ = ("events", "extremes", "numbers")

    def __init__(self, layout: Layout) -> None:
        self.numbers = layout.nothing()
        self.events: list[tuple[int, Values]] | None = [] if layout.keep_events else None
        self.extremes: tuple[int | None, ...] | None = None

    def found_extremes(self, layout: Layout) -> tuple[int | None, ...]:
        if self.extremes is not None or self.events is None:
            return self.extremes or ()
        found: list[int | None] = []
        for column, smallest in layout.extremes:
            known = [v[column] for _, v in self.events if v[column] is not None]
            found.append(None if not known else min(known) if smallest else max(known))  # type: ignore[type-var]
        return tuple(found)


class Extreme:
    """The minimum (or maximum) of a sliding window: candidates in order of time, each better than all before it were.

    Every value enters and leaves once, so a step costs O(1) in the mean (the monotonic queue of sliding-window minima).
    """

    __slots__ = ("queue", "smallest")

    def __init__(self, smallest: bool) -> None:
        self.smallest = smallest
        self.queue: deque[tuple[int, int]] = deque()

    def push(self, tile: int, value: int) -> None:
        queue = self.queue
        while queue and (queue[-1][1] >= value if self.smallest else queue[-1][1] <= value):
            queue.pop()
        queue.append((tile, value))

    def expire(self, last_out: int) -> None:
        while self.queue and self.queue[0][0] <= last_out:
            self.queue.popleft()

    def value(self) -> int | None:
        return self.queue[0][1] if self.queue else None


class Cursor:
    """Totals of each window that ends at `time`; `running` of everything up to it."""

    __slots__ = ("extremes", "running", "time", "totals")

    def __init__(self, time: int, layout: Layout) -> None:
        self.time = time
        self.totals: list[Numbers] = [layout.nothing() for _ in layout.spans]
        self.running = layout.nothing()
        self.extremes = [[Extreme(smallest) for _, smallest in layout.extremes] for _ in layout.spans]


class Entity:
    """All that is known of one entity: its tiles by number, their numbers in order, and what older tiles summed to."""

    __slots__ = ("before", "closed", "cursor", "order", "tiles")

    def __init__(self, layout: Layout) -> None:
        self.tiles: dict[int, Tile] = {}
        self.order: list[int] = []
        self.before = layout.nothing()
        self.closed = -(1 << 62)  # tiles up to this number have been closed
        self.cursor: Cursor | None = None

    # --- events ---

    def apply(self, layout: Layout, time: int, values: Values, copies: int) -> None:
        """Adds the event `copies` times (takes it away where negative). Raises StaleStateError."""
        number = -(-time // layout.hop)
        tile = self.tiles.get(number)
        if tile is None:
            tile = self.tiles[number] = Tile(layout)
            if self.order and number < self.order[-1]:
                insort(self.order, number)
            else:
                self.order.append(number)
        numbers = tile.numbers
        numbers[0] += copies
        i = 1
        for value in values:
            if value is not None:
                numbers[i] += copies * value
                numbers[i + 1] += copies
            i += 2
        if layout.keep_events:
            self._list(layout, tile, time, values, copies)
        if self.cursor is not None and time <= self.cursor.time:
            self.cursor = None

    def _list(self, layout: Layout, tile: Tile, time: int, values: Values, copies: int) -> None:
        if tile.events is None:
            if copies < 0 and layout.extremes:
                raise StaleStateError("an event is taken out of a tile whose minimum may have been its")
            # What is added can only make the extremes wider.
            pairs = zip(layout.extremes, tile.extremes or (), strict=True)
            tile.extremes = tuple(_wider(known, values[column], smallest) for (column, smallest), known in pairs)
            return
        for _ in range(copies):
            insort(tile.events, (time, values), key=lambda event: event[0])
        for _ in range(-copies):
            try:
                tile.events.remove((time, values))
            except ValueError as missing:
                raise StaleStateError(f"an event at {time} is to be taken away that is not there") from missing

    def times(self, layout: Layout, first: int, last: int) -> list[int]:
        """The distinct times of events in [first, last], ascending. Raises StaleStateError."""
        found: list[int] = []
        for number in self._numbers(-(-first // layout.hop), -(-last // layout.hop)):
            events = self._events(self.tiles[number])
            for time, _ in events[bisect_left(events, first, key=_time) : bisect_right(events, last, key=_time)]:
                if not found or found[-1] != time:
                    found.append(time)
        return found

    # --- windows ---

    def at(self, layout: Layout, time: int) -> Cursor:
        """The windows that end at `time`, from where the cursor stands if it is not past it."""
        if self.cursor is None or self.cursor.time > time:
            self.cursor = self._built(layout, time)
        elif self.cursor.time < time:
            self._advance(layout, self.cursor, time)
        return self.cursor

    def _advance(self, layout: Layout, cursor: Cursor, time: int) -> None:
        hop, before = layout.hop, cursor.time
        for number in self._numbers(before // hop + 1, -(-time // hop)):
            tile = self.tiles[number]
            if (number - 1) * hop >= before and number * hop <= time:
                self._enter(layout, cursor, number, tile.numbers, tile.found_extremes(layout))
            else:
                events = self._events(tile)
                for _, values in events[bisect_right(events, before, key=_time) : bisect_right(events, time, key=_time)]:
                    self._enter(layout, cursor, number, _numbers_of(values), tuple(values[c] for c, _ in layout.extremes))
        if time // hop != before // hop:
            for i, span in enumerate(layout.spans):
                self._leave(cursor, i, before // hop - span, time // hop - span)
        cursor.time = time

    def _enter(self, layout: Layout, cursor: Cursor, tile: int, numbers: Sequence[int], extremes: Sequence[int | None]) -> None:
        for total in cursor.totals:
            _add(total, numbers)
        if layout.running:
            _add(cursor.running, numbers)
        if extremes:
            for window in cursor.extremes:
                for extreme, value in zip(window, extremes, strict=True):
                    if value is not None:
                        extreme.push(tile, value)

    def _leave(self, cursor: Cursor, window: int, out_before: int, out_now: int) -> None:
        total = cursor.totals[window]
        for number in self._numbers(out_before + 1, out_now):
            _subtract(total, self.tiles[number].numbers)
        for extreme in cursor.extremes[window]:
            extreme.expire(out_now)

    def _built(self, layout: Layout, time: int) -> Cursor:
        """A new cursor: costs as much as the longest window has tiles."""
        cursor, floor = Cursor(time, layout), time // layout.hop
        for i, span in enumerate(layout.spans):
            for number in self._numbers(floor - span + 1, floor):
                tile = self.tiles[number]
                _add(cursor.totals[i], tile.numbers)
                for extreme, value in zip(cursor.extremes[i], tile.found_extremes(layout), strict=True):
                    if value is not None:
                        extreme.push(number, value)
        if layout.running:
            _add(cursor.running, self.before)
            for number in self.order[: bisect_right(self.order, floor)]:
                _add(cursor.running, self.tiles[number].numbers)
        # From the hop on, the events of the tile that `time` lies in.
        cursor.time = floor * layout.hop
        self._advance(layout, cursor, time)
        return cursor

    # --- forgetting ---

    def forget(self, layout: Layout, horizon: int) -> bool:
        """Drops tiles that no window ending at `horizon` or later reaches, and closes those that end before it.

        Returns whether anything is left to remember.
        """
        gone = bisect_right(self.order, horizon // layout.hop - layout.longest)
        if gone:
            # A cursor that still counts what goes cannot be moved on any more.
            if self.cursor is not None and self.order[gone - 1] > self.cursor.time // layout.hop - layout.longest:
                self.cursor = None
            for number in self.order[:gone]:
                _add(self.before, self.tiles.pop(number).numbers)
            del self.order[:gone]
        if layout.keep_events:
            self._close(layout, -(-horizon // layout.hop) - 1)
        return bool(self.order) or any(self.before)

    def _close(self, layout: Layout, last: int) -> None:
        for number in self._numbers(self.closed + 1, last):
            tile = self.tiles[number]
            tile.extremes, tile.events = tile.found_extremes(layout), None
        self.closed = max(self.closed, last)
        # One that stands within a closed tile would need its events to leave it.
        if self.cursor is not None and self.cursor.time < self.closed * layout.hop:
            self.cursor = None

    def rescale(self, layout: Layout, column: int, shift: int) -> None:
        """Multiplies all that is held of a column by 2**shift."""
        sums = 1 + 2 * column
        self.cursor = None
        self.before[sums] <<= shift
        for tile in self.tiles.values():
            tile.numbers[sums] <<= shift
            if tile.events is not None:
                tile.events = [(t, tuple(_shifted(v, shift) if i == column else v for i, v in enumerate(vs))) for t, vs in tile.events]
            if tile.extremes is not None:
                pairs = zip(layout.extremes, tile.extremes, strict=True)
                tile.extremes = tuple(_shifted(value, shift) if c == column else value for (c, _), value in pairs)

    def _numbers(self, first: int, last: int) -> Iterable[int]:
        """Numbers of the tiles there are, from `first` to `last`."""
        order = self.order
        if not order or order[-1] < first:
            return ()
        return order[bisect_left(order, first) : bisect_right(order, last)]

    @staticmethod
    def _events(tile: Tile) -> list[tuple[int, Values]]:
        if tile.events is None:
            raise StaleStateError("the single events of a tile are needed, which are not kept any more")
        return tile.events


def _time(event: tuple[int, Values]) -> int:
    return event[0]


def _numbers_of(values: Values) -> Numbers:
    numbers = [1]
    for value in values:
        numbers += (0, 0) if value is None else (value, 1)
    return numbers


def _add(total: Numbers, numbers: Sequence[int]) -> None:
    for i, number in enumerate(numbers):
        if number:
            total[i] += number


def _subtract(total: Numbers, numbers: Sequence[int]) -> None:
    for i, number in enumerate(numbers):
        if number:
            total[i] -= number


def _wider(known: int | None, value: int | None, smallest: bool) -> int | None:
    if known is None or value is None:
        return value if known is None else known
    return min(known, value) if smallest else max(known, value)


def _shifted(value: int | None, shift: int) -> int | None:
    return None if value is None else value << shift
