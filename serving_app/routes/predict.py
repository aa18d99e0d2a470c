"""The prediction route as FastAPI knows it: its documentation, and what the hot route in front of it leaves alone.

Belongs here: HTTP around `Predictor`. Does not belong here: the steps of a prediction.
"""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from serving_app.body import read_body
from serving_app.deps import ServingDep
from serving_app.schemas import PredictOptions, PredictRequest, PredictResponse, problems

router = APIRouter(prefix="/v1/models", tags=["predictions"])


@router.post(
    "/{model}/predict",
    summary="Predict for one input or many",
    response_class=Response,
    responses={200: {"model": PredictResponse}, **problems(404, 413, 415, 422, 503)},
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}},
)
async def predict(model: str, request: Request, serving: ServingDep, options: Annotated[PredictOptions, Query()]) -> Response:
    """Features are read from the online store; what is missing or too old is replaced as the contract says, and named in `imputed`."""
    read = partial(read_body, request.scope["headers"], request.receive, serving.settings.serving_body_limit)
    try:
        with serving.predictor.exchange(model, request.scope["state"]) as exchange:
            if options.explain or options.features:
                body = await serving.explainer.respond(exchange, read, options.explain, options.features)
            else:
                body = await serving.predictor.respond(exchange, read)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody is left to answer
    return Response(body, media_type="application/json")
