"""The labelled rows of the flight models: one per scheduled flight, asked two hours before its scheduled departure.

Belongs here: the question's time, its request fields, its label and when that became known. Does not belong here:
features (they are joined as of the question's time), the models' declarations.
"""

from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import polars as pl

ASKED_BEFORE = timedelta(minutes=120)
LATE_MIN = 15
LOAD_WITHIN = timedelta(minutes=30)
REGION = "nyc"

REQUEST_COLUMNS = (
    "carrier",
    "flight",
    "origin",
    "dest",
    "scheduled_departure",
    "scheduled_arrival",
    "distance_miles",
    "scheduled_load",
    "region",
)


def disruption_rows(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row per row of `tables["schedules"]`, sorted by T and flight; `tables["arrivals"]` may lack outcomes not known yet.

    Columns: `flight_id`, `event_timestamp` (T = scheduled departure - 120 min), the request fields, `label` (Int8: 1 where
    the flight arrived 15 minutes late or more, was cancelled or diverted; null while unknown) and `label_known_at` (null
    likewise). The load counts the schedule rows given, so give those of the days before and after too. Raises
    polars.exceptions.ComputeError where a flight has two outcomes.
    """
    late = ((pl.col("status") != "arrived") | (pl.col("arrival_delay_min") >= LATE_MIN)).cast(pl.Int8)
    return _rows(tables, tables["arrivals"].select("flight_id", late.alias("label"), pl.col("known_at").alias("label_known_at")))


def delay_rows(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The same rows with the arrival delay as `label` (Float64, minutes, negative: early). A flight that never arrived has none: its
    label stays null, and a prediction for it ends as one whose outcome is missing."""
    arrived = tables["arrivals"].filter(pl.col("status") == "arrived")
    delay = pl.col("arrival_delay_min").cast(pl.Float64)
    return _rows(tables, arrived.select("flight_id", delay.alias("label"), pl.col("known_at").alias("label_known_at")))


def _rows(tables: Mapping[str, pl.DataFrame], outcomes: pl.DataFrame) -> pl.DataFrame:
    asked = with_scheduled_load(tables["schedules"]).with_columns(
        (pl.col("scheduled_departure") - ASKED_BEFORE).alias("event_timestamp"), pl.lit(REGION).alias("region")
    )
    rows = asked.join(outcomes, on="flight_id", how="left", validate="m:1")
    return rows.select("flight_id", "event_timestamp", *REQUEST_COLUMNS, "label", "label_known_at").sort("event_timestamp", "flight_id")


def with_scheduled_load(schedules: pl.DataFrame) -> pl.DataFrame:
    """Adds `scheduled_load` (Int64): flights scheduled from the same origin within 30 min before or after, itself included."""
    by_origin = [_with_load_of_one(part) for part in schedules.partition_by("origin", maintain_order=True)]
    return pl.concat(by_origin) if by_origin else schedules.with_columns(pl.lit(None, pl.Int64).alias("scheduled_load"))


def _with_load_of_one(flights: pl.DataFrame) -> pl.DataFrame:
    due = flights["scheduled_departure"].to_physical().to_numpy()
    ordered = np.sort(due)
    within = LOAD_WITHIN // timedelta(microseconds=1)
    load = np.searchsorted(ordered, due + within, side="right") - np.searchsorted(ordered, due - within, side="left")
    return flights.with_columns(pl.Series("scheduled_load", load, pl.Int64))
