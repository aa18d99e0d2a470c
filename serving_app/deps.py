"""What routes depend on, under annotated names.

Belongs here: the running application's parts and the FastAPI dependencies that hand them out. Does not belong here: building them.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from mlplatform.clock import Clock
from mlplatform.feature_store.commands import AsyncClient
from serving_app.batcher import Batcher
from serving_app.drain import Drain
from serving_app.explainer import Explainer
from serving_app.metrics import Metrics
from serving_app.model_watcher import ModelWatcher
from serving_app.online_features import OnlineFeatures
from serving_app.prediction_log import PredictionLog
from serving_app.predictor import Predictor
from serving_app.problems import ProblemError, bad_request, no_parameters
from serving_app.router import ModelRouter
from serving_app.settings import ServingSettings
from serving_app.shadow import Shadow


@dataclass(frozen=True)
class Serving:
    """The parts of one running application."""

    settings: ServingSettings
    clock: Clock
    device: str
    online: AsyncClient
    features: OnlineFeatures
    router: ModelRouter
    watcher: ModelWatcher
    batcher: Batcher
    predictor: Predictor
    explainer: Explainer
    prediction_log: PredictionLog
    metrics: Metrics
    shadow: Shadow
    drain: Drain


async def get_serving(request: Request) -> Serving:
    # async, though nothing waits here: FastAPI sends plain functions through a thread, which costs more than all else in the route.
    serving: Serving = request.app.state.serving
    return serving


ServingDep = Annotated[Serving, Depends(get_serving)]


async def _no_parameters(request: Request) -> None:
    no_parameters(request)


async def _no_parameters_in_v2(request: Request) -> None:
    try:
        no_parameters(request)
    except ProblemError as problem:
        raise bad_request(problem) from problem


# Of addresses that tell about models. Those of health, metrics and pages take any: a probe must not fail for a word too many.
NO_PARAMETERS, NO_PARAMETERS_IN_V2 = Depends(_no_parameters), Depends(_no_parameters_in_v2)
