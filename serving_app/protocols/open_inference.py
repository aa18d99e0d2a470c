"""The Open Inference Protocol, version 2: its requests and answers.

Belongs here: what stands in the bodies. Does not belong here: HTTP (`routes.open_inference`), data types (`tensors`).

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and the Binary Tensor Data Extension
(`tensors`). One input tensor for each request field or given feature, of shape [n] or [n, 1]; or one called `features` (or
`input-0`) of shape [n, features] with all features in the contract's order.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from mlplatform.contracts import ServingContract
from serving_app.predictor import Answer
from serving_app.problems import FieldError, invalid_input
from serving_app.protocols.columns import feature_columns, read_json, rows_of
from serving_app.protocols.tensors import DATATYPES, Tensor, fault, from_bytes, from_json, size_of, to_bytes

EXTENSIONS = ("binary_tensor_data",)
MATRIX = ("features", "input-0")
_TYPES = {"string": "BYTES", "date": "BYTES", "timestamp": "BYTES", "int": "INT64", "float": "FP64", "bool": "BOOL"}


@dataclass(frozen=True)
class WantedOutput:
    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """`outputs` None: all of the model's; `binary`: how those are wanted then."""

    id: str | None
    tensors: list[Tensor]
    outputs: list[WantedOutput] | None
    binary: bool

    def inputs(self, contract: ServingContract) -> list[dict[str, Any]]:
        """The inputs as our own protocol has them. Raises a 422 problem."""
        columns: dict[str, list[Any]] = {}
        for tensor in self.tensors:
            if tensor.name in MATRIX and tensor.name not in {*(f.name for f in contract.fields), *(f.name for f in contract.features)}:
                found = _matrix(tensor, contract)
            elif len(tensor.shape) == 1 or tensor.shape[1] == 1:
                found = {tensor.name: tensor.values}
            else:
                raise fault(tensor.name, f"must have the shape [n] or [n, 1], not {list(tensor.shape)}")
            if twice := columns.keys() & found.keys():
                raise fault(tensor.name, f"gives '{min(twice)[:64]}' a second time")
            columns |= found
        if len(counts := {len(values) for values in columns.values()}) > 1:
            raise invalid_input([FieldError(f"the inputs must have one length, not {sorted(counts)}", field="inputs")])
        if counts == {0}:
            raise invalid_input([FieldError("the tensors must hold at least one row", field="inputs")])
        return rows_of(columns, contract)


def parse_infer(body: bytes, header_length: str | None, rows_limit: int, width: int) -> InferRequest:
    """A request with its tensors decoded. `header_length` as the header `Inference-Header-Content-Length` gives it, `width` the
    model's features. Raises a 422 problem."""
    head, rest = _split(body, header_length)
    told = read_json(head)
    if not isinstance(told, dict) or not isinstance(told.get("inputs"), list) or not told["inputs"]:
        raise invalid_input([FieldError("the body must be an object with a non-empty list of tensors", field="inputs")])
    called = told.get("id")
    if called is not None and not isinstance(called, str):
        raise invalid_input([FieldError("`id` must be a string", field="id")])
    tensors: list[Tensor] = []
    for described in told["inputs"]:
        tensor, rest = _tensor(described, rest, rows_limit * max(width, 1))
        tensors.append(tensor)
    if len(rest):
        raise invalid_input([FieldError(f"{len(rest)} bytes follow the last tensor", field="inputs")])
    binary = _parameters(told, "parameters").get("binary_data_output") is True
    return InferRequest(called, tensors, _outputs(told.get("outputs"), binary), binary)


def infer_answer(answer: Answer, asked: InferRequest, request_id: str) -> tuple[bytes, int | None]:
    """The body, and how long its JSON is where binary data follows. Raises a 422 problem for an output there is not."""
    handle = answer.choice.handle
    produced = _produced(answer)
    wanted = asked.outputs if asked.outputs is not None else [WantedOutput(name, asked.binary) for name in produced]
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for one in wanted:
        if one.name not in produced:
            raise fault(one.name, f"is no output of this model: it has {', '.join(produced)}")
        datatype, values = produced[one.name]
        output: dict[str, Any] = {"name": one.name, "datatype": datatype, "shape": [len(values)]}
        if one.binary:
            tail.append(to_bytes(datatype, values))
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = values
        outputs.append(output)
    imputed = sorted({view for views in answer.scored.imputed for view in views})
    told = {
        "model_name": handle.name,
        "model_version": str(handle.version),
        **({} if asked.id is None else {"id": asked.id}),
        "parameters": {"request_id": request_id, "variant": answer.choice.variant, "imputed": ",".join(imputed)},
        "outputs": outputs,
    }
    head = orjson.dumps(told)
    return b"".join((head, *tail)), len(head) if tail else None


def metadata(contract: ServingContract, versions: list[int]) -> dict[str, Any]:
    """What the protocol calls a model's metadata; inputs are the request fields (features may be given in their place)."""
    fields = [f for f in contract.fields if f.constant is None]
    return {
        "name": contract.model,
        "versions": [str(v) for v in versions],
        "platform": f"mlplatform_{contract.framework}",
        "inputs": [{"name": f.name, "datatype": _TYPES[f.dtype], "shape": [-1]} for f in fields],
        "outputs": [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in _outputs_of(contract).items()],
    }


def example(contract: ServingContract) -> dict[str, Any]:
    """A request that works, from the fields' examples."""
    fields = [f for f in contract.fields if f.constant is None]
    return {"inputs": [{"name": f.name, "datatype": _TYPES[f.dtype], "shape": [1], "data": [f.example]} for f in fields]}


def _outputs_of(contract: ServingContract) -> dict[str, str]:
    decided = {} if contract.threshold is None else {"decision": "BOOL"}
    return {"prediction": "FP32", **dict.fromkeys(contract.quantile_names, "FP32"), **decided, "imputed": "BYTES"}


def _produced(answer: Answer) -> dict[str, tuple[str, list[Any]]]:
    contract = answer.choice.handle.contract
    scored = answer.scored
    values: dict[str, list[Any]] = {
        "prediction": list(scored.predictions),
        "decision": [contract.threshold is not None and p >= contract.threshold for p in scored.predictions],
        "imputed": list(map(",".join, scored.imputed)),
        **{name: [row[place] for row in scored.quantiles or ()] for place, name in enumerate(contract.quantile_names)},
    }
    return {name: (datatype, values[name]) for name, datatype in _outputs_of(contract).items()}


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.isdigit()) or len(header_length) > 18 or int(header_length) > len(body):
        raise invalid_input([FieldError("Inference-Header-Content-Length must be the length of the JSON at the body's start")])
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _tensor(described: object, rest: memoryview, most: int) -> tuple[Tensor, memoryview]:
    """The tensor, and what of the binary data is left after it."""
    if not isinstance(described, dict) or not isinstance(name := described.get("name"), str) or not name:
        raise invalid_input([FieldError("each tensor must be an object with a name", field="inputs")])
    datatype = described.get("datatype")
    if datatype not in DATATYPES:
        raise fault(name, f"`datatype` must be one of {', '.join(DATATYPES)}")
    shape = size_of(name, described.get("shape"), most)
    size = _parameters(described, name).get("binary_data_size")
    if size is None:
        return from_json(name, datatype, shape, described.get("data")), rest
    if "data" in described:
        raise fault(name, "has `data` and `binary_data_size`: one of them is taken")
    if type(size) is not int or size < 0:
        raise fault(name, "`binary_data_size` must be a number of bytes")
    if size > len(rest):
        raise fault(name, f"`binary_data_size` is {size}, and {len(rest)} bytes are left in the body")
    return from_bytes(name, datatype, shape, rest[:size]), rest[size:]


def _outputs(told: object, binary: bool) -> list[WantedOutput] | None:
    if told is None or told == []:
        return None
    if not isinstance(told, list) or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in told):
        raise invalid_input([FieldError("`outputs` must be a list of objects with a name", field="outputs")])
    if len({one["name"] for one in told}) != len(told):
        raise invalid_input([FieldError("`outputs` names an output twice", field="outputs")])
    return [WantedOutput(one["name"], bool(_parameters(one, one["name"]).get("binary_data", binary))) for one in told]


def _parameters(told: dict[str, Any], where: str) -> dict[str, Any]:
    """What stands under `parameters`; those that are not known here say nothing about the prediction and are left alone."""
    found = told.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise fault(where, "`parameters` must be an object")
    return found


def _matrix(tensor: Tensor, contract: ServingContract) -> dict[str, list[Any]]:
    width = len(contract.features)
    if len(tensor.shape) != 2 or tensor.shape[1] != width:
        raise fault(tensor.name, f"must have the shape [n, {width}], one column for each feature, not {list(tensor.shape)}")
    if tensor.datatype in ("BOOL", "BYTES"):
        raise fault(tensor.name, "must hold numbers")
    return feature_columns([tensor.values[at : at + width] for at in range(0, len(tensor.values), width)], contract)
