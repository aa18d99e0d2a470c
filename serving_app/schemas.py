"""The shapes of the REST API.

Belongs here: response models. Does not belong here: the document with each model's own fields (`openapi`), validation of inputs
(`inputs` does that column-wise; no pydantic object per feature).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving_app.features import Reason
from serving_app.problems import MEDIA_TYPE


class Explanation(BaseModel):
    """TreeSHAP contributions: `base` and all of `contributions` add up to the margin, whose logistic function is the prediction."""

    base: float = Field(description="The model's expectation over its training rows")
    contributions: dict[str, float] = Field(description="What each feature added to it for this input")
    features: dict[str, float | None] = Field(description="The value used of each feature; null: missing")
    unit: Literal["log-odds"]


class Prediction(BaseModel):
    request_id: str = Field(description="Identifies this request in logs and in the prediction log")
    input_index: int = Field(description="Position of the input in the request")
    prediction: float = Field(description="Probability of the positive class; the median, where the model answers quantiles")
    quantiles: dict[str, float] | None = Field(None, description="Where the model answers quantiles: each by its name, as `p10`")
    decision: bool | None = Field(description="Whether the prediction reaches the model's threshold; null where it declares none")
    model_version: int
    variant: str = Field(description="Which of the versions that share the traffic answered")
    feature_ages_s: dict[str, float | None] = Field(description="Age of each view's value in seconds; null where none was found")
    imputed: list[str] = Field(description="Views whose values were missing or too old and were replaced by the recorded defaults")
    shortfalls: dict[str, Reason] = Field(description="Views without a value as it should be, and why")
    features: dict[str, float | None] | None = Field(None, description="Where asked for: the value used of each feature; null: missing")
    explanation: Explanation | None = Field(None, description="Where asked for: what each feature added")


class PredictResponse(BaseModel):
    model: str
    version: int
    threshold: float | None
    predictions: list[Prediction]


class PredictOptions(BaseModel):
    """Query parameters; others are refused."""

    model_config = ConfigDict(extra="forbid")

    explain: bool = Field(False, description="Tell for each input what each feature added to the prediction (TreeSHAP)")
    features: bool = Field(False, description="Tell for each input the value used of each feature")


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
    error: str | None = Field(None, description="The detail again, where clients of the Open Inference Protocol look for it")
    error_code: str | None = Field(None, description="MLflow's name for the status, under /invocations")
    message: str | None = Field(None, description="The detail again, under /invocations")


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
    quantiles: list[str] = Field(description="The quantiles in an answer, by name; empty: it is a probability")
    input_schema: dict[str, Any] = Field(description="JSON Schema of one input")
    example: dict[str, Any] = Field(description="A request body that works")
    features: list[str] = Field(description="The model's inputs in their order")
    views: list[ViewDetail]
    versions: list[ServedVersion]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these problem statuses."""
    reference = {"$ref": "#/components/schemas/ProblemDetail"}
    return {s: {"description": "Problem details (RFC 9457)", "content": {MEDIA_TYPE: {"schema": reference}}} for s in statuses}
