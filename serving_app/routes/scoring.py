"""MLflow's scoring protocol (`/invocations`), as `mlflow models serve` speaks it, for each model.

Belongs here: HTTP around `Predictor` in that protocol. Does not belong here: its bodies (`protocols.scoring`).
"""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from serving_app.body import read_body
from serving_app.deps import Serving, ServingDep
from serving_app.predictor import Answer, Exchange
from serving_app.problems import FieldError, ProblemError, bad_request, no_parameters, unavailable
from serving_app.protocols.scoring import CSV, MLFLOW_VERSION, inputs_of_csv, inputs_of_json
from serving_app.protocols.shapes import Invoked
from serving_app.routes.health import unready
from serving_app.schemas import problems

router = APIRouter(tags=["mlflow scoring protocol"])

_INVOKED: dict[int | str, dict[str, Any]] = {200: {"model": Invoked}}
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Invocation"}},
            CSV: {"schema": {"type": "string"}},
        },
    }
}


@router.post(
    "/v1/models/{model}/invocations",
    summary="Predict, in MLflow's scoring protocol",
    response_class=Response,
    responses=_INVOKED | problems(400, 404, 413, 415),
    openapi_extra=_BODY,
)
async def invocations(model: str, request: Request, serving: ServingDep) -> Response:
    """Columns are request fields, given features, or both; null and NaN are missing values."""
    try:
        with serving.predictor.exchange(model, request.scope["state"]) as exchange:
            try:
                no_parameters(request)
                body = await _answered(request, serving, exchange)
            except ProblemError as problem:
                raise bad_request(problem) from problem
    except ClientDisconnect:
        return Response(status_code=499)  # nobody is left to answer
    return Response(body, media_type="application/json")


async def _answered(request: Request, serving: Serving, exchange: Exchange) -> bytes:
    contract = serving.predictor.choose(exchange).handle.contract
    kind = request.headers.get("content-type", "")
    body = await read_body(request.scope["headers"], request.receive, serving.settings.serving_body_limit, (CSV.encode(),))
    is_csv = kind.partition(";")[0].strip().lower() == CSV
    inputs = inputs_of_csv(body, contract) if is_csv else inputs_of_json(body, contract)
    answer = await serving.predictor.answer(exchange, inputs)
    return orjson.dumps(
        {
            "predictions": _predictions(answer),
            "model_version": answer.choice.handle.version,
            "variant": answer.choice.variant,
            "request_id": exchange.request_id,
            "imputed": answer.scored.imputed,
        }
    )


def _predictions(answer: Answer) -> list[Any]:
    """Numbers, or an object for each row of a model with several outputs, as MLflow has frames."""
    names = answer.choice.handle.contract.quantile_names
    if answer.scored.quantiles is None:
        return list(answer.scored.predictions)
    return [dict(zip(names, row, strict=True)) for row in answer.scored.quantiles]


@router.get("/ping", summary="Ready? (MLflow)", response_class=Response, responses=_TEXT | problems(503))
@router.get("/health", summary="Ready? (MLflow)", response_class=Response, responses=_TEXT | problems(503))
async def ping(serving: ServingDep) -> Response:
    if reasons := await unready(serving):
        raise unavailable("not-ready", "; ".join(reasons), tuple(FieldError(reason) for reason in reasons))
    return Response("\n", media_type="text/plain")


@router.get("/v1/models/{model}/ping", summary="Is the model loaded? (MLflow)", response_class=Response, responses=_TEXT | problems(404))
async def ping_model(model: str, serving: ServingDep) -> Response:
    serving.predictor.choose(serving.predictor.exchange(model, {}))  # not entered: a look is no prediction request
    return Response("\n", media_type="text/plain")


@router.get("/version", summary="The MLflow whose protocol this is", response_class=Response, responses=_TEXT)
async def version() -> Response:
    return Response(MLFLOW_VERSION, media_type="text/plain")


@router.get(
    "/v1/models/{model}/version", summary="The MLflow whose protocol this is", response_class=Response, responses=_TEXT | problems(404)
)
async def version_of_model(model: str, serving: ServingDep) -> Response:
    serving.predictor.choose(serving.predictor.exchange(model, {}))
    return await version()
