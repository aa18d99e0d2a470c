"""From a table of named columns, as other protocols send it, to inputs of our own protocol.

Belongs here: which column is a request field and which a given feature, and JSON as those protocols' clients write it. Does not
belong here: a protocol's own form, checks of values (`inputs` does those, for every protocol alike).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mlplatform.contracts import ServingContract
from serving_app.inputs import GIVEN
from serving_app.problems import FieldError, invalid_input

_NAMED = 10  # of many unknown columns so many are named


def read_json(raw: bytes) -> Any:
    """JSON in which numbers may also be NaN and Infinity, as Python's own encoder writes them. Raises a 422 problem."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(raw.decode(), parse_int=_integer)
        except (ValueError, RecursionError):
            raise invalid_input([FieldError(f"the body is not JSON: {error}")]) from None


def _integer(text: str) -> int | float:
    """As orjson reads it: what 64 bits do not hold is a float, and infinite where that does not hold it either."""
    return int(text) if len(text) < 19 else float(text)


def rows_of(columns: Mapping[str, Sequence[Any]], contract: ServingContract) -> list[dict[str, Any]]:
    """One input for each row of columns of one length; NaN and None are missing values. Raises a 422 problem.

    A name that is both a field and a feature is the field, except in a table of features alone that lacks a required field.
    """
    fields = {f.name for f in contract.fields if f.constant is None}
    features = {f.name for f in contract.features}
    if unknown := [name for name in columns if name not in fields and name not in features]:
        raise invalid_input(
            [FieldError(f"'{n[:64]}' is neither a request field nor a feature of this model", field=n[:64]) for n in unknown[:_NAMED]]
        )
    needed = {f.name for f in contract.fields if f.constant is None and f.required}
    if features >= columns.keys() and not needed <= columns.keys():
        fields = set()
    asked = [name for name in columns if name in fields]
    given = [name for name in columns if name not in fields]
    rows: list[dict[str, Any]] = [dict(zip(asked, row, strict=True)) for row in _rows(columns, asked)]
    if not given:
        return rows
    brought = [{GIVEN: dict(zip(given, row, strict=True))} for row in _rows(columns, given)]
    return [row | more for row, more in zip(rows, brought, strict=True)] if rows else brought


def feature_columns(rows: Sequence[Sequence[Any]], contract: ServingContract) -> dict[str, list[Any]]:
    """Rows of the model's features in the contract's order, as columns by name. Raises a 422 problem."""
    names = [f.name for f in contract.features]
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != len(names):
            raise invalid_input([FieldError(f"must be a list of the model's {len(names)} features, in their order", input=index)])
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _rows(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Any:
    return zip(*([None if isinstance(v, float) and math.isnan(v) else v for v in columns[name]] for name in names), strict=True)
