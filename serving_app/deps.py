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
from serving_app.prediction_log import PredictionLog
from serving_app.predictor import Predictor
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
