"""The OpenAPI document, with each loaded model's own fields, features and examples.

Belongs here: JSON Schema from a serving contract, and the operations that stand once for each model. Does not belong here: the
shapes that are the same for every model (`schemas`, `protocols.shapes`).
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from mlplatform.contracts import ContractFeature, ContractField, ServingContract
from serving_app.inputs import GIVEN
from serving_app.protection.document import describe
from serving_app.protocols import open_inference
from serving_app.protocols.shapes import InferRequest, InferResponse, Invocation, Invoked
from serving_app.router import ModelRouter
from serving_app.schemas import PredictResponse, ProblemDetail


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


def feature_schema(feature: ContractFeature) -> dict[str, Any]:
    """JSON Schema of one feature given in a request; null is a missing value."""
    if feature.categories is None:
        return {"type": ["number", "null"]}
    return {"type": ["string", "number", "null"], "description": f"One of {len(feature.categories)} categories, or its place among them"}


def input_schema(contract: ServingContract) -> dict[str, Any]:
    """JSON Schema of one input of a model. Fields that only given features would need may be left out."""
    asked = [f for f in contract.fields if f.constant is None]
    features = {
        "type": "object",
        "description": "Features that stand in for those looked up or computed; all are optional",
        "properties": {f.name: feature_schema(f) for f in contract.features},
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {f.name: field_schema(f) for f in asked} | {GIVEN: features},
        "anyOf": [{"required": [f.name for f in asked if f.required]}, {"required": [GIVEN]}],
        "additionalProperties": False,
    }


def example_inputs(contract: ServingContract) -> list[dict[str, Any]]:
    return [{f.name: f.example for f in contract.fields if f.constant is None}]


def build_openapi(app: FastAPI, router: ModelRouter, rows_limit: int) -> dict[str, Any]:
    """The document: the routes that predict stand once for each loaded model, with its fields and examples."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for shape in (ProblemDetail, PredictResponse, InferRequest, InferResponse, Invocation, Invoked):
        schemas |= _with_definitions(shape)
    predicting: dict[str, Any] = {}
    for slot in router:
        contract = slot.current.contract
        schemas[f"{contract.model}_input"] = input_schema(contract)
        for path, body in _BODIES.items():
            operation = document["paths"][path]["post"]
            predicting[path.replace("{model}", contract.model)] = {"post": _for_model(operation, contract, body(contract, rows_limit))}
    if predicting:
        document["paths"] = predicting | {path: told for path, told in document["paths"].items() if path not in _BODIES}
    describe(document)
    return document


def _for_model(operation: dict[str, Any], contract: ServingContract, content: dict[str, Any]) -> dict[str, Any]:
    generic = operation["requestBody"]["content"]
    return operation | {
        "summary": f"{operation['summary']}: {contract.model}",
        "description": "\n\n".join(text for text in (contract.description, _answers(contract), operation.get("description", "")) if text),
        "operationId": f"{operation['operationId']}_{contract.model}",
        "parameters": [p for p in operation.get("parameters", []) if p["name"] != "model"],
        "requestBody": {"required": True, "content": {kind: told | content.get(kind, {}) for kind, told in generic.items()}},
    }


def _answers(contract: ServingContract) -> str:
    names = contract.quantile_names
    return f"It answers the quantiles {', '.join(names)}; `prediction` is {names[contract.median]}." if names else ""


def _predict_body(contract: ServingContract, rows_limit: int) -> dict[str, Any]:
    inputs = {"type": "array", "minItems": 1, "maxItems": rows_limit, "items": {"$ref": f"#/components/schemas/{contract.model}_input"}}
    body = {"type": "object", "properties": {"inputs": inputs}, "required": ["inputs"], "additionalProperties": False}
    return {_JSON: {"schema": body, "example": {"inputs": example_inputs(contract)}}}


def _infer_body(contract: ServingContract, rows_limit: int) -> dict[str, Any]:
    return {_JSON: {"example": open_inference.example(contract)}}


def _invocations_body(contract: ServingContract, rows_limit: int) -> dict[str, Any]:
    [row] = example_inputs(contract)
    lines = "\n".join((",".join(row), ",".join(str(value) for value in row.values()), ""))
    return {_JSON: {"example": {"dataframe_records": [row]}}, "text/csv": {"example": lines}}


_JSON = "application/json"
_BODIES: dict[str, Callable[[ServingContract, int], dict[str, Any]]] = {
    "/v1/models/{model}/predict": _predict_body,
    "/v1/models/{model}/invocations": _invocations_body,
    "/v2/models/{model}/infer": _infer_body,
}


def _with_definitions(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}
