"""The shapes of other protocols' bodies, for the OpenAPI document.

Belongs here: what the two protocols' own descriptions say. Does not belong here: validation of inputs (`open_inference`, `scoring`).
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue

DataType = Literal[
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64", "BYTES"
]  # fmt: skip


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    live: bool


class ServerReady(ServerLive):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class TensorMetadata(BaseModel):
    name: str
    datatype: DataType
    shape: list[int] = Field(description="-1: any size")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str] = Field(description="Versions in memory, which may be asked for by number")
    platform: str
    inputs: list[TensorMetadata] = Field(description="The request fields; features may be given in their place")
    outputs: list[TensorMetadata]


class InputTensor(BaseModel):
    name: str = Field(description="A request field, a feature, or `features` for all features in their order")
    datatype: DataType
    shape: list[int] = Field(description="[n] or [n, 1]; [n, features] for `features`", min_length=1, max_length=2)
    data: list[JsonValue] | None = Field(None, description="Flat or nested, row-major; null is a missing number")
    parameters: dict[str, JsonValue] | None = Field(None, description="`binary_data_size`: bytes of it that follow the JSON")


class RequestedOutput(BaseModel):
    name: str
    parameters: dict[str, JsonValue] | None = Field(None, description="`binary_data`: true for binary data")


class InferRequest(BaseModel):
    id: str | None = None
    parameters: dict[str, JsonValue] | None = Field(None, description="`binary_data_output`: true for binary data of all outputs")
    inputs: list[InputTensor] = Field(min_length=1)
    outputs: list[RequestedOutput] | None = Field(None, description="Left out: all of the model's")


class OutputTensor(BaseModel):
    name: str
    datatype: DataType
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str] = Field(
        description="`request_id`, `variant`, and `imputed`: views replaced by defaults in any of the inputs"
    )
    outputs: list[OutputTensor]


class Invocation(BaseModel):
    """One of the four forms of MLflow's scoring protocol."""

    dataframe_split: dict[str, JsonValue] | None = Field(None, description="A pandas frame: `columns` and `data`, a list of rows")
    dataframe_records: list[dict[str, JsonValue]] | None = Field(None, description="One object for each row")
    instances: list[JsonValue] | None = Field(None, description="Objects, or rows of all features in their order")
    inputs: dict[str, JsonValue] | list[JsonValue] | None = Field(None, description="Columns by name, objects, or rows of all features")


class Invoked(BaseModel):
    predictions: list[float] | list[dict[str, float]] = Field(description="For each input a number, or its quantiles by name")
    model_version: int
    variant: str
    request_id: str
    imputed: list[list[str]] = Field(description="For each input the views whose values were replaced by the recorded defaults")
