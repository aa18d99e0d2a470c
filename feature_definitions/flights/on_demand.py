"""The request-time features as Feast sees them, for history. Belongs here: on-demand feature views around the functions of
`request_time`, which the prediction service calls directly. Does not belong here: any arithmetic.
"""

import inspect
import warnings

from feast.field import Field
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.transformation.python_transformation import PythonTransformation
from feast.types import Float64

from feature_definitions.flights.request_functions import DESCRIPTIONS, REQUEST_FUNCTIONS
from feature_definitions.flights.sources import flight_request

_OUTPUTS = [name for function in REQUEST_FUNCTIONS for name in function.outputs]


def request_features(inputs: dict[str, list[object]]) -> dict[str, list[float]]:
    """Feast's python mode: lists in, lists out. Feast keeps this text in its registry and runs it from there, so it may use
    nothing of this module, and no name but builtins in its annotations."""
    from feature_definitions.columns import columns, lists
    from feature_definitions.flights.request_functions import REQUEST_FUNCTIONS

    # Feast hands over every column of the joined table.
    needed = {name: inputs[name] for function in REQUEST_FUNCTIONS for name in function.inputs}
    given = columns(needed, times=("scheduled_departure", "scheduled_arrival"))
    return {name: values for f in REQUEST_FUNCTIONS for name, values in lists(f.function(given)).items()}


with warnings.catch_warnings():
    # Feast calls on-demand views experimental; the history path through them is tested against the direct call.
    warnings.simplefilter("ignore", RuntimeWarning)
    flight_request_features = OnDemandFeatureView(
        name="flight_request_features",
        sources=[flight_request],
        # Feast 0.67 compares these with fields it infers, which have neither description nor tags: both are the view's tags here.
        schema=[Field(name=name, dtype=Float64) for name in _OUTPUTS],
        feature_transformation=PythonTransformation(udf=request_features, udf_string=inspect.getsource(request_features)),
        mode="python",
        description="What the schedule and the calendar alone tell about a flight",
        owner="flights@example.com",
        tags={"domain": "flights", "kind": "request", **{f"feature:{name}": DESCRIPTIONS[name] for name in _OUTPUTS}},
    )
