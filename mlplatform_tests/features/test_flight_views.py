"""The declared flight views on the real year: nothing of the future, the same bits however computed, exact states."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta

import polars as pl
import pytest

from mlplatform.features.engine import compute
from mlplatform.features.plan import ViewPlan, required_days, tick_range
from mlplatform.records import DayRange

VIEWS = (
    "origin_weather",
    "origin_congestion",
    "nyc_state",
    "carrier_record",
    "origin_carrier_record",
    "destination_record",
    "route_carrier_record",
    "flight_record",
)
TIME_COLUMNS = {"schedules": "published_at", "departures": "departed_at", "arrivals": "known_at", "weather": "time_hour"}
KNOWN_AFTER = {"weather": timedelta(hours=1)}
# The days around the snow of 8 February: cancellations, long delays, night hours.
SNOW = DayRange(date(2013, 2, 7), date(2013, 2, 10))

Year = Mapping[str, pl.DataFrame]
Plans = dict[str, ViewPlan]


def rows_on(plan: ViewPlan, year: Year, days: DayRange) -> dict[str, pl.DataFrame]:
    """The partitions that `required_days` asks for, as the lake would give them."""
    return {
        source: year[source].filter(pl.col(TIME_COLUMNS[source]).dt.date().is_between(d.first, d.last))
        for source, d in required_days(plan, days).items()
    }


def on_days(plan: ViewPlan, year: Year, days: DayRange) -> pl.DataFrame:
    first, last = tick_range(plan, days) or (datetime.max.replace(tzinfo=UTC),) * 2
    return compute(plan, rows_on(plan, year, days), first, last)


@pytest.mark.parametrize("name", VIEWS)
def test_a_backfill_the_daily_partitions_and_a_single_tick_give_the_same_bits(name: str, year: Year, flight_plans: Plans) -> None:
    plan = flight_plans[name]
    # The backfill reads the whole year and unsorted; a day reads only what its lookbacks ask for.
    first, last = tick_range(plan, SNOW) or pytest.fail("no ticks")
    everything = {source: frame.sample(fraction=1, shuffle=True, seed=3) for source, frame in year.items()}
    backfill = compute(plan, everything, first, last)
    day = timedelta(days=1)
    daily = pl.concat([on_days(plan, year, DayRange(SNOW.first + k * day, SNOW.first + k * day)) for k in range(4)])
    assert backfill.height > 0
    assert_same_bits(backfill, daily)
    tick = first + (last - first) // plan.cadence // 2 * plan.cadence
    single = compute(plan, rows_on(plan, year, DayRange(tick.date(), tick.date())), tick, tick)
    assert_same_bits(single, backfill.filter(pl.col("event_timestamp") == tick))


@pytest.mark.parametrize("name", VIEWS)
def test_no_value_uses_what_became_known_after_its_tick(name: str, year: Year, flight_plans: Plans) -> None:
    plan = flight_plans[name]
    tick = datetime.combine(date(2013, 2, 9), time(0), UTC)
    known = {
        source: frame.filter(pl.col(TIME_COLUMNS[source]) + KNOWN_AFTER.get(source, timedelta(0)) <= tick) for source, frame in year.items()
    }
    earlier = tick - timedelta(days=2)
    assert_same_bits(compute(plan, year, earlier, tick), compute(plan, known, earlier, tick))


def test_overdue_is_exactly_what_was_scheduled_in_the_last_three_hours_and_has_not_left(year: Year, flight_plans: Plans) -> None:
    got = on_days(flight_plans["origin_congestion"], year, SNOW)
    flights = year["schedules"].join(year["departures"].select("flight_id", "departed_at"), on="flight_id", how="left")
    ticks = got.select("origin", "event_timestamp")
    pairs = flights.filter(pl.col("flight_date").is_between(date(2013, 2, 5), SNOW.last)).join_where(
        ticks,
        pl.col("origin") == pl.col("origin_right"),
        pl.col("scheduled_departure") <= pl.col("event_timestamp"),
        pl.col("scheduled_departure") > pl.col("event_timestamp") - timedelta(hours=3),
    )
    late = (pl.col("event_timestamp") - pl.col("scheduled_departure")).dt.total_seconds() / 60
    waiting = pl.col("departed_at").is_null() | (pl.col("departed_at") > pl.col("event_timestamp"))
    expected = pairs.group_by("origin", "event_timestamp").agg(
        n=waiting.sum().cast(pl.Float64), minutes=late.filter(waiting).sum(), scheduled=pl.len().cast(pl.Float64)
    )
    both = got.join(expected, on=["origin", "event_timestamp"], how="left").with_columns(pl.col("n", "minutes", "scheduled").fill_null(0.0))
    assert both["origin_overdue_n"].equals(both["n"])
    assert both["origin_scheduled_3h"].equals(both["scheduled"])
    assert (both["origin_overdue_minutes"] - both["minutes"]).abs().max() == pytest.approx(0, abs=1e-6)
    share = both.filter(pl.col("scheduled") > 0)
    assert (share["origin_overdue_fraction"] - share["n"] / share["scheduled"]).abs().max() == pytest.approx(0, abs=1e-12)
    # A quiet hour has no share, rather than a share of zero.
    assert both.filter(pl.col("scheduled") == 0)["origin_overdue_fraction"].null_count() == both.filter(pl.col("scheduled") == 0).height
    assert both["n"].max() > 30


def test_carrier_rates_equal_a_slice_of_the_outcomes_known_by_then(year: Year, flight_plans: Plans) -> None:
    got = on_days(flight_plans["carrier_record"], year, DayRange(date(2013, 3, 5), date(2013, 3, 5)))
    for row in got.sample(60, seed=5).iter_rows(named=True):
        tick = row["event_timestamp"]
        known = year["arrivals"].filter(pl.col("carrier") == row["carrier"], pl.col("known_at") <= tick)
        for window, hours in (("3h", 3), ("24h", 24), ("7d", 168), ("30d", 720)):
            inside = known.filter(pl.col("known_at") > tick - timedelta(hours=hours))
            bad = inside.filter((pl.col("status") != "arrived") | (pl.col("arrival_delay_min") >= 15)).height
            assert row[f"carrier_disrupted_{window}"] == (bad / inside.height if inside.height else None)


def test_weather_is_served_an_hour_after_its_hour_and_holds_its_own_past(year: Year, flight_plans: Plans) -> None:
    got = on_days(flight_plans["origin_weather"], year, DayRange(date(2013, 2, 9), date(2013, 2, 9)))
    row = got.filter(pl.col("origin") == "JFK", pl.col("event_timestamp") == datetime(2013, 2, 9, 3, tzinfo=UTC)).row(0, named=True)
    seen = year["weather"].filter(pl.col("origin") == "JFK", pl.col("time_hour") <= datetime(2013, 2, 9, 2, tzinfo=UTC)).tail(6)
    assert row["temp"] == seen["temp"][-1]
    assert row["precip_6h"] == pytest.approx(seen["precip"].sum())
    assert row["pressure_change_3h"] == pytest.approx(seen["pressure"][-1] - seen["pressure"][-4])


def test_a_missing_observation_leaves_no_row_and_no_invented_change_of_pressure(year: Year, flight_plans: Plans) -> None:
    plan = flight_plans["origin_weather"]
    gone = datetime(2013, 2, 9, 2, tzinfo=UTC)
    year = {"weather": year["weather"].filter(pl.col("time_hour") != gone)}
    got = compute(plan, year, gone, gone + timedelta(hours=6))
    assert gone + timedelta(hours=1) not in got["event_timestamp"].to_list()
    later = got.filter(pl.col("event_timestamp") == gone + timedelta(hours=4))
    assert later.height == 3
    assert later["pressure_change_3h"].null_count() == 3


def test_every_feature_and_view_says_what_it_is(flight_plans: Plans) -> None:
    assert set(flight_plans) == set(VIEWS)
    for plan in flight_plans.values():
        assert plan.description, plan.name
        assert "@" in plan.owner
        assert plan.tags["domain"] == "flights"
        assert all(plan.feature_descriptions.values()), plan.name
        assert plan.ttl >= 2 * plan.cadence


def assert_same_bits(left: pl.DataFrame, right: pl.DataFrame) -> None:
    assert left.columns == right.columns
    bits = pl.col(pl.Float64).reinterpret(dtype=pl.UInt64)
    assert left.with_columns(bits).rows() == right.with_columns(bits).rows()
