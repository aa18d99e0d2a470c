"""Which features a model takes. Belongs here: Feast feature services; their name and version are the model's contract."""

from feast import FeatureService

from feature_definitions.flights.on_demand import flight_request_features
from feature_definitions.flights.views import (
    carrier_record,
    destination_record,
    flight_record,
    nyc_state,
    origin_carrier_record,
    origin_congestion,
    origin_weather,
    route_carrier_record,
)

flight_disruption_v1 = FeatureService(
    name="flight_disruption_v1",
    features=[
        origin_weather,
        origin_congestion,
        nyc_state,
        carrier_record,
        origin_carrier_record,
        destination_record,
        route_carrier_record,
        flight_record,
        flight_request_features,
    ],
    description="Everything known two hours before a scheduled departure",
    owner="flights@example.com",
    tags={"domain": "flights", "model": "flight_disruption"},
)
