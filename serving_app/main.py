"""The prediction service: `uvicorn serving_app.main:app`.

Belongs here: putting the parts together, starting and stopping them in order. Does not belong here: what a part does.
Settings are read and connections opened when the application starts, never at import.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import ProcessCollector
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.types import Receive, Scope, Send

from mlplatform.clock import Clock, clock_from
from mlplatform.code_version import code_name
from mlplatform.feature_store.commands import AsyncClient, open_async_client
from mlplatform.feature_store.pipe import Pipe
from serving_app.around import Around
from serving_app.batcher import Batcher
from serving_app.deps import Serving
from serving_app.device import pick_device
from serving_app.explainer import Explainer
from serving_app.feature_cache import FeatureCache
from serving_app.hot import HotRoute
from serving_app.log_spill import Spill
from serving_app.logs import configure_logs
from serving_app.metrics import Metrics
from serving_app.middleware import RequestContext
from serving_app.model_loader import LoadOptions, ModelLoader
from serving_app.model_source import ModelCache
from serving_app.model_watcher import ModelWatcher
from serving_app.online_features import OnlineFeatures
from serving_app.openapi import build_openapi
from serving_app.prediction_log import PredictionLog
from serving_app.predictor import Predictor
from serving_app.problems import install
from serving_app.protection.service import CredentialsError, check_credentials
from serving_app.registry import MlflowRegistry
from serving_app.router import ModelRouter
from serving_app.routes import docs, health, hooks, models, open_inference, predict, scoring
from serving_app.settings import ServingSettings, what_is_wrong
from serving_app.shadow import Shadow, ShadowBudget, Submit
from serving_app.state_metrics import PartsCollector

_LOG_TIMEOUT_S = 5.0  # nobody waits for it; a write given up too early is written twice
_COLLECT_AT = 100_000  # objects made and not gone, beyond those at the last collection
_CODE = ("serving_app", "feature_definitions", "mlplatform.contracts", "mlplatform.clock", "mlplatform.feature_store")
_TITLE = "Prediction service"
_DESCRIPTION = "Answers with the model version that carries the alias `production`, features read from the online store."

log = structlog.get_logger(__name__)


class PredictionService(FastAPI):
    """FastAPI behind what every request gets and has to pass. `hot` is the way past both, for a server that offers it (`server`)."""

    def __init__(self, settings: ServingSettings | None) -> None:
        self._from_environment = settings is None
        around = self._around = Around.make()
        self.hot = HotRoute(around)
        lifespan = _lifespan(settings, around, self.hot)
        super().__init__(
            title=_TITLE,
            description=_DESCRIPTION,
            version="1",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,  # such an address is no part of the API, and few clients follow a POST's redirect
            lifespan=lifespan,
        )
        install(self)
        for routes in (predict, open_inference, scoring, models, hooks, health, docs):
            self.include_router(routes.router)
        # Not as FastAPI's middlewares: in front of those stand layers of its own (telemetry, body limit: 15 µs a request).
        self._front = RequestContext(super().__call__, around)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and self._from_environment and (fault := _start_fault()):
            # In its own words: of an exception the server would print the trace.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": fault})
            return
        await self._front(scope, receive, send)

    def drain(self) -> None:
        """From now on the service is not ready, and every answer closes its connection; requests are still answered."""
        self._around.drain.begun = True

    def openapi(self) -> dict[str, Any]:
        """With each loaded model's own fields; made anew when another version serves."""
        serving: Serving = self.state.serving
        generation = serving.router.generation
        if self._documented != generation or self.openapi_schema is None:
            self.openapi_schema = build_openapi(self, serving.router, serving.settings.serving_rows_limit)
            self._documented = generation
        return self.openapi_schema

    _documented = -1


def create_app(settings: ServingSettings | None = None) -> PredictionService:
    """The application; without `settings` they come from the environment when it starts."""
    return PredictionService(settings)


def _start_fault() -> str:
    """What the environment says that no service starts with; '' where there is nothing."""
    try:
        check_credentials(ServingSettings())
    except ValidationError as fault:
        return "; ".join(what_is_wrong(fault))
    except CredentialsError as fault:
        return str(fault)
    return ""


def _lifespan(given: ServingSettings | None, around: Around, hot: HotRoute) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings = given or ServingSettings()
        if given is None:  # in a process of its own; whoever embeds the application keeps its own logging
            configure_logs(settings.serving_log_level)
        async with AsyncExitStack() as stack:
            around.requests.slow_s = settings.serving_slow_s
            traces = around.traces.open(settings.serving_otlp_url, settings.serving_trace_share, settings.code_version)
            await stack.enter_async_context(traces)
            serving = app.state.serving = await _start(settings, stack, around)
            hot.running = serving.predictor, settings.serving_body_limit
            yield
            hot.running = None

    return lifespan


async def _start(settings: ServingSettings, stack: AsyncExitStack, around: Around) -> Serving:
    """Opens everything; the stack closes it in reverse order: first the watch, then the log with its last records, then Redis."""
    device = pick_device(settings.device)
    metrics = Metrics()
    ProcessCollector(registry=metrics.registry)
    log_pipe = Pipe(settings.redis_url.get_secret_value(), _LOG_TIMEOUT_S)
    stack.push_async_callback(log_pipe.aclose)
    online = _online(settings)
    stack.push_async_callback(online.aclose)
    subscriber = await stack.enter_async_context(_redis(settings, None))
    registry = (
        await stack.enter_async_context(MlflowRegistry(settings.registry_url, settings.serving_registry_timeout_s))
        if settings.registry_url
        else None
    )
    spill = Spill(settings.log_spill, settings.serving_log_spill_bytes) if settings.serving_log_spill_bytes else None
    stamp = {"code_version": code_name(settings.code_version, _CODE)}
    prediction_log = PredictionLog(log_pipe, settings.serving_log_queue, spill, stamp)
    metrics.watch_log(prediction_log.counts)
    prediction_log.start()
    stack.push_async_callback(prediction_log.close, settings.serving_drain_s)
    router = ModelRouter()
    cache = ModelCache(settings.model_cache)
    loader = ModelLoader(registry, cache, router, _load_options(settings, device))
    watcher = ModelWatcher(settings.model_names, registry, cache, router, metrics, loader)
    clock = clock_from(settings.clock)
    features = OnlineFeatures(online, _read_limit(settings), settings.serving_fallback, _cache(settings))
    batcher = Batcher(features, clock, metrics)
    metrics.registry.register(PartsCollector(features, batcher, watcher, registry is not None, stamp["code_version"]))
    budget = ShadowBudget(settings.serving_shadow_queue, settings.serving_shadow_share)
    shadow = Shadow(router, partial(_shadow_scorer, settings, clock), prediction_log.offer, budget)
    metrics.registry.register(shadow)
    shadow.start()
    stack.push_async_callback(shadow.close)
    predictor = Predictor(router, watcher, batcher, prediction_log, shadow, metrics, settings.serving_rows_limit)
    explainer = Explainer(predictor, settings.serving_explain_rows)
    stack.push_async_callback(watcher.close)
    for work in (_watch(watcher, settings.serving_poll_s), watcher.listen_forever(subscriber)):
        stack.push_async_callback(_cancel, asyncio.create_task(work))
    quotas = await stack.enter_async_context(_redis(settings, settings.serving_redis_timeout_s))
    await stack.enter_async_context(around.protection.open(settings, quotas, metrics.registry))
    log.info("service_started", device=device, **stamp, models=settings.serving_models or "all with the alias production")
    return Serving(
        settings,
        clock,
        device,
        online,
        features,
        router,
        watcher,
        batcher,
        predictor,
        explainer,
        prediction_log,
        metrics,
        shadow,
        around.drain,
    )


@asynccontextmanager
async def _shadow_scorer(settings: ServingSettings, clock: Clock) -> AsyncIterator[Submit]:
    """Connections and a batcher of the shadow's own. Its figures are not those of answers, so they are kept apart."""
    online = _online(settings)
    try:
        yield Batcher(OnlineFeatures(online, _read_limit(settings)), clock, Metrics()).submit
    finally:
        await online.aclose()


async def _watch(watcher: ModelWatcher, every_s: float) -> None:
    """The first look happens beside the running service: it is alive at once, and ready once a model is loaded."""
    await watcher.refresh()
    with collector_at_rest():
        await watcher.poll_forever(every_s)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """What is loaded now stays: keeping it out of the collector's rounds takes the pauses out of the slowest answers."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    # A batch makes some ten thousand objects that are gone with it; at Python's 700 each is looked through several times meanwhile.
    gc.set_threshold(_COLLECT_AT)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _redis(settings: ServingSettings, timeout_s: float | None) -> "Redis":
    """For what is not on a request's way: the notices, waited for without limit, and the quotas."""
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


def _load_options(settings: ServingSettings, device: str) -> LoadOptions:
    return LoadOptions(device, settings.serving_threads, settings.signing_key.get_secret_value(), settings.serving_unverified)


def _online(settings: ServingSettings) -> AsyncClient:
    """The online store: one pipelined connection, or a client that knows where a cluster's keys are."""
    timeout_s = settings.serving_redis_timeout_s
    if not settings.online_cluster:
        return Pipe(settings.online_redis_url, timeout_s)
    return open_async_client(
        settings.online_redis_url, cluster=True, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, socket_keepalive=True
    )


def _read_limit(settings: ServingSettings) -> float | None:
    """A cluster's read is several exchanges with several nodes, so it is timed as a whole; a `Pipe` times its own."""
    return settings.serving_redis_timeout_s if settings.online_cluster else None


def _cache(settings: ServingSettings) -> FeatureCache | None:
    if settings.serving_fallback != "cache" and not settings.serving_cache_s:
        return None
    return FeatureCache(settings.serving_cache_values, settings.serving_cache_s)


app = create_app()
