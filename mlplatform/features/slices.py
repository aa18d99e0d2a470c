"""Which rows a view has, and which slice of an entity's events each window of a row holds: positions, no values.

Belongs here: the arithmetic on NumPy arrays of events in order of (entity, time). Does not belong here: frames, plans,
what is computed from a slice (`exact`, `extremes`).

Times are microseconds since 1970, and entities are numbers in the order of the events.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """The rows that each event brings: `counts[i]` of them, at `starts[i]`, `starts[i] + step` …; together each row once."""

    starts: Integers
    counts: Integers
    step: int

    def part(self, begin: int, end: int) -> "Runs":
        return Runs(self.starts[begin:end], self.counts[begin:end], self.step)

    def rows(self) -> tuple[Integers, Integers]:
        """For each row the event that brought it, and its time."""
        event = np.repeat(np.arange(len(self.counts)), self.counts)
        before = np.cumsum(self.counts) - self.counts
        return event, self.starts[event] + (np.arange(len(event)) - before[event]) * self.step


def at_ticks(entity: Integers, time: Integers, first: int, last: int, cadence: int, longest: int) -> Runs:
    """A row at each tick of `first … last` for each entity with an event in `(tick - longest, tick]`.

    An event keeps its entity alive over consecutive ticks; it brings those that the event before it has not brought.
    """
    alive_from = np.maximum(-(-time // cadence) * cadence, first)
    alive_until = np.minimum((time + longest - 1) // cadence * cadence, last)
    same = np.zeros(len(entity), np.bool_)
    same[1:] = entity[1:] == entity[:-1]
    starts = np.where(same, np.maximum(alive_from, np.roll(alive_until, 1) + cadence), alive_from)
    return Runs(starts, np.maximum((alive_until - starts) // cadence + 1, 0), cadence)


def at_events(entity: Integers, time: Integers, first: int, last: int) -> Runs:
    """A row at each distinct time of `first … last` at which an entity has events."""
    newest = np.ones(len(entity), np.bool_)
    newest[:-1] = (entity[1:] != entity[:-1]) | (time[1:] != time[:-1])
    return Runs(time, (newest & (time >= first) & (time <= last)).astype(np.int64), 1)


class Timeline:
    """Finds events by entity and time: both in one whole number, so that one binary search finds them."""

    def __init__(self, entity: Integers, time: Integers) -> None:
        """`entity` are the numbers 0, 1, 2 …; at least one event. `entity` times the span of the times fits an int64 (`fits`)."""
        self._before, self._latest = int(time.min()) - 1, int(time.max())
        self._keys = self._key(entity, time)

    @staticmethod
    def fits(time: Integers) -> int:
        """How many entities one timeline of these times can hold."""
        return 2**62 // (int(time.max()) - int(time.min()) + 2)

    def until(self, entity: Integers, time: Integers) -> Integers:
        """The position after the last event of `(-∞, time]` of each entity: where a slice up to then ends, and one from then begins."""
        return np.searchsorted(self._keys, self._key(entity, time), side="right")

    def begin(self, entity: Integers) -> Integers:
        """The position of each entity's first event."""
        return self.until(entity, np.full(len(entity), self._before))

    def _key(self, entity: Integers, time: Integers) -> Integers:
        return entity * (self._latest - self._before + 1) + (np.clip(time, self._before, self._latest) - self._before)
