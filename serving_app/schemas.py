"""The shapes of the REST API, and the OpenAPI document with each loaded model's own fields.

Belongs here: response models, JSON Schema from a serving contract, the OpenAPI assembly. Does not belong here: validation of
inputs (`inputs` does that column-wise; no pydantic object per feature).
"""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from mlplatform.contracts import ContractField, ServingContract
from serving_app.features import Reason
from serving_app.problems import MEDIA_TYPE
from serving_app.protection.document import describe
from serving_app.router import ModelRouter

PREDICT_PATH = "/v1/models/{model}/predict"


class Prediction(BaseModel):
    request_id: str = Field(description="Identifies this request in logs and in the prediction log")
    input_index: int = Field(description="Position of the input in the request")
    prediction: float = Field(description="Probability of the positive class")
    decision: bool | None = Field(description="Whether the prediction reaches the model's threshold; null where it declares none")
    model_version: int
    variant: str = Field(description="Which of the versions that share the traffic answered")
    feature_ages_s: dict[str, float | None] = Field(description="Age of each view's value in seconds; null where none was found")
    imputed: list[str] = Field(description="Views whose values were missing or too old and were replaced by the recorded defaults")
    shortfalls: dict[str, Reason] = Field(description="Views without a value as it should be, and why")


class PredictResponse(BaseModel):
    model: str
    version: int
    threshold: float | None
    predictions: list[Prediction]


class PredictRequest(BaseModel):
    inputs: list[dict[str, Any]] = Field(
        description="One object per question, with the model's own fields: GET /v1/models/{model} shows them"
    )


class FaultDetail(BaseModel):
    detail: str
    input: int | None = Field(None, description="Index of the input at fault")
    field: str | None = Field(None, description="Name of the field at fault")


class ProblemDetail(BaseModel):
    """Problem details as in RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[FaultDetail] | None = None


class Alive(BaseModel):
    status: Literal["alive"]


class Ready(BaseModel):
    status: Literal["ready"]
    models: dict[str, int] = Field(description="Version that serves, per model")
    device: str
    warnings: list[str] = Field(
        description="What is amiss without keeping it from answering: refused versions, an online store that is away"
    )


class RefusedVersion(BaseModel):
    version: int
    step: str
    reason: str


class RefusedInRole(RefusedVersion):
    role: str = Field(description="What it was wanted for: `canary`, `shadow`, or an arm of the experiment")


class VariantShare(BaseModel):
    variant: str
    version: int
    percent: float = Field(description="Part of all entities that it answers")


class Traffic(BaseModel):
    """How versions share a model's requests."""

    variants: list[VariantShare]
    shadow_version: int | None = Field(description="The version that is asked copies of requests and answers nobody")
    shadow_share: float = Field(description="Part of the requests that are copied, in percent")
    sticky_on: list[str] = Field(description="The request fields that are the entity")
    refused: str | None = Field(description="Why the newest traffic rules do not count; those shown go on")
    refused_versions: list[RefusedInRole] = Field(description="Versions wanted beside the champion that were refused")


class ModelSummary(BaseModel):
    name: str
    description: str
    task: str
    version: int
    previous_version: int | None = Field(description="The version that served before; kept in memory")
    contract_digest: str
    refused: RefusedVersion | None = Field(description="The version the alias names, where it was refused")
    traffic: Traffic


class ModelList(BaseModel):
    models: list[ModelSummary]


class ViewDetail(BaseModel):
    name: str
    join_keys: list[str]
    ttl_s: float = Field(description="A value older than this is stale; 0: never")
    on_stale: Literal["serve", "impute", "refuse"]
    features: list[str]


class ServedVersion(BaseModel):
    version: int
    role: str
    contract_digest: str
    training_set_hash: str
    device: str


class ModelDetail(ModelSummary):
    threshold: float | None
    input_schema: dict[str, Any] = Field(description="JSON Schema of one input")
    example: dict[str, Any] = Field(description="A request body that works")
    features: list[str] = Field(description="The model's inputs in their order")
    views: list[ViewDetail]
    versions: list[ServedVersion]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these problem statuses."""
    reference = {"$ref": "#/components/schemas/ProblemDetail"}
    return {s: {"description": "Problem details (RFC 9457)", "content": {MEDIA_TYPE: {"schema": reference}}} for s in statuses}


def field_schema(field: ContractField) -> dict[str, Any]:
    """JSON Schema of one request field."""
    kinds: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": 1, "maxLength": field.max_length},
        "int": {"type": "integer"},
        "float": {"type": "number"},
        "bool": {"type": "boolean"},
        "date": {"type": "string", "format": "date"},
        "timestamp": {"type": "string", "format": "date-time"},
    }
    schema = kinds[field.dtype] | {"description": field.description, "examples": [field.example]}
    if field.dtype in ("int", "float"):
        schema |= {k: v for k, v in (("minimum", field.minimum), ("maximum", field.maximum)) if v is not None}
    if not field.required:
        schema["type"] = [schema["type"], "null"]
    return schema


def input_schema(contract: ServingContract) -> dict[str, Any]:
    """JSON Schema of one input of a model."""
    asked = [f for f in contract.fields if f.constant is None]
    return {
        "type": "object",
        "properties": {f.name: field_schema(f) for f in asked},
        "required": [f.name for f in asked if f.required],
        "additionalProperties": False,
    }


def example_inputs(contract: ServingContract) -> list[dict[str, Any]]:
    return [{f.name: f.example for f in contract.fields if f.constant is None}]


def build_openapi(app: FastAPI, router: ModelRouter, rows_limit: int) -> dict[str, Any]:
    """The OpenAPI document: the predict route stands once per loaded model, with that model's fields and example."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= _with_definitions(ProblemDetail) | _with_definitions(PredictResponse)
    generic = document["paths"].get(PREDICT_PATH)
    if generic is None or not router.names():
        describe(document)
        return document
    del document["paths"][PREDICT_PATH]
    predicting: dict[str, Any] = {}
    for slot in router:
        contract = slot.current.contract
        schemas[f"{contract.model}_input"] = input_schema(contract)
        inputs = {"type": "array", "minItems": 1, "maxItems": rows_limit, "items": {"$ref": f"#/components/schemas/{contract.model}_input"}}
        body = {"type": "object", "properties": {"inputs": inputs}, "required": ["inputs"], "additionalProperties": False}
        operation = dict(generic["post"])
        operation |= {
            "summary": f"Predict with {contract.model}",
            "description": f"{contract.description}\n\n{operation.get('description', '')}",
            "operationId": f"predict_{contract.model}",
            "parameters": [],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": body, "example": {"inputs": example_inputs(contract)}}},
            },
        }
        predicting[f"/v1/models/{contract.model}/predict"] = {"post": operation}
    document["paths"] = predicting | document["paths"]  # what the service is for comes first
    describe(document)
    return document


def _with_definitions(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}
