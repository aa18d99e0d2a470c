"""The stored features of the flight models. Belongs here: Feast feature views, in the order entity → schema → windows.

Does not belong here: how the rows come about (`recipes`), running the windows (`mlplatform.features`).
A row is written each cadence while the entity is alive, so a value's age tells how fresh the pipeline is, and a ttl of a
few cadences tells a stopped pipeline from a quiet entity.
"""

import warnings
from datetime import timedelta

from feast import Entity, FeatureView, StreamFeatureView
from feast.aggregation import Aggregation
from feast.field import Field
from feast.types import Float64, Int64, String

from feature_definitions.flights.entities import carrier, destination, flight_number, origin, region
from feature_definitions.flights.sources import offline_table, pushed

OWNER = "flights@example.com"

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)


def _feature(name: str, description: str, unit: str = "") -> Field:
    return Field(name=name, dtype=Float64, description=description, tags={"unit": unit} if unit else {})


def _span(window: timedelta) -> str:
    return f"{window // _DAY}d" if window >= 2 * _DAY else f"{window // _HOUR}h"


class _Windows:
    """Collects a windowed view's aggregations with the schema field each of them fills."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.aggregations: list[Aggregation] = []
        self.fields: list[Field] = []

    def add(self, name: str, function: str, column: str, windows: tuple[timedelta, ...], description: str, unit: str = "") -> "_Windows":
        for window in windows:
            full = f"{self.prefix}_{name}_{_span(window)}"
            self.aggregations.append(Aggregation(column=column, function=function, time_window=window, name=full))
            self.fields.append(_feature(full, f"{description} in the last {_span(window)}", unit))
        return self

    def overdue(self) -> "_Windows":
        """The state "due in the last 3 h and not gone": two running sums, and what the recipe derives from them."""
        self.aggregations += [
            Aggregation(column="overdue", function="sum", name=f"{self.prefix}_overdue_n"),
            Aggregation(column="overdue_since_s", function="sum", name=f"{self.prefix}_overdue_since_s"),
            Aggregation(column="scheduled", function="sum", time_window=3 * _HOUR, name=f"{self.prefix}_scheduled_3h"),
        ]
        self.fields += [
            _feature(f"{self.prefix}_overdue_n", "Flights scheduled in the last 3 h that have not left"),
            _feature(f"{self.prefix}_overdue_minutes", "Minutes that these flights are overdue, in all", "min"),
            _feature(f"{self.prefix}_overdue_fraction", "Their share of the flights scheduled in the last 3 h"),
            _feature(f"{self.prefix}_scheduled_3h", "Flights scheduled in the last 3 h"),
        ]
        return self


def _stream_view(
    name: str, entities: list[Entity], keys: list[Field], windows: _Windows, hop: timedelta, ttl: timedelta, description: str
) -> StreamFeatureView:
    with warnings.catch_warnings():
        # Feast calls every stream feature view experimental; only its declaration is used, the engine is ours.
        warnings.filterwarnings("ignore", message="Stream feature views are experimental", category=RuntimeWarning)
        return StreamFeatureView(
            name=name,
            entities=entities,
            schema=[*keys, *windows.fields],
            aggregations=windows.aggregations,
            source=pushed(name),
            timestamp_field="event_timestamp",
            enable_tiling=True,
            tiling_hop_size=hop,
            ttl=ttl,
            description=description,
            owner=OWNER,
            tags={"domain": "flights", "kind": "windowed"},
        )


_ORIGIN = Field(name="origin", dtype=String, description="New York airport of departure")
_DEST = Field(name="dest", dtype=String, description="Airport of arrival")
_CARRIER = Field(name="carrier", dtype=String, description="Airline")
_FLIGHT = Field(name="flight", dtype=Int64, description="Flight number")
_REGION = Field(name="region", dtype=String, description="The constant 'nyc'")

origin_weather = FeatureView(
    name="origin_weather",
    entities=[origin],
    schema=[
        _ORIGIN,
        _feature("temp", "Air temperature", "degF"),
        _feature("dewp", "Dew point", "degF"),
        _feature("humid", "Relative humidity", "%"),
        _feature("wind_dir", "Direction the wind comes from", "deg"),
        _feature("wind_speed", "Wind speed", "mph"),
        _feature("wind_gust", "Gust speed, 0 where there is none", "mph"),
        _feature("precip", "Rain or melted snow in the hour", "in"),
        _feature("pressure", "Pressure at sea level", "hPa"),
        _feature("visib", "Visibility", "mi"),
        _feature("precip_6h", "Rain or melted snow in the last 6 h", "in"),
        _feature("pressure_change_3h", "Change of pressure over the last 3 h", "hPa"),
    ],
    source=offline_table("origin_weather"),
    ttl=6 * _HOUR,
    description="The newest hourly weather observation at the origin; known 60 minutes after its hour",
    owner=OWNER,
    tags={"domain": "flights", "kind": "computed"},
)

origin_congestion = _stream_view(
    "origin_congestion",
    [origin],
    [_ORIGIN],
    _Windows("origin")
    .add("departures", "count", "departure_delay_min", (_HOUR, 3 * _HOUR), "Departures")
    .add("departure_delay", "mean", "departure_delay_min", (_HOUR, 3 * _HOUR), "Mean departure delay", "min")
    .add("disrupted", "mean", "disrupted", (3 * _HOUR, 24 * _HOUR), "Share of disrupted outcomes learnt")
    .add("arrival_delay", "mean", "arrival_delay_min", (3 * _HOUR, 24 * _HOUR), "Mean arrival delay learnt", "min")
    .overdue(),
    hop=timedelta(minutes=30),
    ttl=2 * _HOUR,
    description="How the origin airport is doing now: departures, outcomes, flights overdue",
)

nyc_state = _stream_view(
    "nyc_state",
    [region],
    [_REGION],
    _Windows("nyc")
    .add("departures", "count", "departure_delay_min", (_HOUR,), "Departures")
    .add("departure_delay", "mean", "departure_delay_min", (_HOUR,), "Mean departure delay", "min")
    .add("disrupted", "mean", "disrupted", (3 * _HOUR,), "Share of disrupted outcomes learnt")
    .add("arrival_delay", "mean", "arrival_delay_min", (3 * _HOUR,), "Mean arrival delay learnt", "min")
    .overdue(),
    hop=timedelta(minutes=30),
    ttl=2 * _HOUR,
    description="How all New York airports together are doing now",
)

carrier_record = _stream_view(
    "carrier_record",
    [carrier],
    [_CARRIER],
    _Windows("carrier")
    .add("departure_delay", "mean", "departure_delay_min", (3 * _HOUR, 24 * _HOUR), "Mean departure delay", "min")
    .add("disrupted", "mean", "disrupted", (3 * _HOUR, 24 * _HOUR, 7 * _DAY, 30 * _DAY), "Share of disrupted outcomes learnt")
    .add("arrival_delay", "mean", "arrival_delay_min", (3 * _HOUR, 7 * _DAY), "Mean arrival delay learnt", "min"),
    hop=_HOUR,
    ttl=6 * _HOUR,
    description="How the carrier's flights out of New York have fared",
)

origin_carrier_record = _stream_view(
    "origin_carrier_record",
    [origin, carrier],
    [_ORIGIN, _CARRIER],
    _Windows("origin_carrier")
    .add("departure_delay", "mean", "departure_delay_min", (3 * _HOUR, 24 * _HOUR), "Mean departure delay", "min")
    .add("disrupted", "mean", "disrupted", (3 * _HOUR, 24 * _HOUR, 7 * _DAY, 30 * _DAY), "Share of disrupted outcomes learnt")
    .overdue(),
    hop=_HOUR,
    ttl=6 * _HOUR,
    description="How the carrier's flights from this origin have fared",
)

destination_record = _stream_view(
    "destination_record",
    [destination],
    [_DEST],
    _Windows("dest")
    .add("departure_delay", "mean", "departure_delay_min", (3 * _HOUR, 24 * _HOUR), "Mean departure delay of flights to it", "min")
    .add(
        "disrupted",
        "mean",
        "disrupted",
        (3 * _HOUR, 24 * _HOUR, 7 * _DAY, 30 * _DAY),
        "Share of disrupted outcomes learnt of flights to it",
    )
    .add("arrival_delay", "mean", "arrival_delay_min", (3 * _HOUR, 7 * _DAY), "Mean arrival delay learnt", "min"),
    hop=_HOUR,
    ttl=6 * _HOUR,
    description="How flights from New York to this destination have fared",
)

route_carrier_record = _stream_view(
    "route_carrier_record",
    [origin, destination, carrier],
    [_ORIGIN, _DEST, _CARRIER],
    _Windows("route_carrier")
    .add("outcomes", "count", "disrupted", (30 * _DAY,), "Outcomes learnt")
    .add("disrupted", "mean", "disrupted", (24 * _HOUR, 7 * _DAY, 30 * _DAY), "Share of disrupted outcomes learnt")
    .add("departure_delay", "mean", "departure_delay_min", (24 * _HOUR, 7 * _DAY), "Mean departure delay", "min")
    .add("arrival_delay", "mean", "arrival_delay_min", (7 * _DAY, 30 * _DAY), "Mean arrival delay learnt", "min"),
    hop=6 * _HOUR,
    ttl=18 * _HOUR,
    description="How the carrier's flights on this route have fared",
)

flight_record = _stream_view(
    "flight_record",
    [carrier, flight_number],
    [_CARRIER, _FLIGHT],
    _Windows("flight")
    .add("outcomes", "count", "disrupted", (30 * _DAY,), "Outcomes learnt")
    .add("disrupted", "mean", "disrupted", (7 * _DAY, 30 * _DAY), "Share of disrupted outcomes learnt")
    .add("arrival_delay", "mean", "arrival_delay_min", (7 * _DAY, 30 * _DAY), "Mean arrival delay learnt", "min"),
    hop=24 * _HOUR,
    ttl=3 * _DAY,
    description="How this flight number has fared",
)
