"""The counts of FLIGHTS.md hold in the frames, the times agree with the clocks on the walls, and defects stay in."""

import io
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from mlplatform.local.nycflights import FRAMES, World, data_folder, load_world, local_to_utc


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    with zipfile.ZipFile(data_folder() / "flights.csv.zip") as archive:
        flights = pl.read_csv(io.BytesIO(archive.read("flights.csv")), null_values=["NA"], infer_schema_length=None)
    return flights.with_columns(
        flight_id=pl.format(
            "{}{}-{}T{}",
            "carrier",
            "flight",
            pl.date("year", "month", "day").dt.strftime("%Y%m%d"),
            pl.col("sched_dep_time").cast(pl.String).str.zfill(4),
        )
    )


def test_every_table_has_the_rows_it_should(world: World) -> None:
    assert {name: getattr(world, name).height for name in FRAMES} == {
        "planes": 3322,
        "airlines": 16,
        "airports": 1458,
        "weather": 26_115,
        "schedules": 336_776,
        "departures": 336_776 - 8_255,
        "arrivals": 336_776,
    }


def test_keys_are_unique(world: World) -> None:
    for frame, key in (
        (world.planes, ["tailnum"]),
        (world.airlines, ["carrier"]),
        (world.airports, ["faa"]),
        (world.weather, ["origin", "time_hour"]),
        (world.schedules, ["flight_id"]),
    ):
        assert frame.select(key).is_duplicated().sum() == 0
    events = pl.concat([world.schedules["event_id"], world.departures["event_id"], world.arrivals["event_id"]])
    assert events.n_unique() == len(events)


def test_statuses_are_counted_as_in_the_data(world: World) -> None:
    counts = dict(world.arrivals["status"].value_counts().iter_rows())
    assert counts == {"arrived": 327_346, "cancelled": 8_255, "diverted": 1_175}
    unknown = world.arrivals.filter(pl.col("status") != "arrived")
    assert unknown["arrival_delay_min"].null_count() == unknown.height == 9_430
    assert (unknown["known_at"] - unknown["scheduled_arrival"]).unique().to_list() == [timedelta(hours=24)]


def test_the_base_rate_is_that_of_the_question(world: World) -> None:
    bad = (pl.col("status") != "arrived") | (pl.col("arrival_delay_min") >= 15)
    assert world.arrivals.select(bad.mean()).item() == pytest.approx(0.266, abs=0.0005)


def test_missing_reference_rows_and_values_are_as_described(world: World) -> None:
    assert world.planes["year"].null_count() == 70
    assert world.airports["tzone"].null_count() == 3
    assert set(world.schedules["dest"]) - set(world.airports["faa"]) == {"SJU", "BQN", "STT", "PSE"}
    assert world.schedules.filter(~pl.col("dest").is_in(world.airports["faa"].implode())).height == 7_602
    without_plane = world.schedules.filter(pl.col("tailnum").is_not_null()).join(world.planes, on="tailnum", how="anti")
    assert (without_plane.height, without_plane["tailnum"].n_unique()) == (52_606 - 2_512, 721)
    assert (world.weather["pressure"].null_count(), world.weather["wind_gust"].null_count()) == (2_729, 20_778)


def test_the_defects_are_still_there(world: World) -> None:
    windy = world.weather.filter(pl.col("wind_speed") > 1000)
    assert windy.select("origin", "time_hour").row(0) == ("EWR", datetime(2013, 2, 12, 8, tzinfo=UTC))
    cold = world.weather.filter(pl.col("time_hour").dt.month() == 5, pl.col("temp") < 20)
    assert cold.select("origin", "time_hour", "temp").rows() == [("JFK", datetime(2013, 5, 9, 2, tzinfo=UTC), 13.1)]
    assert world.weather["time_hour"].max() == datetime(2013, 12, 30, 23, tzinfo=UTC)
    no_tail = world.schedules.filter(pl.col("tailnum").is_null())
    outcome = no_tail.join(world.arrivals, on="flight_id")
    assert (no_tail.height, outcome["status"].unique().to_list()) == (2_512, ["cancelled"])
    assert world.schedules.filter(pl.col("origin") == "EWR", pl.col("dest") == "LGA").height == 1
    assert world.arrivals.filter(pl.col("distance_miles") / pl.col("air_time_min") * 60 > 600).height == 4
    hours = world.schedules.with_columns(time_hour=pl.col("scheduled_departure").dt.truncate("1h"))
    # FLIGHTS.md counts 1,573: 17 more have an hour whose temperature is missing.
    assert hours.join(world.weather, on=["origin", "time_hour"], how="anti").height == 1_556


def test_departure_times_agree_with_the_recorded_clock(world: World, raw: pl.DataFrame) -> None:
    shown = pl.col("departed_at").dt.convert_time_zone("America/New_York").dt.strftime("%H%M").cast(pl.Int64)
    seen = world.departures.select("flight_id", shown=shown).join(raw.select("flight_id", "dep_time"), on="flight_id")
    assert seen.filter(pl.col("shown") != pl.col("dep_time") % 2400).height == 0


def test_arrival_times_agree_with_the_clock_at_the_destination(world: World, raw: pl.DataFrame) -> None:
    zones = dict(world.airports.select("faa", "tzone").iter_rows()) | dict.fromkeys(("SJU", "BQN", "STT", "PSE"), "America/Puerto_Rico")
    arrived = world.arrivals.filter(pl.col("status") == "arrived").select("flight_id", "dest", "known_at")
    seen = pl.concat(
        rows.with_columns(shown=pl.col("known_at").dt.convert_time_zone(zones[dest]).dt.strftime("%H%M").cast(pl.Int64))
        for (dest,), rows in arrived.group_by("dest")
    ).join(raw.select("flight_id", "arr_time"), on="flight_id")
    wrong = seen.filter(pl.col("shown") != pl.col("arr_time") % 2400)
    # The night the clocks went forward: 2:03 was written down, an hour that day did not have.
    assert wrong["flight_id"].to_list() == ["B635-20130309T2145"]


def test_every_scheduled_block_is_plausible(world: World) -> None:
    block = (world.schedules["scheduled_arrival"] - world.schedules["scheduled_departure"]).dt.total_minutes()
    assert (block.min(), block.max()) == (50, 700)


def test_a_second_load_reads_the_cache(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_world(tmp_path)
    monkeypatch.setattr("mlplatform.local.nycflights.data_folder", lambda: pytest.fail("the files were read again"))
    again = load_world(tmp_path)
    assert all(getattr(again, name).equals(getattr(world, name)) for name in FRAMES)


def test_clock_changes_are_read_as_documented() -> None:
    local = pl.DataFrame({"at": [datetime(2013, 11, 3, 1, 30), datetime(2013, 3, 10, 2, 30)], "zone": "America/New_York"})  # noqa: DTZ001
    utc = local.select(local_to_utc(pl.col("at"), pl.col("zone"), ["America/New_York"])).to_series()
    assert utc.to_list() == [datetime(2013, 11, 3, 5, 30, tzinfo=UTC), datetime(2013, 3, 10, 7, 30, tzinfo=UTC)]
