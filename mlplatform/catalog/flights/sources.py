"""Every source of the flights use case: where it is read from, what its columns mean, and what its rows must keep to.

Belongs here: declarations, and the row rules' expressions. Does not belong here: models (`models`), features
(`feature_definitions.flights`), or anything that reads or writes.

The rules were written against the year 2013 out of New York; the counts they give on it are in
`mlplatform_tests/catalog/test_flights_sources.py`.
"""

from datetime import timedelta

import polars as pl

from mlplatform.specs import (
    Column,
    Contract,
    Coverage,
    DType,
    FileReader,
    HttpReader,
    Reference,
    RowRule,
    SourceSpec,
    SqlReader,
    StreamReader,
)

REFERENCE_OWNER = "team:reference-data"
WEATHER_OWNER = "team:weather"
OPERATIONS_OWNER = "team:flight-operations"

# Faster than any airliner flies over a whole flight (strong tailwinds included).
IMPOSSIBLE_AIR_SPEED_MPH = 600
# Distance over the scheduled time from gate to gate. The fastest real schedule, to Honolulu, makes 475.
IMPOSSIBLE_BLOCK_SPEED_MPH = 480
# The longest a schedule may take: 2 h 50 min more than the distance needs at 545 mph.
SLOWEST_CRUISE_MPH, LONGEST_ON_TOP_MIN = 545, 170
# From one hour to the next and back. The steepest real change of 2013 is 6 °F.
IMPOSSIBLE_TEMPERATURE_SPIKE_F = 20
NEW_YORK_AIRPORTS = ("EWR", "JFK", "LGA")

AIRPORT_CODE = r"^[0-9A-Z]{3}$"
CARRIER_CODE = r"^[0-9A-Z]{2}$"
TAILNUM = r"^[A-Z][0-9A-Z]{2,6}$"


def text(name: str, description: str, pattern: str | None = None, nullable: bool = False, **more: object) -> Column:
    return _column(name, "string", description, pattern=pattern, nullable=nullable, **more)


def moment(name: str, description: str) -> Column:
    return _column(name, "timestamp", description, unit="UTC")


def number(
    name: str, description: str, unit: str, minimum: float, maximum: float, dtype: DType = "float", nullable: bool = False, **more: object
) -> Column:
    return _column(name, dtype, description, unit=unit, minimum=minimum, maximum=maximum, nullable=nullable, **more)


def _column(name: str, dtype: DType, description: str, **more: object) -> Column:
    return Column.model_validate({"name": name, "dtype": dtype, "description": description, **more})


# --- reference data: a SQL database ------------------------------------------------------------------------------

airlines = SourceSpec(
    name="airlines",
    description="Names of the carriers",
    owner=REFERENCE_OWNER,
    reader=SqlReader(connection="reference", table="airlines"),
    contract=Contract(
        columns=(text("carrier", "Two-character IATA code of the carrier", CARRIER_CODE), text("name", "Full name of the carrier")),
        key=("carrier",),
        max_quarantine_share=0,
    ),
)

airports = SourceSpec(
    name="airports",
    description="Airports of the United States with their position and time zone; the Caribbean ones are missing",
    owner=REFERENCE_OWNER,
    reader=SqlReader(connection="reference", table="airports"),
    contract=Contract(
        columns=(
            text("faa", "FAA code of the airport", AIRPORT_CODE),
            text("name", "Usual name of the airport"),
            number("lat", "Latitude", "degrees", -90, 90),
            number("lon", "Longitude", "degrees", -180, 180),
            number("alt", "Altitude", "feet", -1500, 20_000, dtype="int"),
            number("tz", "Offset from UTC in winter", "hours", -12, 14, dtype="int"),
            text("dst", "Daylight saving: A as in the United States, N none, U unknown", allowed=("A", "N", "U")),
            text("tzone", "IANA time zone; three small fields have none", nullable=True, max_null_share=0.01),
        ),
        key=("faa",),
    ),
)

planes = SourceSpec(
    name="planes",
    description="The FAA's aircraft registry for the tail numbers that flew out of New York, as it stood after the year",
    owner=REFERENCE_OWNER,
    reader=SqlReader(connection="reference", table="planes"),
    contract=Contract(
        columns=(
            text("tailnum", "Tail number (registration) of the aircraft", TAILNUM),
            number("year", "Year of manufacture", "year", 1920, 2050, dtype="int", nullable=True, max_null_share=0.05),
            text("type", "Type of aircraft"),
            text("manufacturer", "Manufacturer"),
            text("model", "Model"),
            number("engines", "Number of engines", "engines", 1, 8, dtype="int"),
            number("seats", "Number of seats", "seats", 1, 900, dtype="int"),
            number("speed", "Average cruising speed; known for few", "mph", 30, 1500, dtype="int", nullable=True),
            text("engine", "Type of engine"),
        ),
        key=("tailnum",),
        rules=(
            RowRule(
                name="light_aircraft",
                description="Fewer than 20 seats, yet it flew scheduled passengers: the registration was most likely reused since",
                broken=lambda: pl.col("seats") < 20,
                on_broken="warn",
            ),
            RowRule(
                name="jetblue_light_aircraft",
                description="A JetBlue tail number (…JB) recorded with 2 to 5 seats; JetBlue flies no aircraft below 100",
                broken=lambda: pl.col("tailnum").str.ends_with("JB") & (pl.col("seats") <= 5),
                on_broken="warn",
            ),
        ),
    ),
)

# --- weather: a paged HTTP API ------------------------------------------------------------------------------------


def _temperature_spike() -> pl.Expr:
    """Far off both the hour before and the hour after, to the same side. At the rim of what was read nothing is judged."""
    before, after = (pl.col("temp") - pl.col("temp").shift(n).over("origin", order_by="time_hour") for n in (1, -1))
    return ((before > IMPOSSIBLE_TEMPERATURE_SPIKE_F) & (after > IMPOSSIBLE_TEMPERATURE_SPIKE_F)) | (
        (before < -IMPOSSIBLE_TEMPERATURE_SPIKE_F) & (after < -IMPOSSIBLE_TEMPERATURE_SPIKE_F)
    )


weather = SourceSpec(
    name="weather",
    description="Hourly weather observations at the three New York airports; each is known 60 minutes after its hour",
    owner=WEATHER_OWNER,
    reader=HttpReader(connection="weather", path="/weather"),
    time_column="time_hour",
    contract=Contract(
        columns=(
            text("origin", "Airport of the weather station", AIRPORT_CODE),
            moment("time_hour", "Start of the observed hour"),
            number("temp", "Temperature", "°F", -80, 130, nullable=True, max_null_share=0.5),
            number("dewp", "Dew point", "°F", -100, 100, nullable=True, max_null_share=0.5),
            number("humid", "Relative humidity", "%", 0, 100, nullable=True, max_null_share=0.5),
            number("wind_dir", "Direction the wind comes from; null when it varies", "degrees", 0, 360, nullable=True),
            number("wind_speed", "Wind speed", "mph", 0, 150, nullable=True, max_null_share=0.5),
            number("wind_gust", "Speed of gusts; null when there were none", "mph", 0, 250, nullable=True),
            number("precip", "Precipitation in the hour", "inches", 0, 20, nullable=True, max_null_share=0.5),
            number("pressure", "Sea level pressure; often missing in bad weather", "millibars", 850, 1100, nullable=True),
            number("visib", "Visibility", "miles", 0, 100, nullable=True, max_null_share=0.5),
        ),
        key=("origin", "time_hour"),
        rules=(
            RowRule(
                name="temperature_spike",
                description=f"More than {IMPOSSIBLE_TEMPERATURE_SPIKE_F} °F away from both the hour before and the hour after",
                broken=_temperature_spike,
            ),
        ),
        coverage=(
            Coverage(
                source="schedules",
                columns=("origin",),
                at="scheduled_departure",
                every=timedelta(hours=1),
                values=("temp",),
                # A flight is published at 00:00 UTC of its local date; the last ones of it leave at 05:00 UTC of the next.
                lookback=timedelta(hours=30),
            ),
        ),
        # The age at which the feature expires: past it, predictions run without weather.
        max_age=timedelta(hours=6),
        # A day has 72 rows.
        max_quarantine_share=0.05,
    ),
)

# --- flights: event streams ----------------------------------------------------------------------------------------


def _events(source: str) -> StreamReader:
    archive = FileReader(connection="archive", path=f"{source}/{{date}}.parquet")
    return StreamReader(connection="events", stream=f"flights.{source}", archive=archive)


def _block_min() -> pl.Expr:
    return (pl.col("scheduled_arrival") - pl.col("scheduled_departure")).dt.total_seconds() / 60


def _impossible_block() -> pl.Expr:
    shortest = pl.col("distance_miles") / IMPOSSIBLE_BLOCK_SPEED_MPH * 60
    longest = pl.col("distance_miles") / SLOWEST_CRUISE_MPH * 60 + LONGEST_ON_TOP_MIN
    return (_block_min() < shortest) | (_block_min() > longest)


IMPOSSIBLE_BLOCK = RowRule(
    name="impossible_block_time",
    description=(
        f"Scheduled from gate to gate faster than {IMPOSSIBLE_BLOCK_SPEED_MPH} mph, or {LONGEST_ON_TOP_MIN} minutes longer than cruising "
        "takes: a clock time read with the wrong UTC offset, as on the nights the clocks change"
    ),
    broken=_impossible_block,
)


def _flight_columns(event_id: str) -> tuple[Column, ...]:
    return (
        text("event_id", event_id),
        text("flight_id", "Carrier, flight number and scheduled local time: identifies the flight in all three streams"),
        text("carrier", "Two-character IATA code of the carrier", CARRIER_CODE),
        number("flight", "Flight number", "number", 1, 9999, dtype="int"),
        text("origin", "FAA code of the airport it leaves from", AIRPORT_CODE),
        text("dest", "FAA code of the airport it goes to", AIRPORT_CODE),
        moment("scheduled_departure", "Scheduled departure from the gate"),
    )


_SCHEDULED_ARRIVAL = moment("scheduled_arrival", "Scheduled arrival at the gate")
_DISTANCE = number("distance_miles", "Distance between the two airports", "miles", 1, 12_000)

schedules = SourceSpec(
    name="schedules",
    description="The day's flights as published at 00:00 UTC of the flight's date",
    owner=OPERATIONS_OWNER,
    reader=_events("schedules"),
    time_column="published_at",
    contract=Contract(
        columns=(
            *_flight_columns("Identifies the publication"),
            Column(name="flight_date", dtype="date", description="Local date of the scheduled departure"),
            moment("published_at", "When the schedule became known"),
            text("tailnum", "Tail number of the aircraft; null only for cancelled flights, so never a feature", TAILNUM, nullable=True),
            _SCHEDULED_ARRIVAL,
            _DISTANCE,
        ),
        key=("flight_id",),
        references=(
            Reference(columns=("carrier",), source="airlines", to=("carrier",)),
            Reference(columns=("dest",), source="airports", to=("faa",)),
            Reference(columns=("tailnum",), source="planes", to=("tailnum",), null_is_missing=True),
        ),
        rules=(
            IMPOSSIBLE_BLOCK,
            RowRule(
                name="between_new_york_airports",
                description="From one New York airport to another: no airline sells that, a ferry flight slipped in",
                broken=lambda: pl.col("origin").is_in(NEW_YORK_AIRPORTS) & pl.col("dest").is_in(NEW_YORK_AIRPORTS),
            ),
            RowRule(
                name="tailnum_missing",
                description=(
                    "No tail number. It is missing only where no aircraft ever flew, in cancelled flights, and was filled in afterwards "
                    "for the others: 'tail number is null' tells the label and must not become a feature"
                ),
                broken=lambda: pl.col("tailnum").is_null(),
                on_broken="warn",
            ),
        ),
        # Published once a day at 00:00 UTC: at the end of the day the newest row is a day old.
        max_age=timedelta(hours=25),
    ),
)

departures = SourceSpec(
    name="departures",
    description="Each flight's departure from the gate, as it happened; cancelled flights have none",
    owner=OPERATIONS_OWNER,
    reader=_events("departures"),
    time_column="departed_at",
    contract=Contract(
        columns=(
            *_flight_columns("Identifies the report of the departure"),
            moment("departed_at", "Actual departure from the gate"),
            number("departure_delay_min", "Departure delay; negative when early", "minutes", -240, 4320),
        ),
        key=("flight_id",),
        rules=(
            RowRule(
                name="departure_delay_disagrees",
                description="The delay is more than a minute off the two times it is the difference of",
                broken=lambda: (
                    ((pl.col("departed_at") - pl.col("scheduled_departure")).dt.total_seconds() / 60 - pl.col("departure_delay_min")).abs()
                    > 1
                ),
            ),
        ),
        max_age=timedelta(hours=20),
    ),
)

arrivals = SourceSpec(
    name="arrivals",
    description="Each flight's outcome: arrival, or cancellation or diversion, which count as known 24 h after the scheduled arrival",
    owner=OPERATIONS_OWNER,
    reader=_events("arrivals"),
    time_column="known_at",
    contract=Contract(
        columns=(
            *_flight_columns("Identifies the report of the outcome"),
            _SCHEDULED_ARRIVAL,
            moment("known_at", "When the outcome became known: the actual arrival, or 24 h after the scheduled one"),
            text("status", "What became of the flight", allowed=("arrived", "cancelled", "diverted")),
            number("arrival_delay_min", "Arrival delay; negative when early, null unless arrived", "minutes", -240, 4320, nullable=True),
            number("air_time_min", "Time in the air; null unless arrived", "minutes", 5, 1440, nullable=True),
            _DISTANCE,
        ),
        key=("flight_id",),
        rules=(
            IMPOSSIBLE_BLOCK,
            RowRule(
                name="outcome_disagrees",
                description="Arrived without an arrival delay, or an arrival delay although it did not arrive",
                broken=lambda: (pl.col("status") == "arrived") == pl.col("arrival_delay_min").is_null(),
            ),
            RowRule(
                name="known_before_departure",
                description="The outcome is known more than four hours before the flight was due to leave: it would leak",
                broken=lambda: pl.col("known_at") < pl.col("scheduled_departure") - pl.duration(hours=4),
            ),
            RowRule(
                name="impossible_air_speed",
                description=f"Faster than {IMPOSSIBLE_AIR_SPEED_MPH} mph in the air: the air time is wrong, the delay at the gate is not",
                broken=lambda: pl.col("distance_miles") > IMPOSSIBLE_AIR_SPEED_MPH * pl.col("air_time_min") / 60,
                on_broken="warn",
            ),
        ),
        max_age=timedelta(hours=20),
    ),
)

SOURCES: tuple[SourceSpec, ...] = (airlines, airports, planes, weather, schedules, departures, arrivals)
