"""The Open Inference Protocol, version 2 (`/v2`), as Triton, KServe and MLServer speak it.

Belongs here: HTTP around `Predictor` in that protocol. Does not belong here: its bodies (`protocols.open_inference`).
"""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from starlette.requests import ClientDisconnect

from serving_app.body import read_body
from serving_app.deps import NO_PARAMETERS_IN_V2, Serving, ServingDep
from serving_app.predictor import Exchange, unknown_model
from serving_app.problems import FieldError, ProblemError, bad_request, no_parameters, unavailable
from serving_app.protocols.open_inference import EXTENSIONS, infer_answer, metadata, parse_infer
from serving_app.protocols.shapes import InferResponse, ModelMetadata, ModelReady, ServerLive, ServerMetadata, ServerReady
from serving_app.router import Choice
from serving_app.routes.health import unready
from serving_app.schemas import problems

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_BARE = [NO_PARAMETERS_IN_V2]
_OCTETS = "application/octet-stream"
_LENGTH = "Inference-Header-Content-Length"
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
            _OCTETS: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": InferResponse,
        "content": {_OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {_LENGTH: {"description": "Where binary data follows: the length of the JSON before it", "schema": {"type": "integer"}}},
    }
}
HeaderLength = Annotated[str | None, Header(alias=_LENGTH, description="Length of the JSON where binary tensor data follows it")]


@router.get("", summary="The server", responses=problems(400), dependencies=_BARE)
async def server() -> ServerMetadata:
    return ServerMetadata(name="mlplatform", version="1", extensions=list(EXTENSIONS))


@router.get("/health/live", summary="Is the process alive?")
async def live() -> ServerLive:
    return ServerLive(live=True)


@router.get("/health/ready", summary="Can it answer predictions?", responses=problems(503))
async def ready(serving: ServingDep) -> ServerReady:
    if reasons := await unready(serving):
        raise unavailable("not-ready", "; ".join(reasons), tuple(FieldError(reason) for reason in reasons))
    return ServerReady(live=True, ready=True)


@router.get("/models/{model}", summary="A model's tensors and versions", responses=problems(400, 404), dependencies=_BARE)
async def show(model: str, serving: ServingDep) -> ModelMetadata:
    return _metadata(serving, model, None)


@router.get(
    "/models/{model}/versions/{version}", summary="A version's tensors", responses=problems(404), dependencies=[NO_PARAMETERS_IN_V2]
)
async def show_version(model: str, version: str, serving: ServingDep) -> ModelMetadata:
    return _metadata(serving, model, version)


@router.get("/models/{model}/ready", summary="Is the model loaded?", responses=problems(400, 404), dependencies=_BARE)
async def model_ready(model: str, serving: ServingDep) -> ModelReady:
    _choice(serving, model, None)
    return ModelReady(name=model, ready=True)


@router.get(
    "/models/{model}/versions/{version}/ready",
    summary="Is the version loaded?",
    responses=problems(404),
    dependencies=[NO_PARAMETERS_IN_V2],
)
async def version_ready(model: str, version: str, serving: ServingDep) -> ModelReady:
    _choice(serving, model, version)
    return ModelReady(name=model, ready=True)


@router.post(
    "/models/{model}/infer",
    summary="Predict, in the Open Inference Protocol",
    response_class=Response,
    responses=_ANSWERS | problems(400, 404, 413, 415),
    openapi_extra=_BODY,
)
async def infer(model: str, request: Request, serving: ServingDep, header_length: HeaderLength = None) -> Response:
    """One tensor for each request field or given feature, or one `features` of shape [n, features] in the model's order."""
    return await _infer(request, serving, model, None, header_length)


@router.post(
    "/models/{model}/versions/{version}/infer",
    summary="Predict with one version that is in memory",
    response_class=Response,
    responses=_ANSWERS | problems(400, 404, 413, 415),
    openapi_extra=_BODY,
)
async def infer_version(model: str, version: str, request: Request, serving: ServingDep, header_length: HeaderLength = None) -> Response:
    """As without a version; the traffic rules are not asked, and the variant in answer and log is `pinned`."""
    return await _infer(request, serving, model, version, header_length)


async def _infer(request: Request, serving: Serving, model: str, version: str | None, header_length: str | None) -> Response:
    try:
        with serving.predictor.exchange(model, request.scope["state"]) as exchange:
            try:
                no_parameters(request)
                body, length = await _answered(request, serving, exchange, version, header_length)
            except ProblemError as problem:
                raise bad_request(problem) from problem
    except ClientDisconnect:
        return Response(status_code=499)  # nobody is left to answer
    if length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type=_OCTETS, headers={_LENGTH: str(length)})


async def _answered(
    request: Request, serving: Serving, exchange: Exchange, version: str | None, header_length: str | None
) -> tuple[bytes, int | None]:
    choice = serving.predictor.choose(exchange) if version is None else serving.predictor.pin(exchange, version)
    limits = serving.settings
    body = await read_body(request.scope["headers"], request.receive, limits.serving_body_limit, (_OCTETS.encode(),))
    contract = choice.handle.contract
    asked = parse_infer(body, header_length, limits.serving_rows_limit, len(contract.features))
    answer = await serving.predictor.answer(exchange, asked.inputs(contract))
    return infer_answer(answer, asked, exchange.request_id)


def _choice(serving: Serving, model: str, version: str | None) -> Choice:
    exchange = serving.predictor.exchange(model, {})  # not entered: a look is no prediction request
    return serving.predictor.choose(exchange) if version is None else serving.predictor.pin(exchange, version)


def _metadata(serving: Serving, model: str, version: str | None) -> ModelMetadata:
    handle = _choice(serving, model, version).handle
    slot = serving.router.slot(model)
    if slot is None:
        raise unknown_model(serving.router, serving.watcher, model)
    versions = sorted({held.version for _, held in slot.held()})
    return ModelMetadata.model_validate(metadata(handle.contract, versions))
