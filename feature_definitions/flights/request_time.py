"""Request-time features of a scheduled flight: plain functions on NumPy columns, one code for history and serving.

Belongs here: functions of the request alone, with NumPy and the standard library (the service imports this module).
Does not belong here: their declaration (`request_functions`), stored features, conversion of text to times (`columns`).

Times are `datetime64[us]` in UTC; NaT gives NaN. Every output is float64.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]
Floats = NDArray[np.float64]

HOLIDAY_LIMIT_DAYS = 7
_HOUR_S = 3600
_DAY_MIN = 1440


def calendar(columns: Mapping[str, Column]) -> dict[str, Floats]:
    """Of `scheduled_departure`, on New York's clock: minute of the day (0–1439), weekday (Monday = 0) and days to the
    nearest federal holiday (0–7, 7 meaning seven or more)."""
    minutes, known = _local_minutes(columns["scheduled_departure"])
    day = minutes // _DAY_MIN
    return {
        "departure_minute_of_day": np.where(known, minutes % _DAY_MIN, np.nan),
        # 1 January 1970 was a Thursday.
        "departure_weekday": np.where(known, (day + 3) % 7, np.nan),
        "days_to_holiday": np.where(known, _days_to_holiday(day), np.nan),
    }


def trip(columns: Mapping[str, Column]) -> dict[str, Floats]:
    """Distance in miles, scheduled block time in minutes, and flights scheduled from the origin within half an hour."""
    span = columns["scheduled_arrival"].astype("datetime64[us]") - columns["scheduled_departure"].astype("datetime64[us]")
    return {
        "trip_distance_miles": columns["distance_miles"].astype(np.float64),
        "scheduled_block_min": span / np.timedelta64(1, "m"),
        "origin_scheduled_load": columns["scheduled_load"].astype(np.float64),
    }


def _local_minutes(moments: Column) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Minutes since 1970 on New York's wall clock, and where the time is known (0 elsewhere)."""
    utc = moments.astype("datetime64[us]")
    known = ~np.isnat(utc)
    seconds = np.where(known, utc, np.datetime64(0, "us")).astype(np.int64) // 1_000_000
    # The clock's offset changes on full hours only, so one look-up per distinct hour is exact.
    hours, position = np.unique(seconds // _HOUR_S, return_inverse=True)
    offsets = np.array([_new_york_offset_s(int(hour)) for hour in hours], dtype=np.int64)
    return (seconds + offsets[position]) // 60, known


@lru_cache(maxsize=100_000)
def _new_york_offset_s(hour: int) -> int:
    offset = datetime.fromtimestamp(hour * _HOUR_S, UTC).astimezone(ZoneInfo("America/New_York")).utcoffset()
    assert offset is not None  # a time with a zone has one
    return int(offset.total_seconds())


def _days_to_holiday(day: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distance in days to the nearest holiday before or after, at most seven."""
    if day.size == 0:
        return day
    years = day.astype("datetime64[D]").astype("datetime64[Y]").astype(int) + 1970
    holidays = np.concatenate([_holidays(int(year)) for year in range(int(years.min()) - 1, int(years.max()) + 2)])
    after = np.searchsorted(holidays, day)
    nearest = np.minimum(np.abs(holidays[after - 1] - day), np.abs(holidays[after] - day))
    return np.minimum(nearest, HOLIDAY_LIMIT_DAYS)


@lru_cache(maxsize=500)
def _holidays(year: int) -> NDArray[np.int64]:
    """US federal holidays of a year as days since 1970, on their own dates (people travel by these, not by the day off in
    lieu). 5 U.S.C. § 6103(a)."""
    days = [
        _date(year, 1, 1),
        _weekday(year, 1, 0, 3),  # Martin Luther King
        _weekday(year, 2, 0, 3),  # Washington
        _weekday(year, 6, 0, 1) - 7,  # Memorial: the last Monday of May
        _date(year, 7, 4),
        _weekday(year, 9, 0, 1),  # Labor
        _weekday(year, 10, 0, 2),  # Columbus
        _date(year, 11, 11),
        _weekday(year, 11, 3, 4),  # Thanksgiving
        _date(year, 12, 25),
    ]
    if year >= 2021:
        days.append(_date(year, 6, 19))
    return np.sort(np.array(days, dtype=np.int64))


def _date(year: int, month: int, day: int) -> int:
    return date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()


def _weekday(year: int, month: int, weekday: int, nth: int) -> int:
    """The nth (from 1) weekday (Monday = 0) of a month."""
    first = _date(year, month, 1)
    return first + (weekday - (first + 3)) % 7 + 7 * (nth - 1)
