"""Is the process alive, is it ready, and its metrics.

Belongs here: what a load balancer, an orchestrator and Prometheus ask. Does not belong here: models and predictions.
"""

import asyncio

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from serving_app.deps import Serving, ServingDep
from serving_app.problems import FieldError, unavailable
from serving_app.schemas import Alive, Ready, problems

# What stands in for the online store, by MLPLATFORM_SERVING_FALLBACK; with `refuse` there is nothing.
_INSTEAD = {
    "cache": "values read last stand in for it, within each view's age limit, and defaults for the rest",
    "defaults": "the models' defaults stand in for it",
}

router = APIRouter(tags=["service"])


@router.get("/health/live", summary="Is the process alive?")
async def live() -> Alive:
    return Alive(status="alive")


@router.get("/health/ready", summary="Can it answer predictions?", responses=problems(503))
async def ready(serving: ServingDep) -> Ready:
    """Ready means: every wanted model is loaded (or at least one, where none is named), and the online store answers, or the service is set
    to answer without it. While it is away, `warnings` says so and what stands in for it."""
    reasons, warnings = await readiness(serving)
    if reasons:
        raise unavailable("not-ready", "; ".join(reasons), tuple(FieldError(reason) for reason in reasons))
    refused = [*serving.watcher.refusals.values(), *serving.watcher.side_refusals.values()]
    warnings += [f"{r.ref.model} version {r.ref.version} was refused as {r.role} ({r.step}: {r.reason})" for r in refused]
    warnings += [f"{model}: the newest traffic rules were refused: {why}" for model, why in serving.watcher.rule_faults.items()]
    models = {slot.current.name: slot.current.version for slot in serving.router}
    return Ready(status="ready", models=models, device=serving.device, warnings=warnings)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(serving: ServingDep) -> Response:
    serving.metrics.ready.set(not await unready(serving))
    return Response(generate_latest(serving.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


async def unready(serving: Serving) -> list[str]:
    """Why the service is not ready; empty where it is."""
    reasons, _ = await readiness(serving)
    return reasons


async def readiness(serving: Serving) -> tuple[list[str], list[str]]:
    """Why the service is not ready, and what is amiss without keeping it from answering; both empty where all is well."""
    reasons = ["the service was told to end"] if serving.drain.begun else []
    missing = serving.watcher.missing()
    reasons += [_not_loaded(serving, name) for name in missing]
    if not serving.router.names() and not missing:
        tried = sorted(serving.watcher.refusals.keys() | serving.watcher.troubles.keys())
        reasons += [_not_loaded(serving, model) for model in tried] or [f"no model is loaded: {_none_because(serving)}"]
    warnings: list[str] = []
    if serving.watcher.registry_fault and serving.router.names():
        warnings.append(f"{serving.watcher.registry_fault}; what is in memory goes on")
    try:
        async with asyncio.timeout(serving.settings.serving_redis_timeout_s):
            await serving.online.ping()
        serving.features.answered()
    except (RedisError, OSError, TimeoutError) as error:
        away = f"the online store does not answer: {type(error).__name__}"
        instead = _INSTEAD.get(serving.settings.serving_fallback)
        (reasons if instead is None else warnings).append(away if instead is None else f"{away}; {instead}")
    return reasons, warnings


def _none_because(serving: Serving) -> str:
    if not serving.watcher.known:
        return serving.watcher.unknown_because()
    if not serving.settings.registry_url:
        return "the verified cache holds none, and MLPLATFORM_MLFLOW_URL is not set"
    return "none carries the alias 'production'"


def _not_loaded(serving: Serving, model: str) -> str:
    refusal = serving.watcher.refusals.get(model)
    if refusal is None:
        trouble = serving.watcher.troubles.get(model)
        return f"model '{model}' is not loaded" + (f": {trouble}" if trouble else "")
    return f"model '{model}' version {refusal.ref.version} was refused ({refusal.step}: {refusal.reason})"
