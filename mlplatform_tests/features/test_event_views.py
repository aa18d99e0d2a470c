"""A view with a row at each event, from its declaration in Feast's words to its backfill; and the independence of flights."""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlplatform.features.engine import compute
from mlplatform.features.plan import TIMESTAMP, ViewPlan, required_days, tick_range
from mlplatform.records import DayRange

VIEWS = """
from datetime import timedelta
from feast import Entity, FileSource, PushSource, StreamFeatureView, ValueType
from feast.aggregation import Aggregation
from feast.field import Field
from feast.types import Float64, String

HOUR = timedelta(hours=1)
card = Entity(name="card", join_keys=["card"], value_type=ValueType.STRING)
card_payments = StreamFeatureView(
    name="card_payments",
    entities=[card],
    schema=[
        Field(name="card", dtype=String),
        Field(name="paid_1h", dtype=Float64, description="Paid in the last hour", tags={"unit": "EUR"}),
        Field(name="paid_24h", dtype=Float64, description="Paid in the last day", tags={"unit": "EUR"}),
        Field(name="payments_1h", dtype=Float64, description="Payments in the last hour"),
        Field(name="largest_30d", dtype=Float64, description="Largest payment of the last 30 days", tags={"unit": "EUR"}),
    ],
    aggregations=[
        Aggregation(column="amount", function="sum", time_window=HOUR, name="paid_1h"),
        Aggregation(column="amount", function="sum", time_window=24 * HOUR, name="paid_24h"),
        Aggregation(column="amount", function="count", time_window=HOUR, name="payments_1h"),
        Aggregation(column="amount", function="max", time_window=30 * 24 * HOUR, name="largest_30d"),
    ],
    source=PushSource(name="payments", batch_source=FileSource(path="payments", timestamp_field="event_timestamp")),
    timestamp_field="event_timestamp",
    enable_tiling=True,
    tiling_hop_size=HOUR / 4,
    ttl=30 * 24 * HOUR,
    owner="cards@example.com",
)
"""
RECIPES = """
from datetime import timedelta
import polars as pl
from mlplatform.specs import FeatureRecipe

def payment_events(tables):
    return tables["payments"].select("card", pl.col("paid_at").alias("event_timestamp"), "amount")

RECIPES = (
    FeatureRecipe(
        view="card_payments",
        inputs={"payments": timedelta(days=30)},
        cadence=timedelta(hours=1),
        trigger="event",
        events=payment_events,
        independent_by="card",
        propagation=timedelta(seconds=2),
    ),
)
"""
DAY = date(2024, 5, 2)
MIDNIGHT = datetime(2024, 5, 2, tzinfo=UTC)
Declare = Callable[[str, str], dict[str, ViewPlan]]


@pytest.fixture
def plan(declare: Declare) -> ViewPlan:
    return declare(VIEWS, RECIPES)["card_payments"]


def payments(rows: list[tuple[str, datetime, float]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"card": pl.String, "paid_at": TIMESTAMP, "amount": pl.Float64}, orient="row")


def on_days(plan: ViewPlan, rows: pl.DataFrame, days: DayRange) -> pl.DataFrame:
    """What a partition computes, from the validated days it reads."""
    needed = required_days(plan, days)["payments"]
    read = rows.filter(pl.col("paid_at").dt.date().is_between(needed.first, needed.last))
    first, last = tick_range(plan, days) or pytest.fail("no times")
    return compute(plan, {"payments": read}, first, last)


def test_a_row_stands_at_each_payment_and_holds_it_and_those_before(plan: ViewPlan) -> None:
    at = MIDNIGHT + timedelta(hours=9, minutes=50, microseconds=7)
    # At 9:50 an hour reaches back to 8:50, and its tail to the hop before: what is after 8:45 counts.
    tail = MIDNIGHT + timedelta(hours=8, minutes=45)
    rows = payments([("a", tail, 100.0), ("a", tail + timedelta.resolution, 0.1), ("b", at, 7.0), ("a", at, 0.2), ("a", at, 0.3)])
    got = on_days(plan, rows, DayRange(DAY, DAY))
    assert got.filter(pl.col("card") == "a").drop("card").rows() == [
        (tail, 100.0, 100.0, 1.0, 100.0),
        (tail + timedelta.resolution, 100.1, 100.1, 2.0, 100.0),
        (at, 0.6, 100.6, 3.0, 100.0),
    ]
    assert got.filter(pl.col("card") == "b").drop("card").rows() == [(at, 7.0, 7.0, 1.0, 7.0)]


def test_a_days_rows_are_the_payments_with_its_date(plan: ViewPlan) -> None:
    end = MIDNIGHT + timedelta(days=1)
    times = [MIDNIGHT - timedelta.resolution, MIDNIGHT, end - timedelta.resolution, end]
    got = on_days(plan, payments([("a", t, 1.0) for t in times]), DayRange(DAY, DAY))
    assert got["event_timestamp"].to_list() == times[1:3]


offsets = st.builds(
    lambda day, edge, us: MIDNIGHT + timedelta(days=day) + edge + timedelta(microseconds=us),
    st.integers(-31, 3),
    st.sampled_from([timedelta(0), timedelta(minutes=15), timedelta(hours=13, minutes=7)]),
    st.integers(-1, 1),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), offsets, st.floats(-1e6, 1e6)), max_size=30), st.randoms(use_true_random=False))
def test_a_backfill_by_day_and_by_range_give_the_same_bits(plan: ViewPlan, rows: list[tuple[str, datetime, float]], rnd: object) -> None:
    by_range = on_days(plan, payments(rows), DayRange(DAY, DAY + timedelta(days=3)))
    rnd.shuffle(rows)  # type: ignore[attr-defined]
    days = (DAY + timedelta(days=k) for k in range(4))
    assert_same_bits(by_range, pl.concat(on_days(plan, payments(rows), DayRange(day, day)) for day in days))


def test_the_rows_of_one_card_do_not_need_the_others(plan: ViewPlan) -> None:
    rng = np.random.default_rng(4)
    times = [MIDNIGHT + timedelta(seconds=int(s)) for s in rng.integers(0, 86400, 300)]
    rows = payments([(str(k % 7), t, float(x)) for k, (t, x) in enumerate(zip(times, rng.normal(size=300), strict=True))])
    whole = on_days(plan, rows, DayRange(DAY, DAY))
    alone = [on_days(plan, part, DayRange(DAY, DAY)) for part in rows.partition_by("card")]
    assert_same_bits(whole, pl.concat(alone).sort("event_timestamp", "card"))


@pytest.mark.parametrize("groups", [2, 97])
def test_the_events_of_flights_are_the_union_over_groups_of_flights(
    groups: int, year: Mapping[str, pl.DataFrame], flight_plans: dict[str, ViewPlan]
) -> None:
    some_flights = {name: table.filter(pl.col("flight_id").hash(7) % 50 == 0) for name, table in year.items() if name != "weather"}
    for view in (p for p in flight_plans.values() if p.windowed):
        by = view.recipe.independent_by
        assert by == "flight_id", view.name
        assert view.recipe.events is not None
        tables = {name: some_flights[name] for name in view.recipe.inputs}
        parts = [
            view.recipe.events({name: table.filter(pl.col(by).hash(1) % groups == k) for name, table in tables.items()})
            for k in range(groups)
        ]
        whole, union = view.recipe.events(tables), pl.concat(parts)
        assert whole.height > 1000
        assert whole.sort(pl.all()).equals(union.sort(pl.all())), view.name


def assert_same_bits(left: pl.DataFrame, right: pl.DataFrame) -> None:
    bits = pl.col(pl.Float64).reinterpret(signed=False)
    assert left.with_columns(bits).rows() == right.with_columns(bits).rows()
