"""What the flight features are about. Belongs here: Feast entities only."""

from feast import Entity, ValueType

origin = Entity(
    name="origin", join_keys=["origin"], value_type=ValueType.STRING, description="New York airport of departure (EWR, JFK, LGA)"
)
destination = Entity(name="destination", join_keys=["dest"], value_type=ValueType.STRING, description="Airport of arrival, IATA code")
carrier = Entity(name="carrier", join_keys=["carrier"], value_type=ValueType.STRING, description="Airline, two-letter code")
flight_number = Entity(name="flight_number", join_keys=["flight"], value_type=ValueType.INT64, description="Flight number of the carrier")
region = Entity(name="region", join_keys=["region"], value_type=ValueType.STRING, description="All airports together: the constant 'nyc'")
