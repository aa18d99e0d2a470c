"""The labelled rows of the flight models, against the year's known counts and a brute force."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from mlplatform.catalog.flights.rows import REQUEST_COLUMNS, delay_rows, disruption_rows, with_scheduled_load
from mlplatform.local.nycflights import World, load_world


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def rows(world: World) -> pl.DataFrame:
    return disruption_rows({"schedules": world.schedules, "arrivals": world.arrivals})


def test_every_scheduled_flight_is_one_row_asked_two_hours_before(rows: pl.DataFrame, world: World) -> None:
    assert rows.height == world.schedules.height == rows["flight_id"].n_unique()
    assert (rows["scheduled_departure"] - rows["event_timestamp"]).unique().to_list() == [timedelta(hours=2)]
    assert set(REQUEST_COLUMNS) < set(rows.columns)
    assert rows["event_timestamp"].is_sorted()


def test_the_base_rate_is_that_of_the_year(rows: pl.DataFrame) -> None:
    assert rows["label"].dtype == pl.Int8
    assert rows["label"].null_count() == 0
    assert rows["label"].mean() == pytest.approx(0.266, abs=0.0005)
    assert rows.filter(pl.col("event_timestamp") >= datetime(2013, 11, 1, tzinfo=UTC)).height == pytest.approx(55_403, abs=30)


def test_a_label_is_known_after_its_question(rows: pl.DataFrame) -> None:
    wait = rows["label_known_at"] - rows["event_timestamp"]
    assert wait.min() > timedelta(0)  # type: ignore[operator]  # a duration column's minimum is a timedelta
    assert wait.median() == pytest.approx(timedelta(hours=4.8), abs=timedelta(minutes=10))


def test_a_flight_whose_outcome_is_not_known_yet_has_a_row_without_a_label(world: World) -> None:
    now = datetime(2013, 6, 1, 16, tzinfo=UTC)
    today = world.schedules.filter(pl.col("flight_date") == now.date())
    known = world.arrivals.filter(pl.col("known_at") <= now)
    got = disruption_rows({"schedules": today, "arrivals": known})
    assert got.height == today.height
    unknown = got.filter(pl.col("label").is_null())
    assert 0 < unknown.height < got.height
    assert unknown["label_known_at"].null_count() == unknown.height


def test_the_load_counts_flights_of_the_origin_within_half_an_hour_both_ends_included(world: World) -> None:
    day = world.schedules.filter(pl.col("flight_date").is_between(datetime(2013, 5, 1), datetime(2013, 5, 2)))  # noqa: DTZ001  # dates
    got = with_scheduled_load(day)
    for row in got.sample(100, seed=2).iter_rows(named=True):
        due = row["scheduled_departure"]
        near = day.filter(
            pl.col("origin") == row["origin"],
            pl.col("scheduled_departure") >= due - timedelta(minutes=30),
            pl.col("scheduled_departure") <= due + timedelta(minutes=30),
        )
        assert row["scheduled_load"] == near.height


def test_no_schedules_give_no_rows(world: World) -> None:
    got = disruption_rows({"schedules": world.schedules.clear(), "arrivals": world.arrivals})
    assert got.height == 0
    assert got.schema["scheduled_load"] == pl.Int64


def test_two_outcomes_of_one_flight_are_refused_rather_than_doubling_its_row(world: World) -> None:
    day, outcome = world.schedules.head(3), world.arrivals.filter(pl.col("flight_id") == world.schedules["flight_id"][0])
    with pytest.raises(pl.exceptions.ComputeError, match="did not fulfill m:1"):
        disruption_rows({"schedules": day, "arrivals": pl.concat([outcome, outcome])})


def test_a_delay_is_a_label_where_the_flight_arrived_and_nowhere_else(rows: pl.DataFrame, world: World) -> None:
    delays = delay_rows({"schedules": world.schedules, "arrivals": world.arrivals})
    assert delays.drop("label", "label_known_at").equals(rows.drop("label", "label_known_at"))
    assert delays["label"].dtype == pl.Float64
    never = world.arrivals.filter(pl.col("status") != "arrived")["flight_id"]
    assert set(delays.filter(pl.col("label").is_null())["flight_id"]) == set(never)
    both = delays.filter(pl.col("label").is_not_null()).join(rows.select("flight_id", late="label"), on="flight_id")
    assert both.filter((pl.col("label") >= 15) != (pl.col("late") == 1)).is_empty()
