"""The flight models' declarations agree with the rows and request functions they rest on."""

from datetime import UTC, date, datetime, timedelta

import polars as pl

from feature_definitions.flights.request_functions import REQUEST_FUNCTIONS
from mlplatform.catalog.flights.models import DEMO_SPLIT, MODELS, YEAR_SPLIT, flight_disruption
from mlplatform.catalog.flights.rows import REQUEST_COLUMNS


def rows() -> pl.DataFrame:
    due = datetime(2013, 9, 1, 14, 15, tzinfo=UTC)
    utc = pl.Datetime("us", "UTC")
    schedules = pl.DataFrame(
        {
            "flight_id": ["UA1545-20130901T1015"],
            "carrier": ["UA"],
            "flight": [1545],
            "origin": ["EWR"],
            "dest": ["IAH"],
            "scheduled_departure": [due],
            "scheduled_arrival": [due + timedelta(hours=4)],
            "distance_miles": [1400.0],
        },
        schema_overrides={"scheduled_departure": utc, "scheduled_arrival": utc},
    )
    arrivals = pl.DataFrame(
        {"flight_id": ["UA1545-20130901T1015"], "status": ["arrived"], "arrival_delay_min": [20.0], "known_at": [due + timedelta(hours=5)]},
        schema_overrides={"known_at": utc},
    )
    return flight_disruption.rows({"schedules": schedules, "arrivals": arrivals})


def test_the_rows_have_every_column_the_model_names():
    needed = {*flight_disruption.row_key, *flight_disruption.categorical, *flight_disruption.slices}
    assert needed | {"event_timestamp", "label", "label_known_at"} <= set(rows().columns)


def test_an_application_sends_what_the_rows_have_in_history():
    assert tuple(field.name for field in flight_disruption.request_fields) == REQUEST_COLUMNS
    assert {name for function in REQUEST_FUNCTIONS for name in function.inputs} <= set(REQUEST_COLUMNS)
    assert [f.name for f in flight_disruption.request_fields if f.constant] == ["region"]


def test_the_question_is_asked_two_hours_before_departure():
    (row,) = rows().iter_rows(named=True)
    assert row["event_timestamp"] == datetime(2013, 9, 1, 12, 15, tzinfo=UTC)
    assert row["label"] == 1


def test_the_leak_ceiling_blocks_and_the_splits_are_the_agreed_ones():
    (ceiling,) = [g for g in flight_disruption.gates if g.maximum is not None and g.metric == "auc"]
    assert (ceiling.maximum, ceiling.blocking, ceiling.beyond_doubt) == (0.79, True, True)
    assert (DEMO_SPLIT.validate_start, DEMO_SPLIT.test_start, DEMO_SPLIT.end) == (date(2013, 7, 1), date(2013, 8, 1), date(2013, 9, 1))
    assert (YEAR_SPLIT.validate_start, YEAR_SPLIT.test_start, YEAR_SPLIT.end) == (date(2013, 9, 1), date(2013, 11, 1), date(2014, 1, 1))
    assert flight_disruption in MODELS
