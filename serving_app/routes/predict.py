"""Predictions: a request's way from bytes to bytes.

Belongs here: limits, order of the steps, the answer and its log record. Does not belong here: each step's work.
"""

import time
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from serving_app.batcher import Scored
from serving_app.deps import Serving, ServingDep
from serving_app.inputs import ParsedInputs
from serving_app.prediction_log import LogEntry
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable
from serving_app.router import Choice
from serving_app.routes.models import unknown_model
from serving_app.schemas import PredictRequest, PredictResponse, problems

router = APIRouter(prefix="/v1/models", tags=["predictions"])


@router.post(
    "/{model}/predict",
    summary="Predict for one input or many",
    response_class=Response,
    responses={200: {"model": PredictResponse}, **problems(404, 413, 415, 422, 503)},
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}},
)
async def predict(model: str, request: Request, serving: ServingDep) -> Response:
    """Features are read from the online store; what is missing or too old is replaced as the contract says, and named in `imputed`."""
    started = time.perf_counter()
    choice = serving.router.choose(model)
    status = 500
    try:
        if choice is None:
            raise unknown_model(serving, model)
        inputs = _inputs(await _body(request, serving.settings.serving_body_limit))
        # The first input's entity stands for the request: all its answers come from one version.
        if serving.router.sticky(model):
            entity = serving.router.entity(model, inputs[0] if isinstance(inputs, list) and inputs else None)
            choice = serving.router.choose(model, entity) or choice
        parsed = choice.handle.parser.parse(inputs, serving.settings.serving_rows_limit)
        scored = await serving.batcher.submit(choice.handle, parsed)
        if scored.refused:
            raise _refusal(scored)
        answer = _answer(serving, choice, request.state.request_id, parsed, scored, started)
        status = 200
        serving.shadow.offer(model, parsed, request.state.request_id)
    except ProblemError as problem:
        status = problem.status
        raise
    except ClientDisconnect:
        status = 499  # nobody is left to answer; the code is nginx's for this
        return Response(status_code=status)
    finally:
        labels = (model, str(choice.handle.version)) if choice else ("unknown", "")
        serving.metrics.requests.labels(*labels, str(status)).inc()
        if choice is not None:
            serving.metrics.seconds.labels(*labels).observe(time.perf_counter() - started)
    return Response(answer, media_type="application/json")


async def _body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "application/json")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ProblemError(415, "unsupported-media-type", f"send application/json, not {kind[:64]!r}")
    too_large = ProblemError(413, "body-too-large", f"a body may have at most {limit} bytes", headers={"Connection": "close"})
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:  # a chunked body does not announce its size
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _inputs(body: bytes) -> object:
    try:
        sent = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid_input([FieldError(f"the body is not JSON: {error}")]) from None
    if not isinstance(sent, dict) or "inputs" not in sent:
        raise invalid_input([FieldError("the body must be an object with the key 'inputs'", field="inputs")])
    if unknown := sorted(sent.keys() - {"inputs"}):
        raise invalid_input(
            [FieldError("is not known here: the body has one key, 'inputs'", field=str(name)[:64]) for name in unknown[:10]]
        )
    return sent["inputs"]


def _refusal(scored: Scored) -> ProblemError:
    errors = tuple(FieldError(f"the view '{view}' has no usable value ({why})", input=row) for row, view, why in scored.refused[:100])
    return unavailable(
        "features-unavailable", f"the model does not predict without these features: input {errors[0].input}: {errors[0].detail}", errors
    )


def _answer(serving: Serving, choice: Choice, request_id: str, parsed: ParsedInputs, scored: Scored, started: float) -> bytes:
    """The body of the answer; the same rows go to the prediction log and the metrics."""
    handle, variant, contract = choice.handle, choice.variant, choice.handle.contract
    predictions = scored.predictions.tolist()
    told: list[dict[str, Any]] = [
        {
            "request_id": request_id,
            "input_index": i,
            "prediction": p,
            "decision": None if contract.threshold is None else p >= contract.threshold,
            "model_version": handle.version,
            "variant": variant,
            "feature_ages_s": scored.ages_s[i],
            "imputed": scored.imputed[i],
        }
        for i, p in enumerate(predictions)
    ]
    body = orjson.dumps({"model": handle.name, "version": handle.version, "threshold": contract.threshold, "predictions": told})
    common = {
        "request_id": request_id,
        "requested_at": scored.at.isoformat(timespec="microseconds"),
        "model": handle.name,
        "version": handle.version,
        "variant": variant,
        "contract_digest": handle.digest,
        "latency_ms": round((time.perf_counter() - started) * 1000, 3),
    }
    serving.prediction_log.offer(
        [
            LogEntry(
                handle.name,
                {
                    **common,
                    "input_index": i,
                    "inputs": parsed.received[i],
                    "features": scored.matrix[i],
                    "feature_ages_s": scored.ages_s[i],
                    "imputed": scored.imputed[i],
                    "prediction": p,
                },
            )
            for i, p in enumerate(predictions)
        ]
    )
    _count(serving, handle.name, str(handle.version), scored)
    return body


def _count(serving: Serving, model: str, version: str, scored: Scored) -> None:
    metrics = serving.metrics
    metrics.predictions.labels(model, version).inc(len(scored.imputed))
    # One observation per view and request: the values of a batch come from the same moment.
    for view, age in scored.ages_s[0].items():
        if age is not None:
            metrics.feature_age.labels(model, view).observe(age)
    for views in scored.imputed:
        for view in views:
            metrics.imputed.labels(model, view).inc()
