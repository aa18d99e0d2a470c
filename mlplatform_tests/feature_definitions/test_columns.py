"""Conversion of request values to NumPy columns."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from feature_definitions.columns import columns, lists, numbers, timestamps

MOMENT = np.datetime64("2013-09-01T10:05:00.000007", "us")


@pytest.mark.parametrize(
    "value",
    [
        "2013-09-01T10:05:00.000007Z",
        "2013-09-01T06:05:00.000007-04:00",
        datetime(2013, 9, 1, 10, 5, 0, 7, tzinfo=UTC),
        pd.Timestamp("2013-09-01T10:05:00.000007", tz="UTC"),
        MOMENT,
    ],
)
def test_a_time_is_exact_to_the_microsecond_however_it_is_written(value: object) -> None:
    assert timestamps([value])[0] == MOMENT


def test_missing_values_stay_missing() -> None:
    assert np.isnat(timestamps([None, pd.NaT, np.datetime64("NaT")])).all()
    assert np.isnan(numbers([None, float("nan")])).all()


@pytest.mark.parametrize("value", ["2013-09-01T10:05:00", datetime(2013, 9, 1), "2013-09-01"])  # noqa: DTZ001  # a time without a zone is the case
def test_a_time_without_a_zone_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="has no zone"):
        timestamps([value])


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid isoformat"):
        timestamps(["soon"])
    with pytest.raises(TypeError, match="is no time"):
        timestamps([7])


def test_columns_come_by_name_and_go_back_as_lists() -> None:
    got = columns({"at": ["2013-09-01T10:05:00.000007Z"], "n": [3]}, times=("at",))
    assert got["at"].tolist() == [MOMENT.item()]
    assert lists({"n": got["n"]}) == {"n": [3.0]}
