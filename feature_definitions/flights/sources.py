"""Where the flight views' stored values lie. Belongs here: Feast data sources. Does not belong here: views.

Feast finds its objects as attributes of modules, so these are made when this module is loaded, and the lake's root is
read from the settings then. Only what loads Feast declarations imports it, never the prediction service.
"""

from feast import FileSource, PushSource, RequestSource
from feast.data_format import DeltaFormat
from feast.field import Field
from feast.types import Float64, Int64, UnixTimestamp

from mlplatform.settings import load_settings


def offline_table(view: str) -> FileSource:
    """The Delta table `offline/<view>` of the lake."""
    return FileSource(
        name=f"offline_{view}",
        path=f"{load_settings().lake_root.rstrip('/')}/offline/{view}",
        file_format=DeltaFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        description=f"Values of {view}: event_timestamp is when a value became known, created when it was made available",
    )


def pushed(view: str) -> PushSource:
    """Feast's stream source of a windowed view, with its Delta table behind it."""
    return PushSource(name=f"push_{view}", batch_source=offline_table(view), description=f"Fresh values of {view}")


flight_request = RequestSource(
    name="flight_request",
    schema=[
        Field(name="scheduled_departure", dtype=UnixTimestamp, description="Scheduled departure, UTC"),
        Field(name="scheduled_arrival", dtype=UnixTimestamp, description="Scheduled arrival, UTC"),
        Field(name="distance_miles", dtype=Float64, description="Great-circle distance", tags={"unit": "mi"}),
        Field(name="scheduled_load", dtype=Int64, description="Flights scheduled from the origin within 30 min before or after"),
    ],
    description="What an application knows of a scheduled flight",
)
