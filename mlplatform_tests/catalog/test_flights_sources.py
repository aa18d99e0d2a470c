"""The contracts of the flights use case against the whole year of real data: the known defects, in their exact numbers."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest

from mlplatform.catalog.flights.sources import SOURCES
from mlplatform.local.nycflights import World, load_world
from mlplatform.specs import SourceSpec
from mlplatform.validation.describe import checks, markdown
from mlplatform.validation.split import SplitResult, split
from mlplatform.validation.table import coverage, judge

SPECS = {s.name: s for s in SOURCES}
HOME_ZONE = "America/New_York"
# Missing from the airports table.
CARIBBEAN = dict.fromkeys(("SJU", "BQN", "STT", "PSE"), "America/Puerto_Rico")
RECEIVED = datetime(2014, 1, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # The cache is the session's own: built once however many tests ask.
    return load_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture(scope="module")
def references(world: World) -> Mapping[str, pl.DataFrame]:
    return {"airlines": world.airlines, "airports": world.airports, "planes": world.planes}


@pytest.fixture(scope="module")
def year(world: World, references: Mapping[str, pl.DataFrame]) -> Mapping[str, SplitResult]:
    return {s.name: split(received(getattr(world, s.name)), s, references) for s in SOURCES}


def received(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(received_at=pl.lit(RECEIVED))


@pytest.mark.parametrize(
    ("source", "broken", "warned"),
    [
        ("airlines", {}, {}),
        ("airports", {}, {}),
        ("planes", {}, {"light_aircraft": 40, "jetblue_light_aircraft": 3}),
        ("weather", {"range:wind_speed": 1, "temperature_spike": 1}, {}),
        (
            "schedules",
            {"between_new_york_airports": 1},
            {"reference:airports": 7602, "reference:planes": 52606, "tailnum_missing": 2512},
        ),
        ("departures", {}, {}),
        ("arrivals", {}, {"impossible_air_speed": 4}),
    ],
)
def test_the_defects_of_the_year_are_caught_in_their_exact_numbers(
    year: Mapping[str, SplitResult], source: str, broken: Mapping[str, int], warned: Mapping[str, int]
) -> None:
    summary = year[source].summary
    assert (summary.broken, summary.warned) == (broken, warned)
    assert summary.rows_in == summary.validated + summary.quarantined + summary.redelivered
    assert summary.redelivered == 0
    assert judge(year[source], SPECS[source]).failures == ()


def test_the_two_impossible_observations_are_the_ones_known(year: Mapping[str, SplitResult]) -> None:
    found = (
        year["weather"].quarantined.sort("time_hour").select("origin", pl.col("time_hour").dt.convert_time_zone(HOME_ZONE), "broken_rules")
    )
    assert [(o, f"{t:%m-%d %H:%M}", rules) for o, t, rules in found.rows()] == [
        ("EWR", "02-12 03:00", ["range:wind_speed"]),
        ("JFK", "05-08 22:00", ["temperature_spike"]),
    ]


def test_the_one_flight_between_new_york_airports_is_set_aside(year: Mapping[str, SplitResult]) -> None:
    (flight,) = year["schedules"].quarantined.to_dicts()
    assert (flight["origin"], flight["dest"], flight["flight_date"]) == ("EWR", "LGA", date(2013, 7, 27))
    assert flight["broken_rules"] == ["between_new_york_airports", "reference:planes", "tailnum_missing"]


def test_a_flight_set_aside_takes_none_of_its_events_with_it(year: Mapping[str, SplitResult]) -> None:
    (flight_id,) = year["schedules"].quarantined["flight_id"]
    assert year["arrivals"].validated.filter(pl.col("flight_id") == flight_id).height == 1


def test_every_flight_without_a_tail_number_was_cancelled(world: World) -> None:
    unknown = world.schedules.filter(pl.col("tailnum").is_null()).join(world.arrivals, on="flight_id")
    assert unknown["status"].unique().to_list() == ["cancelled"]


def test_flights_without_a_usable_weather_hour(world: World, year: Mapping[str, SplitResult]) -> None:
    weather = SPECS["weather"]
    (declared,) = weather.contract.coverage
    assert coverage(world.weather, weather, declared, world.schedules).missing == 1573
    # The two hours set aside leave six more flights without one.
    assert coverage(year["weather"].validated, weather, declared, world.schedules).missing == 1579


def test_coverage_by_day_adds_up_to_the_year(world: World) -> None:
    weather = SPECS["weather"]
    (declared,) = weather.contract.coverage
    missing = 0
    by_day = world.weather.with_columns(day=pl.col("time_hour").dt.date()).partition_by("day", as_dict=True)
    for (day,), flights in world.schedules.group_by(pl.col("scheduled_departure").dt.date()):
        midnight = datetime.combine(day, datetime.min.time(), UTC)
        # What a daily check would read: the schedules published up to `lookback` before the day's last departure.
        assert flights["published_at"].min() >= midnight - declared.lookback
        missing += coverage(by_day.get((day,), by_day[date(2013, 1, 1),].clear()), weather, declared, flights).missing
    assert missing == 1573


def test_nulls_of_the_reference_data(world: World) -> None:
    assert world.planes["year"].null_count() == 70
    assert world.airports["tzone"].null_count() == 3


@pytest.mark.parametrize("source", ["weather", "schedules", "departures", "arrivals"])
def test_each_complete_day_passes_on_its_own(
    world: World, references: Mapping[str, pl.DataFrame], year: Mapping[str, SplitResult], source: str
) -> None:
    spec = SPECS[source]
    days = received(getattr(world, source)).with_columns(event_date=pl.col(str(spec.time_column)).dt.date())
    broken: dict[str, int] = {}
    # Every day with a defect that sets a row aside, and every ninth besides.
    wanted = set(year[source].quarantined["event_date"]) | set(days["event_date"].unique().sort().gather_every(9))
    for (day,), rows in days.filter(pl.col("event_date").is_in(list(wanted))).group_by("event_date"):
        result = split(rows, spec, references, context=around(days, spec, day))
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC)
        assert judge(result, spec, midnight).failures == (), day
        for name, count in result.summary.broken.items():
            broken[name] = broken.get(name, 0) + count
    assert broken == year[source].summary.broken


def around(days: pl.DataFrame, spec: SourceSpec, day: date) -> pl.DataFrame:
    start = datetime.combine(day, datetime.min.time(), UTC)
    hours = timedelta(hours=3)
    near = pl.col(str(spec.time_column)).is_between(start - hours, start + timedelta(days=1) + hours)
    return days.filter(near & (pl.col("event_date") != day))


def test_a_spike_in_a_days_last_hour_needs_the_next_day_to_be_seen(world: World) -> None:
    weather = SPECS["weather"]
    jfk = received(world.weather.filter(pl.col("origin") == "JFK"))
    spike = datetime(2013, 5, 9, 2, tzinfo=UTC)
    before, after = jfk.filter(pl.col("time_hour") <= spike), jfk.filter(pl.col("time_hour") > spike)
    assert split(before, weather, {}).summary.broken == {}
    assert split(before, weather, {}, context=after).summary.broken == {"temperature_spike": 1}


# --- block times on the nights the clocks change --------------------------------------------------------------------


def read_before_rolling_over(world: World, flights: pl.DataFrame) -> pl.DataFrame:
    """The flights as a careless reader has them: arrival clock time read on the departure's date, a day added in UTC if it is before."""
    zones = dict(world.airports.select("faa", "tzone").drop_nulls().iter_rows()) | CARIBBEAN
    by_zone = flights.with_columns(zone=pl.col("dest").replace_strict(zones)).partition_by("zone", as_dict=True)
    return pl.concat([_read_before_rolling_over(rows, zone) for (zone,), rows in by_zone.items()]).drop("zone")


def _read_before_rolling_over(flights: pl.DataFrame, zone: str) -> pl.DataFrame:
    clock = pl.col("flight_date").dt.combine(pl.col("scheduled_arrival").dt.convert_time_zone(zone).dt.time(), "us")
    # 02:xx does not exist on the day the clocks go forward; no arrival of the year falls there.
    read = clock.dt.replace_time_zone(zone, ambiguous="earliest").dt.convert_time_zone("UTC")
    rolled = pl.when(read < pl.col("scheduled_departure")).then(read + pl.duration(days=1)).otherwise(read)
    return flights.with_columns(scheduled_arrival=rolled)


def test_block_times_read_with_the_wrong_offset_are_set_aside(world: World, references: Mapping[str, pl.DataFrame]) -> None:
    """FLIGHTS.md's eight. They lie in the reading, not in the data: read on the right day, no block time is impossible."""
    careless = received(read_before_rolling_over(world, world.schedules))
    result = split(careless, SPECS["schedules"], references)
    found = result.quarantined.filter(pl.col("broken_rules").list.contains("impossible_block_time"))
    assert dict(found.group_by("flight_date").len().iter_rows()) == {date(2013, 11, 3): 7, date(2013, 3, 10): 1}
    sound = split(received(world.schedules), SPECS["schedules"], references)
    assert "impossible_block_time" not in sound.summary.broken


# --- the declarations themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SOURCES, ids=lambda s: s.name)
def test_every_column_is_described_and_every_number_has_a_unit(spec: SourceSpec) -> None:
    for column in spec.contract.columns:
        assert column.description, column.name
        assert column.unit or column.dtype not in ("int", "float", "timestamp"), column.name
    assert spec.description
    assert spec.owner.startswith("team:")


@pytest.mark.parametrize("spec", SOURCES, ids=lambda s: s.name)
def test_the_contract_declares_exactly_the_columns_of_the_source(spec: SourceSpec, world: World) -> None:
    assert {c.name for c in spec.contract.columns} == set(getattr(world, spec.name).columns)


def test_contracts_can_be_read_as_pages() -> None:
    assert all(spec.description in markdown(spec) and checks(spec)[0].blocking for spec in SOURCES)
