"""Tensors of the Open Inference Protocol, to and from Python values.

Belongs here: data types, shapes, JSON and binary data. Does not belong here: requests, models.

Source: Open Inference Protocol, HTTP/REST, "Tensor Data" and "Tensor Data Types"
(github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md); Binary Tensor Data Extension
(github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md): little-endian, row-major, BOOL one byte,
a BYTES element its length in four bytes and then the bytes.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving_app.problems import FieldError, ProblemError, invalid_input

INTEGERS = {f"{sign}INT{bits}": np.dtype(f"<{sign.lower() or 'i'}{bits // 8}") for sign in ("", "U") for bits in (8, 16, 32, 64)}
FLOATS = {f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)}
_BOOL = np.dtype("?")
DATATYPES = ("BOOL", *INTEGERS, *FLOATS, "BYTES")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """`values` in row-major order: bool, int, float or str. An FP value is one its type can hold; a missing one is NaN."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


def fault(name: str, detail: str) -> ProblemError:
    """A refusal that names the tensor (or output) in its text: the protocol's clients see nothing else of it."""
    return invalid_input([FieldError(f"'{name[:64]}': {detail}", field=name[:64])])


def size_of(name: str, shape: object, most: int) -> tuple[int, ...]:
    """A checked shape of at most `most` elements."""
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n >= 0 for n in shape):
        raise fault(name, "`shape` must be a list of sizes")
    if len(shape) > 2:
        raise fault(name, f"has {len(shape)} dimensions; at most 2 are taken")
    if math.prod(shape) > most:
        raise fault(name, f"has more than {most} elements")
    return tuple(shape)


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> Tensor:
    """`data` flat or nested as the shape. Raises a 422 problem."""
    values = _flat(name, shape, data)
    if len(values) != math.prod(shape):
        raise fault(name, f"has {len(values)} elements, its shape says {math.prod(shape)}")
    if datatype == "BYTES":
        _all(name, values, (str,), "strings")
        return Tensor(name, datatype, shape, values)
    if datatype == "BOOL":
        _all(name, values, (bool,), "true or false")
        return Tensor(name, datatype, shape, values)
    if datatype in INTEGERS:
        _all(name, values, (int,), "integers")
        limits = np.iinfo(INTEGERS[datatype])
        if values and not (limits.min <= min(values) and max(values) <= limits.max):
            raise fault(name, f"holds a number that is no {datatype}")
        return Tensor(name, datatype, shape, values)
    _all(name, values, (int, float, type(None)), "numbers, or null for a missing one")
    with np.errstate(over="ignore"):  # what its type cannot hold is infinite, and refused as such where it is used
        numbers = np.array([math.nan if v is None else v for v in values], dtype=np.float64).astype(FLOATS[datatype])
    return Tensor(name, datatype, shape, numbers.tolist())


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> Tensor:
    """Raises a 422 problem."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, _strings(name, count, raw))
    dtype = INTEGERS.get(datatype) or FLOATS.get(datatype) or _BOOL
    if len(raw) != count * dtype.itemsize:
        raise fault(name, f"has {len(raw)} bytes, {count} elements of {datatype} are {count * dtype.itemsize}")
    if datatype == "BOOL" and count and max(raw) > 1:
        raise fault(name, "holds a byte that is neither 0 nor 1, so no BOOL")
    return Tensor(name, datatype, shape, np.frombuffer(raw, dtype=dtype).tolist())


def to_bytes(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(raw)) + raw for raw in (text.encode() for text in values))
    return np.array(values, dtype=INTEGERS.get(datatype) or FLOATS.get(datatype) or _BOOL).tobytes()


def _strings(name: str, count: int, raw: memoryview) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(raw) and len(found) < count:
        end = at + _LENGTH.size
        if end > len(raw) or (last := end + _LENGTH.unpack(raw[at:end])[0]) > len(raw):
            raise fault(name, f"element {len(found)} ends after its data")
        try:
            found.append(str(raw[end:last], "utf-8"))
        except UnicodeDecodeError:
            raise fault(name, f"element {len(found)} is not UTF-8") from None
        at = last
    if len(found) != count or at != len(raw):
        raise fault(name, f"its {len(raw)} bytes are not {count} elements of BYTES")
    return found


def _flat(name: str, shape: tuple[int, ...], data: object) -> list[Any]:
    if not isinstance(data, list):
        raise fault(name, "`data` must be a list, or `binary_data_size` its size in the body")
    if len(shape) != 2 or not data or not isinstance(data[0], list):
        return data
    if len(data) != shape[0] or not all(isinstance(row, list) and len(row) == shape[1] for row in data):
        raise fault(name, f"`data` is nested otherwise than its shape {list(shape)}")
    return [value for row in data for value in row]


def _all(name: str, values: list[Any], kinds: tuple[type, ...], said: str) -> None:
    if not {type(v) for v in values} <= set(kinds):
        raise fault(name, f"its elements must be {said}")
