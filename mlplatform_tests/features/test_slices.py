"""Rows, slices and their extremes against loops that read what the docstrings say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.features.extremes import minima
from mlplatform.features.slices import Runs, Timeline, at_events, at_ticks

FIRST, LAST, CADENCE = -20, 40, 10
# (entity, time) in order; small times, so that they tie with ticks and window edges.
events = st.lists(st.tuples(st.integers(0, 2), st.integers(-50, LAST)), max_size=25).map(sorted)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    entity, time = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return entity, time


def rows_of(runs: Runs, entity: np.ndarray) -> list[tuple[int, int]]:
    event, times = runs.rows()
    return list(zip(entity[event].tolist(), times.tolist(), strict=True))


@given(events, st.integers(1, 45))
def test_an_entity_has_a_row_at_each_tick_it_is_alive_at(pairs: list[tuple[int, int]], longest: int) -> None:
    entity, time = columns(pairs)
    ticks = range(FIRST, LAST + 1, CADENCE)
    expected = [(e, t) for e in range(3) for t in ticks if any(o == e and t - longest < at <= t for o, at in pairs)]
    assert rows_of(at_ticks(entity, time, FIRST, LAST, CADENCE, longest), entity) == expected


@given(events)
def test_an_entity_has_a_row_at_each_distinct_time_of_its_events(pairs: list[tuple[int, int]]) -> None:
    entity, time = columns(pairs)
    assert rows_of(at_events(entity, time, FIRST, LAST), entity) == sorted({(e, t) for e, t in pairs if FIRST <= t <= LAST})


@given(events.filter(bool), st.integers(-80, 80))
def test_a_timeline_finds_where_the_events_up_to_a_time_end(pairs: list[tuple[int, int]], moment: int) -> None:
    entity, time = columns(pairs)
    entity = np.unique(entity, return_inverse=True)[1]
    known = np.unique(entity)
    timeline = Timeline(entity, time)
    begin, until = timeline.begin(known), timeline.until(known, np.full(len(known), moment))
    for e in known.tolist():
        mine = np.flatnonzero(entity == e)
        assert begin[e] == mine[0]
        assert until[e] - begin[e] == (time[mine] <= moment).sum()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40))
def test_the_minimum_of_every_slice(values: list[float]) -> None:
    pairs = [(i, j) for i in range(len(values) + 1) for j in range(i, len(values) + 1)]
    begins, ends = columns(pairs)
    got = minima(np.array(values), begins, ends)
    assert got.tolist() == pytest.approx([min(values[i:j], default=np.nan) for i, j in pairs], abs=0, rel=0, nan_ok=True)
