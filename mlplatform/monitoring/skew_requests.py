"""Served values that follow from the request alone, computed again from the logged inputs.

Belongs here: logged inputs as columns, request-time functions, fields passed on, category codes, the answer itself. Does not
belong here: stored views (`skew_views`), finding the functions. The columns are made as training makes them (from Polars
series), not as the service does, so that a difference between the two is found.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mlplatform.contracts import ContractField, ContractFunction, ServingContract, moment_of
from mlplatform.monitoring.skew_faults import Flags, Floats, Judged, differs, faults_of

Column = npt.NDArray[Any]
Function = Callable[[Mapping[str, Column]], Mapping[str, object]]

# A CUDA device rounds sums and exponentials otherwise in the last bits; features must agree in every bit.
PREDICTION_TOLERANCE = 1e-5

_ZONES = [timedelta(minutes=15 * k) for k in range(-14 * 4, 14 * 4 + 1) if k]
_TYPES: Mapping[str, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "float": pl.Float64(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "timestamp": pl.Datetime("us", "UTC"),
}


def typed_inputs(fields: Sequence[ContractField], inputs: Sequence[Mapping[str, Any]]) -> tuple[pl.DataFrame, Flags]:
    """One column per field, constants included, and which rows could be read (the others are null throughout)."""
    rows: list[dict[str, Any]] = []
    readable = np.ones(len(inputs), dtype=np.bool_)
    for i, row in enumerate(inputs):
        try:
            rows.append({f.name: _typed(f, row.get(f.name) if f.constant is None else _constant(f)) for f in fields})
        except (ValueError, TypeError, OverflowError):
            rows.append({})
            readable[i] = False
    return pl.DataFrame(rows, schema={f.name: _TYPES[f.dtype] for f in fields}), readable


def as_columns(inputs: pl.DataFrame) -> dict[str, Column]:
    """What request-time functions take: times as datetime64[us] in UTC, numbers as they are, a missing one NaN."""
    return {name: inputs[name].to_numpy() for name in inputs.columns}


def judge_function(
    function: ContractFunction, run: Function, given: Mapping[str, Column], features: Mapping[str, str], served: Floats
) -> Judged:
    """`features` maps model inputs, the columns of `served`, to the function's outputs; `given` has its inputs."""
    outputs = tuple(features.values())
    expected = _outputs(run, given, outputs)
    wrong = np.asarray(differs(served, expected).any(axis=1))
    fault = faults_of(len(served))
    fault[wrong] = "request_function_changed"
    fault[_zone_misread(function, run, given, outputs, served, wrong)] = "time_shift"
    return Judged(function.path, tuple(features), fault, served, expected)


def judge_fields(
    contract: ServingContract, inputs: pl.DataFrame, served: Floats, given: Collection[str] = frozenset()
) -> tuple[Judged, ...]:
    """Numeric fields passed on as they are, and categories by their place in the contract; those the contract has and nobody gave.

    `served` has the contract's features, shape (n, features).
    """
    functions = {f.path for f in contract.functions}
    found = []
    own = [(i, f) for i, f in enumerate(contract.features) if f.name not in given]
    passed = [(i, f) for i, f in own if f.kind == "request" and f.source not in functions]
    coded = [(i, f) for i, f in own if f.kind == "category"]
    for name, group, fault in (("request fields", passed, "request_value_differs"), ("categories", coded, "category_differs")):
        if not group:
            continue
        columns = [_number(inputs[f.column]) if f.categories is None else _codes(inputs[f.column], f.categories) for _, f in group]
        stood, expected = served[:, [i for i, _ in group]], np.column_stack(columns)
        faults = faults_of(len(served))
        faults[differs(stood, expected).any(axis=1)] = fault
        found.append(Judged(name, tuple(f.name for _, f in group), faults, stood, expected))
    return tuple(found)


def judge_predictions(predict: Callable[[Floats], Floats], features: Floats, answered: Floats, tolerance: float = 0.0) -> Judged:
    """The model's answers for the logged features, (n, features), beside the logged ones, (n,); `tolerance` as its contract has it."""
    expected = predict(features)
    fault = faults_of(len(answered))
    fault[~(np.abs(expected - answered) <= max(PREDICTION_TOLERANCE, tolerance))] = "prediction_differs"
    return Judged("prediction", ("prediction",), fault, answered[:, None], expected[:, None])


def _outputs(run: Function, given: Mapping[str, Column], names: Sequence[str]) -> Floats:
    answer = run(given)
    return np.column_stack([np.asarray(answer[name], dtype=np.float64) for name in names])


def _zone_misread(
    function: ContractFunction, run: Function, given: Mapping[str, Column], outputs: Sequence[str], served: Floats, wrong: Flags
) -> npt.NDArray[np.intp]:
    """The wrong rows that come out right where the function's times are a time zone's distance away."""
    rows = np.flatnonzero(wrong)
    times = [name for name in function.inputs if given[name].dtype.kind == "M"]
    misread: list[npt.NDArray[np.intp]] = [np.empty(0, dtype=np.intp)]
    for shift in _ZONES if times else ():
        if not len(rows):
            break
        part = {name: given[name][rows] + np.timedelta64(shift) if name in times else given[name][rows] for name in function.inputs}
        right = ~differs(served[rows], _outputs(run, part, outputs)).any(axis=1) & np.isfinite(served[rows]).any(axis=1)
        misread.append(rows[right])
        rows = rows[~right]
    return np.concatenate(misread)


def _number(column: pl.Series) -> Floats:
    return np.asarray(column.cast(pl.Float64).fill_null(np.nan).to_numpy(), dtype=np.float64)


def _codes(column: pl.Series, categories: Sequence[str]) -> Floats:
    codes = pl.Series(np.arange(len(categories), dtype=np.float64), dtype=pl.Float64)
    known = pl.Series(list(categories), dtype=pl.String)
    return _number(column.cast(pl.String).replace_strict(known, codes, default=None, return_dtype=pl.Float64))


def _typed(field: ContractField, value: Any) -> Any:
    """A JSON value as the field's type. Raises ValueError, TypeError or OverflowError where it is none."""
    if value is None:
        return None
    match field.dtype:
        case "timestamp":
            moment = moment_of(value)
            if moment.tzinfo is None:
                raise ValueError(f"{value} has no zone")
            return moment.astimezone(UTC)
        case "date":
            return date.fromisoformat(value)
        case "int":
            if isinstance(value, bool) or value != int(value):
                raise ValueError(f"{value!r} is no integer")
            return int(value)
        case "float":
            if isinstance(value, bool | str):
                raise TypeError(f"{value!r} is no number")
            return float(value)
    if not isinstance(value, str if field.dtype == "string" else bool):
        raise TypeError(f"{value!r} is no {field.dtype}")
    return value


def _constant(field: ContractField) -> Any:
    """A constant is declared as text whatever its type."""
    text = str(field.constant)
    return {"int": lambda t: int(float(t)), "float": float, "bool": lambda t: t.lower() == "true"}.get(field.dtype, str)(text)  # type: ignore[no-any-return,operator]
