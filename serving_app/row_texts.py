"""What an answer and a log record say of each row, as JSON, written for a whole batch by columns.

Belongs here: the members that both share, the order they stand in. Does not belong here: what is said once for a request
(`predictor.answer_body`, `log_records`), the figures themselves.

A dictionary for each row, turned to JSON, costs six times as much.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from mlplatform.contracts import ServingContract
from serving_app.features import Assembled


class RowTexts(NamedTuple):
    """A text for each row of a batch, members of a JSON object without its braces and without `input_index`: as the log has them, and as
    the answer has them; and the features, which only the log has: float64 (rows, features), little-endian, not changed any more."""

    logged: Sequence[bytes]
    answered: Sequence[bytes]
    features: npt.NDArray[np.float64]


class RowWriter:
    """Compiled from one contract."""

    def __init__(self, contract: ServingContract) -> None:
        ages = b",".join([_name(view.name) + b"%b" for view in contract.views])
        self._row = b'"prediction":%b,"feature_ages_s":{' + ages + b'},"imputed":%b,"shortfalls":%b'
        self._threshold = contract.threshold
        self._levels = len(contract.quantiles)
        self._by_place = b',"quantiles":[' + b",".join([b"%b"] * self._levels) + b"]"
        self._by_name = b',"quantiles":{' + b",".join([_name(name) + b"%b" for name in contract.quantile_names]) + b"}"

    def write(self, whole: Assembled, predictions: Sequence[float], quantiles: Sequence[Sequence[float]] | None) -> RowTexts:
        """`predictions` (rows,), `quantiles` (rows, levels) where the model answers them."""
        rows = len(predictions)
        imputed, shortfalls = _sparse(whole.imputed, b"[]", rows), _sparse(whole.shortfalls, b"{}", rows)
        columns = [_numbers(predictions), *map(_numbers, whole.ages_s), imputed, shortfalls]
        logged = [self._row % row for row in zip(*columns, strict=True)]
        answered = logged
        if quantiles is not None:
            numbers = _numbers(list(chain.from_iterable(quantiles)))
            levels = list(zip(*[iter(numbers)] * self._levels, strict=True))
            answered = [text + self._by_name % row for text, row in zip(logged, levels, strict=True)]
            logged = [text + self._by_place % row for text, row in zip(logged, levels, strict=True)]
        if self._threshold is None:
            answered = [text + b',"decision":null' for text in answered]
        else:
            decisions = [b',"decision":true' if value >= self._threshold else b',"decision":false' for value in predictions]
            answered = list(map(bytes.__add__, answered, decisions))
        return RowTexts(logged, answered, np.ascontiguousarray(whole.matrix, "<f8"))


def members(told: Mapping[str, Any]) -> bytes:
    """An object's members without its braces, to stand among others."""
    return orjson.dumps(told)[1:-1]


def _name(name: str) -> bytes:
    """A member's name in a template."""
    return orjson.dumps(name).replace(b"%", b"%%") + b":"


def _numbers(values: Any) -> list[bytes]:
    """Each number as JSON has it: the shortest decimal that is this float64; NaN is null."""
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _sparse(told: Mapping[int, Any], usual: bytes, rows: int) -> list[bytes]:
    """What few rows have, and the others do not."""
    texts = [usual] * rows
    for row, value in told.items():
        texts[row] = orjson.dumps(value)
    return texts
