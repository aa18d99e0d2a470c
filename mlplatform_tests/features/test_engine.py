"""The engine on small views, against a brute force that reads the definition of a window literally."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIMESTAMP, FeatureError, ViewPlan, WindowPlan, required_days, tick_range
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
quarters = st.integers(-4000, 4000).map(lambda q: q / 4)
events = st.lists(
    st.fixed_dictionaries(
        {
            "who": st.sampled_from(["a", "b"]),
            "n": st.integers(1, 2),
            "event_timestamp": moments,
            "x": st.none() | st.just(float("nan")) | quarters,
            "sign": st.none() | st.sampled_from([1.0, -1.0]),
        }
    ),
    max_size=40,
)


def brute_force(rows: list[dict[str, Any]], ticks: list[datetime]) -> list[dict[str, Any]]:
    found = []
    for tick in ticks:
        for n in (1, 2):
            for who in ("a", "b"):
                mine = [r for r in rows if (r["n"], r["who"]) == (n, who) and r["event_timestamp"] <= tick]
                if not any(r["event_timestamp"] > tick - max(WINDOWS.values()) for r in mine):
                    continue
                row: dict[str, Any] = {"n": n, "who": who, "event_timestamp": tick}
                for name, window in WINDOWS.items():
                    inside = [r["x"] for r in mine if r["event_timestamp"] > tick - window]
                    xs = [x for x in inside if x is not None and not math.isnan(x)]
                    row |= {f"sum_{name}": sum(xs), f"count_{name}": len(xs), f"mean_{name}": sum(xs) / len(xs) if xs else None}
                    row |= {f"min_{name}": min(xs, default=None), f"max_{name}": max(xs, default=None)}
                found.append(row | {"state": sum(r["sign"] or 0.0 for r in mine)})
    return found


@settings(max_examples=150, deadline=None)
@given(events)
def test_windows_equal_their_definition_at_every_tick(rows: list[dict[str, Any]]) -> None:
    ticks = [START + k * 10 * MINUTE for k in range(13)]
    got = compute(view(), {"events": frame(rows)}, ticks[0], ticks[-1])
    expected = pl.DataFrame(brute_force(rows, ticks), schema=got.schema).select(got.columns)
    assert got.rows() == expected.rows()


@settings(max_examples=60, deadline=None)
@given(events, st.floats(0.1, 10), st.randoms(use_true_random=False))
def test_a_backfill_and_single_ticks_give_the_same_bits_whatever_the_order_of_the_rows(
    rows: list[dict[str, Any]], odd: float, rnd: Any
) -> None:
    # Thirds of odd numbers: sums that round.
    rows = [r | {"x": None if r["x"] is None else r["x"] * odd / 3} for r in rows]
    shuffled = rnd.sample(rows, len(rows))
    ticks = [START + k * 10 * MINUTE for k in range(9)]
    backfill = compute(view(), {"events": frame(rows)}, ticks[0], ticks[-1])
    one_by_one = pl.concat([compute(view(), {"events": frame(shuffled)}, t, t) for t in ticks])
    assert_same_bits(backfill, one_by_one)


@settings(max_examples=60, deadline=None)
@given(events)
def test_no_value_uses_an_event_after_its_tick(rows: list[dict[str, Any]]) -> None:
    tick = START + 30 * MINUTE
    known = [r for r in rows if r["event_timestamp"] <= tick]
    assert_same_bits(compute(view(), {"events": frame(rows)}, START, tick), compute(view(), {"events": frame(known)}, START, tick))


def test_blocks_of_entities_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"who": f"w{k % 7}", "n": k % 3, "event_timestamp": START + k * MINUTE, "x": k / 3, "sign": 1.0} for k in range(100)]
    whole = compute(view(), {"events": frame(rows)}, START, START + 60 * MINUTE)
    monkeypatch.setattr("mlplatform.features.windowed._BLOCK", 40)
    assert_same_bits(whole, compute(view(), {"events": frame(rows)}, START, START + 60 * MINUTE))


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


def assert_same_bits(left: pl.DataFrame, right: pl.DataFrame) -> None:
    bits = pl.col(pl.Float64).reinterpret(signed=False)
    assert left.with_columns(bits).rows() == right.with_columns(bits).rows()
