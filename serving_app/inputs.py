"""From a request's JSON to columns: each field checked against the model version's contract, every fault named by input and field.

Belongs here: parsing and validation of request fields. Does not belong here: features, HTTP.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from mlplatform.contracts import ContractField, ServingContract, moment_of
from serving_app.problems import FieldError, invalid_input

Column = npt.NDArray[Any]
GIVEN = "features"  # the key of an input under which features may be given instead of looked up or computed
_NOTHING: Mapping[str, Any] = {}
MAX_ERRORS = 100  # a body of a thousand bad rows is answered with the first hundred faults
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Calendars of time zones fail at the ends of what a datetime holds; no question is asked that far away.
_FIRST_US = (datetime(1900, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_END_US = (datetime(2200, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_FLOAT32_MAX = float(np.finfo(np.float32).max)  # models compute in float32: more than that would silently become infinite
_INT64_MAX = 2**63 - 1
_MANY = 8  # from so many inputs on a look at whole columns costs less than one at each value


class FieldFaultError(ValueError):
    """A value that the contract does not allow; the message is for the caller."""


def _bounded(value: float, field: ContractField) -> None:
    if field.minimum is not None and value < field.minimum:
        raise FieldFaultError(f"must be at least {field.minimum:g}")
    if field.maximum is not None and value > field.maximum:
        raise FieldFaultError(f"must be at most {field.maximum:g}")


def _limits(field: ContractField) -> tuple[float, float]:
    """Between these a number needs no further look. The ends of int64 are not float64s: 2**53 is far enough."""
    widest = float(2**53) if field.dtype == "int" else _FLOAT32_MAX
    low = -widest if field.minimum is None else max(field.minimum, -widest)
    return low, widest if field.maximum is None else min(field.maximum, widest)


def _string(value: object, field: ContractField) -> str:
    if not isinstance(value, str):
        raise FieldFaultError("must be a string")
    if not value:
        raise FieldFaultError("must not be empty")
    if len(value) > field.max_length:
        raise FieldFaultError(f"must have at most {field.max_length} characters")
    return value


def _int(value: object, field: ContractField) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and not value.is_integer()):
        raise FieldFaultError("must be an integer")
    if abs(value) > _INT64_MAX:
        raise FieldFaultError("is beyond a 64-bit integer")
    _bounded(value, field)
    return int(value)


def _float(value: object, field: ContractField) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldFaultError("must be a number")
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise FieldFaultError("must be a finite number")
    _bounded(value, field)
    return float(value)


def _bool(value: object, field: ContractField) -> bool:
    if not isinstance(value, bool):
        raise FieldFaultError("must be true or false")
    return value


def _timestamp(value: object, field: ContractField) -> int:
    """Microseconds since 1970, UTC."""
    if not isinstance(value, str):
        raise FieldFaultError("must be an ISO 8601 date and time with its zone, such as 2013-09-01T10:30:00Z")
    try:
        moment = moment_of(value)
    except ValueError:
        raise FieldFaultError("is not an ISO 8601 date and time") from None
    if moment.tzinfo is None:
        raise FieldFaultError("must carry its zone: end it with Z or an offset such as -05:00")
    micros = (moment - _EPOCH) // _MICROSECOND
    if not _FIRST_US <= micros < _END_US:
        raise FieldFaultError("must lie between the years 1900 and 2200")
    return micros


def _date(value: object, field: ContractField) -> str:
    if not isinstance(value, str):
        raise FieldFaultError("must be a date, YYYY-MM-DD")
    try:
        day = date.fromisoformat(value)
    except ValueError:
        raise FieldFaultError("is not a date, YYYY-MM-DD") from None
    if not 1900 <= day.year < 2200:
        raise FieldFaultError("must lie between the years 1900 and 2200")
    return day.isoformat()


_PARSERS: Mapping[str, Callable[[object, ContractField], Any]] = {
    "string": _string,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "timestamp": _timestamp,
    "date": _date,
}


def _column(values: list[Any], dtype: str) -> Column:
    """NumPy column as Polars' `to_numpy` would give it in training; absent optional values are None, NaN or NaT."""
    absent = None in values
    if dtype == "timestamp":
        return np.array([np.iinfo(np.int64).min if v is None else v for v in values], dtype=np.int64).view("datetime64[us]")
    if dtype == "date":
        return np.array(["NaT" if v is None else v for v in values], dtype="datetime64[D]")
    if dtype == "float" or (dtype == "int" and absent):
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    if dtype == "int":
        return np.array(values, dtype=np.int64)
    if dtype == "bool" and not absent:
        return np.array(values, dtype=np.bool_)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


@dataclass(frozen=True)
class Given:
    """Features that stood in the request: `values` float64 and `mask` of shape (rows, features), in the contract's order."""

    values: npt.NDArray[np.float64]
    mask: npt.NDArray[np.bool_]


@dataclass(slots=True)  # not frozen: there is one for each request
class ParsedInputs:
    """Checked inputs: `received` as sent, `values` per field in input order (timestamps as microseconds)."""

    received: list[dict[str, Any]]
    values: dict[str, list[Any]]
    rows: int
    given: Given | None = None


class InputParser:
    """Checks inputs against one contract. Built once per model version. Raises ValueError where the contract names no usable fields."""

    def __init__(self, contract: ServingContract) -> None:
        if any(f.name == GIVEN for f in contract.fields):
            raise ValueError(f"a request field may not be called '{GIVEN}': features given in a request stand under it")
        self._asked = tuple(f for f in contract.fields if f.constant is None)
        self._constants = {f.name: f for f in contract.fields if f.constant is not None}
        self._dtypes = {f.name: f.dtype for f in contract.fields}
        self._names = frozenset(f.name for f in self._asked)
        self._plan = tuple((f.name, f, _PARSERS[f.dtype], *_limits(f)) for f in self._asked)
        # A constant is declared as text whatever its type; it is parsed once, here, so that a bad one refuses the version.
        self._filled = {name: _constant_value(f) for name, f in self._constants.items()}
        self._features = {f.name: (i, f.categories) for i, f in enumerate(contract.features)}
        self._dependents = field_dependents(contract)
        # Stands in where a field was left out because nothing that follows from it is used.
        self._examples = {f.name: _example_value(f) for f in self._asked}

    def parse(self, inputs: object, rows_limit: int) -> ParsedInputs:
        """`inputs` is what stood in the body. Raises a 422 problem that names input and field."""
        if not isinstance(inputs, list) or not inputs:
            raise invalid_input([FieldError("'inputs' must be a non-empty list of objects", field="inputs")])
        if len(inputs) > rows_limit:
            raise invalid_input([FieldError(f"at most {rows_limit} inputs are taken in one request, got {len(inputs)}", field="inputs")])
        values = self._parse_columns(inputs) if len(inputs) >= _MANY else None
        given = None
        if values is None:
            values, given = self._parse_rows(inputs)
        for name, value in self._filled.items():
            values[name] = [value] * len(inputs)
        return ParsedInputs(inputs, values, len(inputs), given)

    def _parse_columns(self, inputs: list[Any]) -> dict[str, list[Any]] | None:
        """Plain inputs, where each field is there in its JSON type and within its bounds; None where a closer look is needed."""
        if set(map(type, inputs)) != {dict} or set(map(len, inputs)) != {len(self._plan)}:
            return None
        values: dict[str, list[Any]] = {}
        for name, field, parse, low, high in self._plan:
            try:
                column = [row[name] for row in inputs]
            except KeyError:
                return None
            if parse is _string:
                plain = set(map(type, column)) == {str} and "" not in column and max(map(len, column)) <= field.max_length
            elif parse is _int or parse is _float:
                plain = set(map(type, column)) == {int if parse is _int else float} and low <= min(column) and max(column) <= high
            else:
                plain = False
            if not plain:
                try:
                    column = [parse(value, field) for value in column]
                except FieldFaultError:
                    return None
            values[name] = column
        return values

    def _parse_rows(self, inputs: list[Any]) -> tuple[dict[str, list[Any]], Given | None]:
        errors: list[FieldError] = []
        values: dict[str, list[Any]] = {name: [] for name in self._names}
        given: Given | None = None
        for index, row in enumerate(inputs):
            if isinstance(row, dict) and GIVEN in row:
                if given is None:
                    shape = (len(inputs), len(self._features))
                    given = Given(np.full(shape, np.nan), np.zeros(shape, np.bool_))
                self._parse_given(index, row, values, given, errors)
            else:
                self._parse_row(index, row, values, errors)
            if len(errors) >= MAX_ERRORS:
                break
        if errors:
            raise invalid_input(errors[:MAX_ERRORS])
        return values, given

    def _parse_given(self, index: int, row: dict[str, Any], values: dict[str, list[Any]], given: Given, errors: list[FieldError]) -> None:
        """An input that brings features along: fields that only they would need may be left out."""
        features = row[GIVEN]
        if not isinstance(features, dict):
            errors.append(FieldError("must be an object of feature names and numbers", input=index, field=GIVEN))
            return
        for name, value in features.items():
            known = self._features.get(name)
            if known is None:
                errors.append(FieldError("is not a feature of this model", input=index, field=f"{GIVEN}.{name[:64]}"))
                continue
            try:
                given.values[index, known[0]] = _feature(value, known[1])
            except FieldFaultError as fault:
                errors.append(FieldError(str(fault), input=index, field=f"{GIVEN}.{name}"))
            given.mask[index, known[0]] = True
        spared = {
            name: self._examples[name]
            for name in self._names
            if row.get(name) is None and (needed := self._dependents[name]) and given.mask[index, list(needed)].all()
        }
        rest = {name: value for name, value in row.items() if name != GIVEN and name not in spared}
        self._parse_row(index, rest, values, errors, spared)

    def _parse_row(
        self, index: int, row: object, values: dict[str, list[Any]], errors: list[FieldError], spared: Mapping[str, Any] = _NOTHING
    ) -> None:
        if not isinstance(row, dict):
            errors.append(FieldError("must be an object with the model's fields", input=index))
            return
        known = 0
        for name, field, parse, low, high in self._plan:
            value = row.get(name)
            if type(value) is int and parse is _int and low <= value <= high:  # most numbers; the rest is looked at closely
                known += 1
                values[name].append(value)
                continue
            known += name in row
            if value is None:
                if name in spared:
                    values[name].append(spared[name])
                    continue
                if field.required:
                    errors.append(FieldError("is required" if name not in row else "must not be null", input=index, field=name))
                values[name].append(None)
                continue
            try:
                values[name].append(parse(value, field))
            except FieldFaultError as fault:
                errors.append(FieldError(str(fault), input=index, field=name))
        if known != len(row):
            for name in row.keys() - self._names:
                reason = "is filled in by the service: leave it out" if name in self._constants else "is not a field of this model"
                errors.append(FieldError(reason, input=index, field=name))

    def columns(self, batches: list[ParsedInputs], names: Iterable[str]) -> dict[str, Column]:
        """One column for each of these fields over all requests of a batch, in order."""
        return {
            name: _column(
                [v for batch in batches for v in batch.values[name]] if len(batches) > 1 else batches[0].values[name], self._dtypes[name]
            )
            for name in names
        }


def field_dependents(contract: ServingContract) -> dict[str, frozenset[int]]:
    """For each request field the positions of the features that follow from it, by itself, by a function or as a join key."""
    joined = {v.name: set(v.join_keys) for v in contract.views}
    held: dict[str, set[str]] = {}
    for view in contract.views:
        for name in view.features:
            for text in (name, f"{view.name}__{name}"):
                held.setdefault(text, set()).add(view.name)
    taken: dict[str, set[str]] = {}
    for function in contract.functions:
        views = {view for name in function.inputs for view in held.get(name, ())}
        taken[function.path] = set(function.inputs) | {key for view in views for key in joined[view]}
    found: dict[str, set[int]] = {f.name: set() for f in contract.fields}
    for i, feature in enumerate(contract.features):
        needed = joined.get(feature.source, set()) if feature.kind == "view" else taken.get(feature.source, {feature.column})
        for name in needed & found.keys():
            found[name].add(i)
    return {name: frozenset(places) for name, places in found.items()}


def _feature(value: object, categories: tuple[str, ...] | None) -> float:
    """A feature given in a request: a number, null for a missing one, or the text of a category (missing where unknown)."""
    if value is None:
        return math.nan
    if isinstance(value, str) and categories is not None:
        return float(categories.index(value)) if value in categories else math.nan
    kind = "a number or null" if categories is None else f"a category, its number (0 to {len(categories) - 1}) or null"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldFaultError(f"must be {kind}")
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise FieldFaultError("must be a finite number")
    if categories is not None and value not in range(len(categories)):
        raise FieldFaultError(f"must be {kind}")
    return float(value)


def _example_value(field: ContractField) -> Any:
    try:
        return _PARSERS[field.dtype](field.example, field)
    except FieldFaultError as fault:
        raise FieldFaultError(f"field {field.name}: its own example {fault}") from fault


def _constant_value(field: ContractField) -> Any:
    text: Any = field.constant
    if field.dtype in ("int", "float"):
        text = float(text)
    elif field.dtype == "bool":
        text = {"true": True, "false": False}[str(text).lower()]
    return _PARSERS[field.dtype](text, field)
