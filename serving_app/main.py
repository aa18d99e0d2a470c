"""The prediction service: `uvicorn serving_app.main:app`.

Belongs here: putting the parts together, starting and stopping them in order. Does not belong here: what a part does.
Settings are read and connections opened when the application starts, never at import.
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import ProcessCollector
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from mlplatform.clock import clock_from
from mlplatform.feature_store.commands import AsyncClient, open_async_client
from serving_app.batcher import Batcher
from serving_app.deps import Serving
from serving_app.device import pick_device
from serving_app.logs import configure_logs
from serving_app.metrics import Metrics
from serving_app.middleware import RequestContext
from serving_app.model_source import ModelCache
from serving_app.model_watcher import LoadOptions, ModelWatcher
from serving_app.online_features import OnlineFeatures
from serving_app.prediction_log import PredictionLog
from serving_app.problems import install
from serving_app.protection.service import Protection
from serving_app.registry import MlflowRegistry
from serving_app.router import ModelRouter
from serving_app.routes import docs, health, models, predict
from serving_app.schemas import build_openapi
from serving_app.settings import ServingSettings

_TITLE = "Prediction service"
_DESCRIPTION = "Answers with the model version that carries the alias `production`, features read from the online store."

log = structlog.get_logger(__name__)


def create_app(settings: ServingSettings | None = None) -> FastAPI:
    """The application; without `settings` they come from the environment when it starts."""
    protection = Protection()
    lifespan = _lifespan(settings, protection)
    app = FastAPI(title=_TITLE, description=_DESCRIPTION, version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(RequestContext, protection=protection)
    install(app)
    for routes in (predict, models, health, docs):
        app.include_router(routes.router)
    app.openapi = _openapi_of(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def _lifespan(given: ServingSettings | None, protection: Protection) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings = given or ServingSettings()
        if given is None:  # in a process of its own; whoever embeds the application keeps its own logging
            configure_logs(settings.serving_log_level)
        async with AsyncExitStack() as stack:
            app.state.serving = await _start(settings, stack, protection)
            yield

    return lifespan


async def _start(settings: ServingSettings, stack: AsyncExitStack, protection: Protection) -> Serving:
    """Opens everything; the stack closes it in reverse order: first the watch, then the log with its last records, then Redis."""
    device = pick_device(settings.device)
    metrics = Metrics()
    ProcessCollector(registry=metrics.registry)
    redis = await stack.enter_async_context(_redis(settings, settings.serving_redis_timeout_s))
    online: AsyncClient = redis
    if settings.online_url.get_secret_value():
        online = _online(settings)
        stack.push_async_callback(online.aclose)
    subscriber = await stack.enter_async_context(_redis(settings, None))
    registry = (
        await stack.enter_async_context(MlflowRegistry(settings.registry_url, settings.serving_registry_timeout_s))
        if settings.registry_url
        else None
    )
    prediction_log = PredictionLog(redis, settings.serving_log_queue)
    metrics.watch_log(prediction_log.counts)
    prediction_log.start()
    stack.push_async_callback(prediction_log.close, settings.serving_drain_s)
    router = ModelRouter()
    options = LoadOptions(device, settings.serving_threads)
    watcher = ModelWatcher(settings.model_names, registry, ModelCache(settings.model_cache), router, metrics, options)
    clock = clock_from(settings.clock)
    batcher = Batcher(OnlineFeatures(online, settings.serving_redis_timeout_s), clock, metrics)
    for work in (_watch(watcher, settings.serving_poll_s), watcher.listen_forever(subscriber)):
        stack.push_async_callback(_cancel, asyncio.create_task(work))
    await stack.enter_async_context(protection.open(settings, redis, metrics.registry))
    log.info("service_started", device=device, models=settings.serving_models or "all with the alias production")
    return Serving(settings, clock, device, online, router, watcher, batcher, prediction_log, metrics)


async def _watch(watcher: ModelWatcher, every_s: float) -> None:
    """The first look happens beside the running service: it is alive at once, and ready once a model is loaded."""
    await watcher.refresh()
    # What is loaded now stays: keeping it out of the collector's rounds takes the pauses out of the slowest answers.
    gc.collect()
    gc.freeze()
    await watcher.poll_forever(every_s)


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _redis(settings: ServingSettings, timeout_s: float | None) -> "Redis":
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        decode_responses=False,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s or 2.0,
        socket_keepalive=True,
        health_check_interval=15 if timeout_s is None else 0,
        # One more try at once: after a restart of Redis every pooled connection is stale. Waiting longer is the callers' business.
        retry=Retry(NoBackoff(), 1),
    )


def _online(settings: ServingSettings) -> AsyncClient:
    """The online store, where it is not the Redis of the prediction log and the notices: a cluster, say."""
    timeout_s = settings.serving_redis_timeout_s
    return open_async_client(
        settings.online_redis_url,
        settings.online_cluster,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
    )


def _openapi_of(app: FastAPI) -> Any:
    known: dict[int, dict[str, Any]] = {}

    def openapi() -> dict[str, Any]:
        serving: Serving = app.state.serving
        generation = serving.router.generation
        if generation not in known:
            known.clear()
            known[generation] = build_openapi(app, serving.router, serving.settings.serving_rows_limit)
        return known[generation]

    return openapi


app = create_app()
