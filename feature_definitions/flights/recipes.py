"""How the rows of the flight views come about: pure Polars functions over validated tables.

Belongs here: the events that the windowed views' declared aggregations run over, the computed weather view, and the
features derived from aggregates. Does not belong here: Feast objects (`views`), windows and their functions (declared
there), request-time features (`request_time`).

Every event stands at the time it became *known*: a departure when the aircraft left, an outcome when it arrived (a day
after the scheduled arrival for the cancelled and diverted, by policy of the source), an overdue flight from its scheduled time.
"""

from collections.abc import Callable
from datetime import timedelta

import polars as pl

from mlplatform.specs import FeatureRecipe, Tables

LATE_MIN = 15  # a flight this many minutes late on arrival counts as disrupted
OVERDUE_FOR = timedelta(hours=3)  # after that a flight that has not left is taken for cancelled
DELAY_RANGE_MIN = (-60.0, 300.0)  # one flight a day late must not move an hour's mean

_TIME = "event_timestamp"


def departure_events(tables: Tables) -> pl.DataFrame:
    """One event per departure, when it left: `departure_delay_min`."""
    return tables["departures"].select(
        "flight_id",
        "origin",
        "dest",
        "carrier",
        "flight",
        pl.col("departed_at").alias(_TIME),
        pl.col("departure_delay_min").clip(*DELAY_RANGE_MIN).alias("departure_delay_min"),
    )


def outcome_events(tables: Tables) -> pl.DataFrame:
    """One event per outcome, when it became known: `disrupted`, `cancelled` (0/1), `arrival_delay_min` (null unless arrived)."""
    arrived = pl.col("status") == "arrived"
    return tables["arrivals"].select(
        "flight_id",
        "origin",
        "dest",
        "carrier",
        "flight",
        pl.col("known_at").alias(_TIME),
        (~arrived | (pl.col("arrival_delay_min") >= LATE_MIN)).cast(pl.Float64).alias("disrupted"),
        (pl.col("status") == "cancelled").cast(pl.Float64).alias("cancelled"),
        pl.when(arrived).then(pl.col("arrival_delay_min").clip(*DELAY_RANGE_MIN)).alias("arrival_delay_min"),
    )


def overdue_events(tables: Tables) -> pl.DataFrame:
    """Signed events whose running sum over the past is the state "scheduled in the last 3 h and not gone".

    At its scheduled time a flight adds +1 to `overdue` and its scheduled second (since 1970) to `overdue_since_s`; when it
    leaves, or is 3 h old, it takes both away. `scheduled` is 1 once per flight, at its scheduled time. A flight's events
    all come from its schedule row, so what lies before the lookback nets to zero, and whole seconds keep the sums exact.
    """
    due = tables["schedules"].select(
        "flight_id", "origin", "dest", "carrier", "scheduled_departure", _known=pl.max_horizontal("scheduled_departure", "published_at")
    )
    gone = tables["departures"].select("flight_id", "departed_at")
    flights = due.join(gone, on="flight_id", how="left", validate="1:1").with_columns(
        # min_horizontal skips nulls: a flight that has not left yet ends after three hours.
        _end=pl.min_horizontal("departed_at", pl.col("scheduled_departure") + OVERDUE_FOR),
        _second=pl.col("scheduled_departure").dt.epoch("s").cast(pl.Float64),
    )
    keys = ("origin", "dest", "carrier")
    waited = flights.filter(pl.col("_end") > pl.col("_known"))
    return pl.concat(
        [
            flights.select(*keys, pl.col("_known").alias(_TIME), scheduled=pl.lit(1.0)),
            waited.select(*keys, pl.col("_known").alias(_TIME), overdue=pl.lit(1.0), overdue_since_s=pl.col("_second")),
            waited.select(*keys, pl.col("_end").alias(_TIME), overdue=pl.lit(-1.0), overdue_since_s=-pl.col("_second")),
        ],
        how="diagonal",
    )


def traffic_events(tables: Tables) -> pl.DataFrame:
    """Departures, outcomes and overdue flights in one frame, for the views of the present state."""
    return pl.concat([departure_events(tables), outcome_events(tables), overdue_events(tables)], how="diagonal")


def record_events(tables: Tables) -> pl.DataFrame:
    """Departures and outcomes in one frame, for the views of how an entity has fared."""
    return pl.concat([departure_events(tables), outcome_events(tables)], how="diagonal")


def region_events(tables: Tables) -> pl.DataFrame:
    """All traffic under the one region."""
    return traffic_events(tables).with_columns(region=pl.lit("nyc"))


def overdue_features(prefix: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """From the running sums: minutes overdue in all, and the share of the flights due in the last 3 h that have not gone."""

    def finish(frame: pl.DataFrame) -> pl.DataFrame:
        n, now_s = pl.col(f"{prefix}_overdue_n"), pl.col(_TIME).dt.epoch("s").cast(pl.Float64)
        scheduled = pl.col(f"{prefix}_scheduled_3h")
        return frame.with_columns(
            ((n * now_s - pl.col(f"{prefix}_overdue_since_s")) / 60).alias(f"{prefix}_overdue_minutes"),
            pl.when(scheduled > 0).then(n / scheduled).alias(f"{prefix}_overdue_fraction"),
        )

    return finish


WEATHER_KNOWN_AFTER = timedelta(minutes=60)
_OBSERVED = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")


def weather_at(tables: Tables, ticks: pl.Series) -> pl.DataFrame:
    """The observation that became known at each tick, the rain of the last 6 h and the change of pressure over 3 h."""
    observed = (
        tables["weather"]
        .select("origin", (pl.col("time_hour") + WEATHER_KNOWN_AFTER).alias(_TIME), *_OBSERVED)
        .unique(subset=["origin", _TIME], keep="first", maintain_order=True)
        .sort("origin", _TIME)
    )
    # Each sum by itself: Polars' rolling sum subtracts what leaves the window, and its last bits depend on where it began.
    rain = observed.rolling(_TIME, period="6h", closed="right", group_by="origin").agg(pl.col("precip"))
    rain = rain.with_columns(pl.col("precip").list.sum().alias("precip_6h")).drop("precip")
    before = observed.select("origin", (pl.col(_TIME) + timedelta(hours=3)).alias(_TIME), _before=pl.col("pressure"))
    return (
        observed.join(rain, on=["origin", _TIME], how="left")
        .join(before, on=["origin", _TIME], how="left")
        .filter(pl.col(_TIME).is_in(ticks.implode()))
        .with_columns(pressure_change_3h=pl.col("pressure") - pl.col("_before"))
        # In this source a missing gust means that there was none.
        .with_columns(pl.col("wind_gust").fill_null(0.0).alias("wind_gust"))
    )


_HOURS = timedelta(hours=1)
_DAYS = timedelta(days=1)

# Schedules are published up to 30 h before they are due; a departure can precede its scheduled time.
_SCHEDULE_LOOKBACK = 54 * _HOURS

# Each event comes from rows of one flight.
_BY = "flight_id"

# From a row's `created` until it can be read online: the streaming worker takes a second or two, and where it is away two runs of
# the batch assets take a minute or two. What is served later than that is lost, and the skew proof says so.
_ON_ITS_WAY = timedelta(minutes=5)

RECIPES: tuple[FeatureRecipe, ...] = (
    FeatureRecipe(view="origin_weather", inputs={"weather": 7 * _HOURS}, cadence=timedelta(minutes=60), compute=weather_at),
    FeatureRecipe(
        view="origin_congestion",
        inputs={"schedules": _SCHEDULE_LOOKBACK, "departures": 30 * _HOURS, "arrivals": 24 * _HOURS},
        cadence=timedelta(minutes=30),
        events=traffic_events,
        finish=overdue_features("origin"),
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="nyc_state",
        inputs={"schedules": _SCHEDULE_LOOKBACK, "departures": 30 * _HOURS, "arrivals": 24 * _HOURS},
        cadence=timedelta(minutes=30),
        events=region_events,
        finish=overdue_features("nyc"),
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="carrier_record",
        inputs={"departures": 30 * _DAYS, "arrivals": 30 * _DAYS},
        cadence=_HOURS,
        events=record_events,
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="origin_carrier_record",
        inputs={"schedules": _SCHEDULE_LOOKBACK, "departures": 30 * _DAYS, "arrivals": 30 * _DAYS},
        cadence=_HOURS,
        events=traffic_events,
        finish=overdue_features("origin_carrier"),
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="destination_record",
        inputs={"departures": 30 * _DAYS, "arrivals": 30 * _DAYS},
        cadence=_HOURS,
        events=record_events,
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="route_carrier_record",
        inputs={"departures": 30 * _DAYS, "arrivals": 30 * _DAYS},
        cadence=6 * _HOURS,
        events=record_events,
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
    FeatureRecipe(
        view="flight_record",
        inputs={"arrivals": 30 * _DAYS},
        cadence=24 * _HOURS,
        events=outcome_events,
        independent_by=_BY,
        propagation=_ON_ITS_WAY,
    ),
)
