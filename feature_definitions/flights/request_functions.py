"""The request-time features a model version records in its contract: which function, from which fields, gives what.

Belongs here: declarations. Does not belong here: the functions themselves (`request_time`, which the service imports).
"""

from collections.abc import Mapping

from feature_definitions.flights.request_time import calendar, trip
from mlplatform.specs import RequestFunction

DESCRIPTIONS: Mapping[str, str] = {
    "departure_minute_of_day": "Scheduled departure on New York's clock, in minutes after midnight",
    "departure_weekday": "Weekday of the scheduled departure in New York, Monday = 0",
    "days_to_holiday": "Days to the nearest US federal holiday, before or after, at most 7",
    "trip_distance_miles": "Great-circle distance in miles",
    "scheduled_block_min": "Scheduled time from departure to arrival, in minutes",
    "origin_scheduled_load": "Flights scheduled from the origin within 30 minutes before or after, itself included",
}

REQUEST_FUNCTIONS: tuple[RequestFunction, ...] = (
    RequestFunction(
        name="calendar",
        function=calendar,
        inputs=("scheduled_departure",),
        outputs=("departure_minute_of_day", "departure_weekday", "days_to_holiday"),
    ),
    RequestFunction(
        name="trip",
        function=trip,
        inputs=("scheduled_departure", "scheduled_arrival", "distance_miles", "scheduled_load"),
        outputs=("trip_distance_miles", "scheduled_block_min", "origin_scheduled_load"),
    ),
)
