"""Request-time features against the calendar and zone libraries."""

import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import holidays
import numpy as np
import pytest

from feature_definitions.flights.request_functions import DESCRIPTIONS, REQUEST_FUNCTIONS
from feature_definitions.flights.request_time import calendar, trip

NEW_YORK = ZoneInfo("America/New_York")


def departures(*moments: datetime) -> dict[str, np.ndarray]:
    return {"scheduled_departure": np.array([m.astimezone(UTC).replace(tzinfo=None) for m in moments], dtype="datetime64[us]")}


@pytest.mark.parametrize(
    "day", [date(2013, 3, 10), date(2013, 11, 3), date(2024, 3, 10), date(2006, 4, 2), date(1974, 1, 6), date(2037, 11, 1)]
)
def test_every_minute_around_a_change_of_the_clock_has_new_yorks_time(day: date) -> None:
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    moments = [start + timedelta(minutes=m) for m in range(0, 1440, 5)]
    got = calendar(departures(*moments))
    local = [m.astimezone(NEW_YORK) for m in moments]
    assert got["departure_minute_of_day"].tolist() == [t.hour * 60 + t.minute for t in local]
    assert got["departure_weekday"].tolist() == [t.weekday() for t in local]


def test_the_day_of_the_year_is_new_yorks_not_utcs() -> None:
    late = datetime(2013, 7, 3, 23, 30, tzinfo=NEW_YORK)
    got = calendar(departures(late))
    assert got["departure_weekday"].tolist() == [2.0]
    assert got["departure_minute_of_day"].tolist() == [1410.0]
    assert got["days_to_holiday"].tolist() == [1.0]


def test_holidays_are_the_federal_ones_of_the_holidays_package_for_sixty_years() -> None:
    years = range(1990, 2050)
    known = holidays.country_holidays("US", years=[*years, 1989, 2050], observed=False)
    # Inauguration Day counts in Washington only.
    federal = np.array(sorted(d.toordinal() for d, name in known.items() if name != "Inauguration Day"))
    days = [date(years[0], 1, 1) + timedelta(days=k) for k in range(365 * len(years))]
    got = calendar(departures(*(datetime(d.year, d.month, d.day, 12, tzinfo=NEW_YORK) for d in days)))["days_to_holiday"]
    ordinals = np.array([d.toordinal() for d in days])
    expected = np.minimum(np.abs(ordinals[:, None] - federal[None, :]).min(axis=1), 7)
    assert got.tolist() == expected.tolist()


def test_history_and_a_single_request_give_the_same_bits() -> None:
    many = departures(*(datetime(2013, 1, 1, tzinfo=UTC) + timedelta(minutes=997 * k) for k in range(500)))
    whole = calendar(many)
    for k in (0, 17, 499):
        one = calendar({"scheduled_departure": many["scheduled_departure"][k : k + 1]})
        assert {n: v[0] for n, v in one.items()} == {n: v[k] for n, v in whole.items()}


def test_a_trip_has_its_block_in_minutes() -> None:
    day = np.datetime64("2013-01-01T10:15", "us")
    got = trip(
        {
            "scheduled_departure": np.array([day]),
            "scheduled_arrival": np.array([day + np.timedelta64(227, "m")]),
            "distance_miles": np.array([1400]),
            "scheduled_load": np.array([23]),
        }
    )
    assert {n: v.tolist() for n, v in got.items()} == {
        "trip_distance_miles": [1400.0],
        "scheduled_block_min": [227.0],
        "origin_scheduled_load": [23.0],
    }


def test_an_unknown_time_gives_nan_and_nothing_else_does() -> None:
    moments = np.array(["2013-01-01", "NaT"], dtype="datetime64[us]")
    for function in REQUEST_FUNCTIONS:
        columns = {name: moments if name.endswith(("departure", "arrival")) else np.array([1.0, np.nan]) for name in function.inputs}
        for name, values in function.function(columns).items():
            assert np.isnan(values).tolist() == [False, True], name


def test_no_rows_give_no_rows() -> None:
    empty = np.array([], dtype="datetime64[us]")
    assert all(v.size == 0 for v in calendar({"scheduled_departure": empty}).values())


def test_each_function_gives_what_it_declares_and_every_output_is_described() -> None:
    columns = departures(datetime(2013, 1, 1, tzinfo=UTC))
    columns |= {"scheduled_arrival": columns["scheduled_departure"], "distance_miles": np.array([1.0]), "scheduled_load": np.array([1])}
    for function in REQUEST_FUNCTIONS:
        outputs = function.function({name: columns[name] for name in function.inputs})
        assert tuple(outputs) == function.outputs
        assert {values.dtype for values in outputs.values()} == {np.dtype(np.float64)}
    assert set(DESCRIPTIONS) == {name for function in REQUEST_FUNCTIONS for name in function.outputs}


def test_the_service_imports_them_without_any_table_library() -> None:
    script = (
        "import sys, feature_definitions.flights.request_time, feature_definitions.columns;"
        "print(*{'feast', 'pandas', 'polars', 'dagster', 'holidays', 'mlplatform.settings'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
