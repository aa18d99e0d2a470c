"""The engine on small views, against a brute force that reads the definition of a window literally."""

import math
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIMESTAMP, FeatureError, ViewPlan, WindowPlan, required_days, tick_range, window_start
from mlplatform.records import DayRange
from mlplatform.specs import FeatureRecipe, Tables

MINUTE = timedelta(minutes=1)
START = datetime(2024, 3, 1, tzinfo=UTC)
SCHEMA = {"who": pl.String, "n": pl.Int64, "event_timestamp": TIMESTAMP, "x": pl.Float64, "sign": pl.Float64}
WINDOWS = {"short": 10 * MINUTE, "middle": 35 * MINUTE, "long": 60 * MINUTE}
FUNCTIONS = ("sum", "count", "mean", "min", "max")


def view(**changes: Any) -> ViewPlan:
    aggregations = tuple(WindowPlan("x", f, w, f"{f}_{name}") for f in FUNCTIONS for name, w in WINDOWS.items())
    aggregations += (WindowPlan("sign", "sum", None, "state"),)
    given: dict[str, Any] = {
        "name": "small",
        "join_keys": ("n", "who"),
        "features": tuple(a.name for a in aggregations),
        "ttl": timedelta(hours=1),
        "description": "",
        "owner": "",
        "aggregations": aggregations,
        "hop": 5 * MINUTE,
        "recipe": recipe(),
    }
    return ViewPlan(**(given | changes))


def recipe(**changes: Any) -> FeatureRecipe:
    given: dict[str, Any] = {
        "view": "small",
        "inputs": {"events": timedelta(hours=1)},
        "cadence": 10 * MINUTE,
        "events": lambda tables: tables["events"],
    }
    return FeatureRecipe(**(given | changes))


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


# Whole minutes make ties with window edges and ticks likely; one microsecond to either side is the harder tie.
moments = st.builds(lambda m, us: START + m * MINUTE + timedelta(microseconds=us), st.integers(-70, 130), st.sampled_from([-1, 0, 0, 1]))
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 1e16, -1e16, 1e-300, 5e-324]),
    st.integers(-4000, 4000).map(lambda q: q / 4),
    st.floats(-1e3, 1e3).map(lambda x: x / 3),
)
events = st.lists(
    st.fixed_dictionaries(
        {
            "who": st.sampled_from(["a", "b"]),
            "n": st.integers(1, 2),
            "event_timestamp": moments,
            "x": st.none() | st.just(float("nan")) | numbers,
            "sign": st.none() | st.sampled_from([1.0, -1.0, 0.1]),
        }
    ),
    max_size=40,
)


def exact_sum(values: list[float]) -> float:
    """Python rounds a fraction to the nearest float, once."""
    return float(sum(map(Fraction, values), Fraction(0)))


def floor(moment: datetime, hop: timedelta) -> datetime:
    return moment - (moment - EPOCH) % hop


def known(rows: list[dict[str, Any]], column: str) -> list[float]:
    return [r[column] + 0.0 for r in rows if r[column] is not None and not math.isnan(r[column])]


def brute_force(plan: ViewPlan, rows: list[dict[str, Any]], first: datetime, last: datetime) -> pl.DataFrame:
    """The definition in `plan`, read literally."""
    assert plan.hop is not None
    found = []
    for n, who in sorted({(r["n"], r["who"]) for r in rows}):
        mine = [r for r in rows if (r["n"], r["who"]) == (n, who)]
        ticks = {first + k * plan.cadence for k in range((last - first) // plan.cadence + 1)}
        for t in {r["event_timestamp"] for r in mine} if plan.event_triggered else ticks:
            past = [r for r in mine if r["event_timestamp"] <= t]
            inside = {name: [r for r in past if r["event_timestamp"] > floor(t - w, plan.hop)] for name, w in WINDOWS.items()}
            if not first <= t <= last or not inside["long"]:
                continue
            row: dict[str, Any] = {"n": n, "who": who, "event_timestamp": t, "state": exact_sum(known(past, "sign"))}
            for name, events in inside.items():
                xs = known(events, "x")
                total = exact_sum(xs)
                row |= {f"sum_{name}": total, f"count_{name}": len(xs), f"mean_{name}": total / len(xs) if xs else None}
                row |= {f"min_{name}": min(xs, default=None), f"max_{name}": max(xs, default=None)}
            found.append(row)
    columns = [*plan.join_keys, "event_timestamp", *plan.features]
    schema = {c: SCHEMA.get(c, pl.Float64) for c in columns}
    return pl.DataFrame(found, schema=schema).sort("event_timestamp", *plan.join_keys)


def triggered(trigger: str) -> ViewPlan:
    return view(recipe=recipe(trigger=trigger))


both_triggers = pytest.mark.parametrize("trigger", ["cadence", "event"])


@both_triggers
@settings(max_examples=150, deadline=None)
@given(rows=events)
def test_the_rows_equal_their_definition(trigger: str, rows: list[dict[str, Any]]) -> None:
    plan, last = triggered(trigger), START + 120 * MINUTE
    assert_same_bits(compute(plan, {"events": frame(rows)}, START, last), brute_force(plan, rows, START, last))


@both_triggers
@settings(max_examples=60, deadline=None)
@given(rows=events, rnd=st.randoms(use_true_random=False), cut=st.integers(0, 9))
def test_a_backfill_and_its_parts_give_the_same_bits_whatever_the_order_of_the_rows(
    trigger: str, rows: list[dict[str, Any]], rnd: Any, cut: int
) -> None:
    plan, shuffled = triggered(trigger), rnd.sample(rows, len(rows))
    end, middle = START + 90 * MINUTE, START + cut * plan.cadence
    after = middle + (plan.cadence if trigger == "cadence" else timedelta.resolution)
    parts = [compute(plan, {"events": frame(shuffled)}, START, middle)]
    if after <= end:
        parts.append(compute(plan, {"events": frame(shuffled[::-1])}, after, end))
    assert_same_bits(compute(plan, {"events": frame(rows)}, START, end), pl.concat(parts))


@both_triggers
@settings(max_examples=60, deadline=None)
@given(rows=events)
def test_no_value_uses_an_event_after_its_time(trigger: str, rows: list[dict[str, Any]]) -> None:
    plan, tick = triggered(trigger), START + 30 * MINUTE
    by_then = [r for r in rows if r["event_timestamp"] <= tick]
    assert_same_bits(compute(plan, {"events": frame(rows)}, START, tick), compute(plan, {"events": frame(by_then)}, START, tick))


@both_triggers
@pytest.mark.parametrize("limit", ["windowed._BLOCK", "slices.Timeline.fits"])
def test_blocks_of_entities_join_up(trigger: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"who": f"w{k % 7}", "n": k % 3, "event_timestamp": START + k * MINUTE, "x": k / 3, "sign": 1.0} for k in range(100)]
    plan, last = triggered(trigger), START + 60 * MINUTE
    whole = compute(plan, {"events": frame(rows)}, START, last)
    monkeypatch.setattr(f"mlplatform.features.{limit}", 40 if limit.endswith("_BLOCK") else staticmethod(lambda time: 2))
    assert_same_bits(whole, compute(plan, {"events": frame(rows)}, START, last))


def test_no_events_give_no_rows_in_the_declared_schema() -> None:
    got = compute(view(), {"events": frame([])}, START, START + 60 * MINUTE)
    assert got.height == 0
    assert got.columns == ["n", "who", "event_timestamp", *view().features]
    assert got.schema["mean_long"] == pl.Float64


def test_an_event_without_a_join_key_belongs_to_no_entity() -> None:
    got = compute(view(), {"events": frame([{"who": None, "n": 1, "event_timestamp": START, "x": 1.0, "sign": 1.0}])}, START, START)
    assert got.is_empty()


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_an_infinite_value_is_refused_with_its_view_and_column(infinity: float) -> None:
    rows = [{"who": "a", "n": 1, "event_timestamp": START, "x": infinity, "sign": None}]
    with pytest.raises(FeatureError, match="view small: events\\(\\) gave an infinite x"):
        compute(view(), {"events": frame(rows)}, START, START)


def test_finish_derives_features_from_aggregates() -> None:
    plan = view(features=("twice",), recipe=recipe(finish=lambda f: f.with_columns(twice=pl.col("sum_long") * 2)))
    rows = [{"who": "a", "n": 1, "event_timestamp": START, "x": 3.0, "sign": None}]
    assert compute(plan, {"events": frame(rows)}, START, START)["twice"].to_list() == [6.0]


def computed(function: Any) -> ViewPlan:
    return view(aggregations=(), hop=None, features=("y",), recipe=recipe(events=None, compute=function))


def test_a_computed_view_gets_the_ticks_and_gives_its_rows_at_them() -> None:
    def count(tables: Tables, ticks: pl.Series) -> pl.DataFrame:
        return pl.DataFrame({"who": "a", "n": 1, "event_timestamp": ticks, "y": float(len(ticks))})

    got = compute(computed(count), {"events": frame([])}, START, START + 20 * MINUTE)
    assert got["event_timestamp"].to_list() == [START, START + 10 * MINUTE, START + 20 * MINUTE]
    assert got["y"].to_list() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"event_timestamp": [START + MINUTE], "y": [1.0]}, "at times that are no ticks"),
        ({"event_timestamp": [START, START], "y": [1.0, 2.0]}, "two rows at one time"),
        ({"event_timestamp": [START]}, r"nobody computes \['y'\]"),
    ],
)
def test_a_computed_view_may_only_give_what_is_declared(rows: dict[str, Any], message: str) -> None:
    given = pl.DataFrame({"who": "a", "n": 1, **rows}, schema_overrides={"event_timestamp": TIMESTAMP})
    with pytest.raises(FeatureError, match=message):
        compute(computed(lambda tables, ticks: given), {"events": frame([])}, START, START)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (START + MINUTE, START + 10 * MINUTE, "ticks are multiples"),
        (START + 10 * MINUTE, START, "is before the first"),
    ],
)
def test_ticks_out_of_step_are_refused(first: datetime, last: datetime, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        compute(view(), {"events": frame([])}, first, last)


def test_missing_inputs_and_columns_name_the_view() -> None:
    with pytest.raises(FeatureError, match=r"view small: no rows were given for its inputs \['events'\]"):
        compute(view(), {}, START, START)
    with pytest.raises(FeatureError, match=r"view small: events\(\) gave no column \['sign'\]"):
        compute(view(), {"events": frame([]).drop("sign")}, START, START)


def test_a_days_ticks_begin_at_midnight_and_stop_at_now() -> None:
    day = DayRange(START.date(), START.date())
    assert tick_range(view(), day) == (START, START + timedelta(hours=23, minutes=50))
    assert tick_range(view(), day, now=START + timedelta(minutes=25)) == (START, START + timedelta(minutes=20))
    assert tick_range(view(), day, now=START - MINUTE) is None


def test_event_triggered_rows_of_a_day_stand_at_any_of_its_microseconds_up_to_now() -> None:
    plan, day = triggered("event"), DayRange(START.date(), START.date())
    assert tick_range(plan, day) == (START, START + timedelta(days=1) - timedelta.resolution)
    now = START + timedelta(minutes=25, microseconds=3)
    assert tick_range(plan, day, now=now) == (START, now)
    assert tick_range(plan, day, now=START) == (START, START)
    assert tick_range(plan, day, now=START - timedelta.resolution) is None


def test_ticks_count_from_the_epoch_even_where_a_day_is_no_multiple_of_the_cadence() -> None:
    plan = view(recipe=recipe(cadence=timedelta(hours=7)))
    first, last = tick_range(plan, DayRange(START.date(), START.date())) or (EPOCH, EPOCH)
    assert (first - EPOCH) % timedelta(hours=7) == timedelta(0)
    assert START <= first < START + timedelta(hours=7)
    assert START + timedelta(hours=17) <= last < START + timedelta(days=1)


def test_the_days_needed_reach_back_by_each_inputs_lookback() -> None:
    plan = view(recipe=recipe(inputs={"near": timedelta(hours=1), "far": timedelta(days=30)}))
    day = START.date()
    assert required_days(plan, DayRange(day, day)) == {
        "near": DayRange(day - timedelta(days=1), day),
        "far": DayRange(day - timedelta(days=30), day),
    }


def test_where_the_hop_is_no_part_of_a_day_the_days_needed_reach_back_to_the_hops_begin() -> None:
    week = timedelta(weeks=1)
    plan = view(hop=week, recipe=recipe(inputs={"events": week}, trigger="event"))
    # 1970 began on a Thursday, so hops of a week do; 1 March 2024 is a Friday.
    assert required_days(plan, DayRange(START.date(), START.date()))["events"].first == date(2024, 2, 22)
    assert window_start(plan, START, week) == datetime(2024, 2, 22, tzinfo=UTC)


def test_a_computed_view_has_no_window() -> None:
    with pytest.raises(ValueError, match="view small has no windows"):
        window_start(view(aggregations=(), hop=None), START, MINUTE)


def assert_same_bits(left: pl.DataFrame, right: pl.DataFrame) -> None:
    assert left.columns == right.columns
    bits = pl.col(pl.Float64).reinterpret(signed=False)
    assert left.with_columns(bits).rows() == right.with_columns(bits).rows()
