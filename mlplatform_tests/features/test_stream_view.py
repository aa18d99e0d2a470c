"""The streaming state machine against the batch engine, which `test_engine` holds against the definition, whatever the order of arrival."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.features.engine import compute
from mlplatform.features.plan import TIMESTAMP, ViewPlan, WindowPlan, since_epoch
from mlplatform.features.stream_changes import COPIES
from mlplatform.features.stream_entity import Entity, StaleStateError
from mlplatform.features.stream_view import Emission, ViewState
from mlplatform.specs import FeatureRecipe

MINUTE = timedelta(minutes=1)
START = datetime(2024, 3, 1, tzinfo=UTC)
HOP, CADENCE = 5 * MINUTE, 10 * MINUTE
WINDOWS = {"short": 10 * MINUTE, "middle": 35 * MINUTE, "long": 60 * MINUTE}
FUNCTIONS = ("sum", "count", "mean", "min", "max")
KEYS = ("n", "who")

Event = tuple[str, int, datetime, float | None, float | None]  # who, n, time, x, sign


def view(trigger: str, functions: Sequence[str] = FUNCTIONS) -> ViewPlan:
    aggregations = tuple(WindowPlan("x", f, w, f"{f}_{name}") for f in functions for name, w in WINDOWS.items())
    aggregations += (WindowPlan("sign", "sum", None, "state"),)
    recipe = FeatureRecipe(
        view="small",
        inputs={"events": timedelta(hours=1)},
        cadence=CADENCE,
        events=lambda tables: tables["events"],
        trigger=trigger,  # type: ignore[arg-type]
        finish=lambda rows: rows.with_columns(minute=pl.col("event_timestamp").dt.minute().cast(pl.Float64)),
        independent_by="who",
    )
    features = (*(a.name for a in aggregations), "minute")
    return ViewPlan("small", KEYS, features, timedelta(hours=1), "", "", recipe, aggregations, HOP)


def changes(*parts: tuple[Event, int]) -> pl.DataFrame:
    schema = {"who": pl.String, "n": pl.Int64, "event_timestamp": TIMESTAMP, "x": pl.Float64, "sign": pl.Float64, COPIES: pl.Int64}
    return pl.DataFrame([(*event, n) for event, n in parts], schema=schema, orient="row")


def expected(plan: ViewPlan, events: Sequence[Event], first: datetime, last: datetime) -> dict[tuple[Any, ...], tuple[float | None, ...]]:
    """(n, who, T) → features: what the batch engine computes from the same events."""
    rows = compute(plan, {"events": changes(*((e, 1) for e in events)).drop(COPIES)}, first, tick_before(plan, last))
    return {tuple(key): tuple(values) for *key, values in ((*row[:3], row[3:]) for row in rows.rows())}


def tick_before(plan: ViewPlan, moment: datetime) -> datetime:
    return moment if plan.event_triggered else moment - (moment - START) % CADENCE


@dataclass
class Table:
    """What a table holds after the emissions were appended: the newest row of each entity and time."""

    rows: dict[tuple[Any, ...], tuple[float | None, ...]]
    given: list[tuple[Any, ...]]

    def take(self, emission: Emission) -> None:
        for n, who, time, *values in emission.rows.rows():
            self.given.append((n, who, time))
            self.rows[n, who, time] = tuple(values)

    @property
    def standing(self) -> dict[tuple[Any, ...], tuple[float | None, ...]]:
        # Every row counts its minute; only a withdrawn one holds nothing at all.
        return {key: values for key, values in self.rows.items() if values[-1] is not None}


moments = st.builds(lambda m, us: START + m * MINUTE + timedelta(microseconds=us), st.integers(-70, 130), st.sampled_from([-1, 0, 0, 1]))
numbers = st.none() | st.integers(-40, 40).map(float) | st.floats(-1e6, 1e6) | st.sampled_from([1e300, 5e-324, 0.1, 1e-20])
event = st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 2), moments, numbers, st.sampled_from([None, 1.0, -1.0]))
# Each step: events that arrive, how many earlier ones are taken back, minutes that pass.
steps = st.lists(st.tuples(st.lists(event, max_size=6), st.integers(0, 2), st.integers(0, 45)), max_size=12)


@settings(max_examples=150)
@given(st.sampled_from(["cadence", "event"]), steps, st.randoms(use_true_random=False))
def test_in_whatever_order_events_arrive_the_rows_equal_a_batch(trigger: str, given_steps: list[Any], random: Any) -> None:
    plan, now = view(trigger), START
    state, table, alive = ViewState(plan, since_epoch(START)), Table({}, []), []
    for arriving, taken_back, minutes in given_steps:
        parts = [(e, 1) for e in arriving]
        for _ in range(min(taken_back, len(alive))):
            parts.append((alive.pop(random.randrange(len(alive))), -1))
        alive += arriving
        now += minutes * MINUTE
        table.take(state.advance(changes(*parts), since_epoch(now)))
    assert table.standing == expected(plan, alive, START, now)


@settings(max_examples=100)
@given(st.sampled_from(["cadence", "event"]), steps)
def test_with_a_moving_horizon_the_rows_after_it_are_right_and_memory_is_given_back(trigger: str, given_steps: list[Any]) -> None:
    plan, now, horizon = view(trigger), START, START
    state, table, alive = ViewState(plan, since_epoch(START)), Table({}, []), []
    for events, _, minutes in given_steps:
        now += minutes * MINUTE
        horizon = max(START, now - 30 * MINUTE)
        arriving = [e for e in events if e[2] >= horizon]
        alive += arriving
        table.take(state.advance(changes(*((e, 1) for e in arriving)), since_epoch(now), since_epoch(horizon)))
    assert table.standing == expected(plan, alive, START, now)
    oldest = since_epoch(horizon - WINDOWS["long"]) // (HOP // timedelta(microseconds=1))
    assert all(number > oldest for entity in state.entities.values() for number in entity.tiles)


@pytest.mark.parametrize("trigger", ["cadence", "event"])
def test_an_event_changes_no_row_twice(trigger: str) -> None:
    state, table = ViewState(view(trigger), since_epoch(START)), Table({}, [])
    for minute in range(0, 60, 5):
        now = START + minute * MINUTE
        table.take(state.advance(changes((("a", 1, now, 1.0, None), 1)), since_epoch(now)))
        table.take(state.advance(None, since_epoch(now)))
    assert len(table.given) == len(set(table.given))


@pytest.mark.parametrize("trigger", ["cadence", "event"])
def test_a_late_event_gives_the_rows_after_it_again_and_no_others(trigger: str) -> None:
    state = ViewState(view(trigger), since_epoch(START))
    known = [(("a", 1, START + m * MINUTE, 1.0, None), 1) for m in (5, 15, 25, 35)]
    state.advance(changes(*known, (("b", 1, START + 5 * MINUTE, 1.0, None), 1)), since_epoch(START + 40 * MINUTE))
    emission = state.advance(changes((("a", 1, START + 16 * MINUTE, 9.0, None), 1)), since_epoch(START + 40 * MINUTE))
    minutes = [int((row[2] - START) / MINUTE) for row in emission.rows.rows()]
    assert minutes == ([20, 30, 40] if trigger == "cadence" else [16, 25, 35])
    assert emission.restated == (3 if trigger == "cadence" else 2)
    assert set(emission.rows["who"]) == {"a"}


@pytest.mark.parametrize("trigger", ["cadence", "event"])
def test_an_event_ahead_of_the_clock_waits(trigger: str) -> None:
    state = ViewState(view(trigger), since_epoch(START))
    assert state.advance(changes((("a", 1, START + 20 * MINUTE, 1.0, None), 1)), since_epoch(START + 19 * MINUTE)).rows.is_empty()
    assert state.advance(None, since_epoch(START + 20 * MINUTE)).rows["event_timestamp"].to_list() == [START + 20 * MINUTE]


@pytest.mark.parametrize("trigger", ["cadence", "event"])
def test_an_event_taken_back_before_its_row_was_given_leaves_no_trace(trigger: str) -> None:
    state, ahead = ViewState(view(trigger), since_epoch(START)), ("a", 1, START + 20 * MINUTE, 1.0, None)
    state.advance(changes((ahead, 1)), since_epoch(START))
    state.advance(changes((ahead, -1)), since_epoch(START))
    assert state.advance(None, since_epoch(START + 30 * MINUTE)).rows.is_empty()


def test_rows_before_the_horizon_are_left_as_they_are_but_later_ones_count_their_events() -> None:
    plan = view("cadence", ("sum", "count", "mean"))
    state, now = ViewState(plan, since_epoch(START)), START + 60 * MINUTE
    state.advance(changes((("a", 1, START + 5 * MINUTE, 1.0, None), 1)), since_epoch(now))
    old = ("a", 1, START + 12 * MINUTE, 5.0, None)
    rows = state.advance(changes((old, 1)), since_epoch(now), since_epoch(START + 40 * MINUTE)).rows
    assert rows["event_timestamp"].to_list() == [START + m * MINUTE for m in (40, 50, 60)]
    assert rows["sum_long"].to_list() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("trigger", ["cadence", "event"])
@pytest.mark.parametrize("functions", [("sum",), ("sum", "min")])
def test_warmed_between_two_hops_a_state_goes_on_as_before(trigger: str, functions: tuple[str, ...]) -> None:
    plan = view(trigger, functions)
    state, now = ViewState(plan, since_epoch(START)), START + 33 * MINUTE
    events: list[Event] = [("a", 1, START + m * MINUTE, float(m), None) for m in (2, 17, 31, 32)]
    table = Table({}, [])
    table.take(state.advance(changes(*((e, 1) for e in events[:3])), since_epoch(now)))
    state.warm(since_epoch(now))
    table.take(state.advance(changes((events[3], 1)), since_epoch(START + 41 * MINUTE)))
    assert table.standing == expected(plan, events, START, START + 41 * MINUTE)


def test_a_minimum_that_can_no_longer_be_found_again_asks_for_a_new_state() -> None:
    state, now = ViewState(view("cadence"), since_epoch(START)), START + 60 * MINUTE
    old = ("a", 1, START + 12 * MINUTE, 5.0, None)
    state.advance(changes((old, 1)), since_epoch(now), since_epoch(START + 40 * MINUTE))
    state.advance(None, since_epoch(now), since_epoch(START + 40 * MINUTE))
    with pytest.raises(StaleStateError):
        state.advance(changes((old, -1)), since_epoch(now), since_epoch(START + 40 * MINUTE))


def test_the_work_of_an_event_does_not_grow_with_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how many tiles events make the state look at."""
    looked_at = [0]
    real = Entity._numbers

    def counting(entity: Entity, first: int, last: int) -> list[int]:
        found = list(real(entity, first, last))
        looked_at[0] += len(found)
        return found

    monkeypatch.setattr(Entity, "_numbers", counting)
    counts = []
    for hours in (1, 1000):
        windows = (WindowPlan("x", "sum", hours * 60 * MINUTE, "s"),)
        state = ViewState(ViewPlan("v", ("who",), ("s",), HOP, "", "", view("event").recipe, windows, HOP), since_epoch(START))
        history = [(("a", 1, START - k * HOP, 1.0, None), 1) for k in range(hours * 12)]
        state.advance(changes(*history, (("a", 1, START, 1.0, None), 1)), since_epoch(START))
        looked_at[0] = 0
        for k in range(1, 50):
            state.advance(changes((("a", 1, START + k * MINUTE, 1.0, None), 1)), since_epoch(START + k * MINUTE))
        counts.append(looked_at[0])
    assert counts[0] == counts[1] > 0
