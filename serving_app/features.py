"""From checked inputs and stored values to the model's feature matrix, with the age of every view and what was imputed.

Belongs here: keys to read, ages against the declared limits, request-time functions, the order of the columns.
Does not belong here: reading Redis (the batcher awaits that), predicting.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlplatform.contracts import ContractFeature, ContractView, ServingContract
from mlplatform.feature_store.codec import Decoded, JoinValue
from mlplatform.feature_store.reader import Request, ViewLayout
from serving_app import request_functions
from serving_app.inputs import Column, ParsedInputs

Floats = npt.NDArray[np.float64]
Missing = str  # why a view has no usable value: missing | expired | unreachable | unreadable


class Unreadable(Enum):
    """Stands where a value is stored that was packed for another version of the view."""

    VALUE = 0


# What a read found under one key.
Found = Decoded | Unreadable | None


class PlanError(ValueError):
    """The contract does not add up: a feature, function or view names something that is not there."""


class FunctionOutputError(RuntimeError):
    """A request-time function answered with something that is not one number per row."""


@dataclass(frozen=True)
class KeyPlan:
    """The distinct reads of a batch, and where each row finds its own: `rows[view]` int of shape (n,), -1 without a key."""

    reads: list[Request]
    rows: dict[str, npt.NDArray[np.intp]]


@dataclass
class Assembled:
    """Features of a batch, float64 of shape (rows, features) in the contract's order, and their honesty per row."""

    matrix: Floats
    ages_s: list[dict[str, float | None]]
    imputed: list[tuple[str, ...]]
    # (row, view, why) of values that the contract says to refuse rather than to replace.
    refused: list[tuple[int, str, Missing]]
    # (view, why) -> rows, for the metrics
    shortfalls: dict[tuple[str, Missing], int] = field(default_factory=dict)


@dataclass(frozen=True)
class _ViewPlan:
    view: ContractView
    layout: ViewLayout
    defaults: Floats
    # Columns of the view that the model takes, and where they go.
    source: npt.NDArray[np.intp]
    target: npt.NDArray[np.intp]

    def filled(self, values: Floats) -> Floats:
        """A stored null is the declared default, as in the training set."""
        return values if self.bare else np.where(np.isnan(values), self.defaults, values)

    @cached_property
    def bare(self) -> bool:
        """No feature has a default."""
        return bool(np.isnan(self.defaults).all())


@dataclass
class _Looked:
    """A view's values for the distinct keys of a batch; the last slot stands for rows without a key."""

    values: Floats
    ages: list[float | None]
    why: list[Missing | None]


class FeaturePlan:
    """Compiled from one contract, once per model version. Raises PlanError or FunctionRefusedError."""

    def __init__(self, contract: ServingContract) -> None:
        self.project = contract.project
        self._width = len(contract.features)
        self._dtypes = {f.name: f.dtype for f in contract.fields}
        self._functions = tuple((f, request_functions.resolve(f)) for f in contract.functions)
        self._views = tuple(self._view_plan(v, contract.features) for v in contract.views)
        self._direct, self._encoded = self._other_features(contract)
        self._function_views = self._functions_sources(contract)

    def _view_plan(self, view: ContractView, features: tuple[ContractFeature, ...]) -> _ViewPlan:
        for key in view.join_keys:
            if self._dtypes.get(key) not in ("string", "int"):
                raise PlanError(f"view {view.name} joins on '{key}', which is not a string or int field of the contract")
        if unknown := set(view.defaults) - set(view.features):
            raise PlanError(f"view {view.name} has defaults for features it does not hold: {sorted(unknown)}")
        position = {name: i for i, name in enumerate(view.features)}
        taken = [(i, f.column) for i, f in enumerate(features) if f.kind == "view" and f.source == view.name]
        if unknown := {column for _, column in taken} - set(position):
            raise PlanError(f"view {view.name} does not hold {sorted(unknown)}")
        defaults = [view.defaults.get(name) for name in view.features]
        return _ViewPlan(
            view,
            ViewLayout.declare(view.name, view.join_keys, view.features, timedelta(seconds=max(view.ttl_s, 0))),
            np.array([math.nan if d is None else d for d in defaults], dtype=np.float64),
            np.array([position[column] for _, column in taken], dtype=np.intp),
            np.array([i for i, _ in taken], dtype=np.intp),
        )

    def _other_features(self, contract: ServingContract) -> tuple[list[tuple[int, str, str]], list[tuple[int, str, dict[str, int]]]]:
        """(position, function or '', column) of numeric request features; (position, field, code per category) of categories."""
        views = {v.name for v in contract.views}
        outputs = {f.path: set(f.outputs) for f in contract.functions}
        direct: list[tuple[int, str, str]] = []
        encoded: list[tuple[int, str, dict[str, int]]] = []
        for i, feature in enumerate(contract.features):
            if feature.kind == "view":
                if feature.source not in views:
                    raise PlanError(f"feature {feature.name} comes from the view {feature.source}, which the contract does not hold")
            elif feature.kind == "category":
                if feature.column not in self._dtypes or feature.categories is None:
                    raise PlanError(f"category {feature.name} needs a request field and its categories")
                encoded.append((i, feature.column, {value: code for code, value in enumerate(feature.categories)}))
            elif feature.source in outputs:
                if feature.column not in outputs[feature.source]:
                    raise PlanError(f"feature {feature.name}: {feature.source} does not give '{feature.column}'")
                direct.append((i, feature.source, feature.column))
            elif self._dtypes.get(feature.column) in ("int", "float", "bool"):
                direct.append((i, "", feature.column))
            else:
                raise PlanError(f"feature {feature.name}: '{feature.column}' is neither an output of {feature.source} nor a numeric field")
        return direct, encoded

    def _functions_sources(self, contract: ServingContract) -> dict[str, tuple[str, int]]:
        """The stored features that functions take, besides request fields: name -> (view, column). Names must be unmistakable."""
        holders: dict[str, list[tuple[str, int]]] = {}
        for view in contract.views:
            for i, name in enumerate(view.features):
                holders.setdefault(name, []).append((view.name, i))
                holders.setdefault(f"{view.name}__{name}", []).append((view.name, i))
        taken: dict[str, tuple[str, int]] = {}
        for function in contract.functions:
            for name in set(function.inputs) - set(self._dtypes):
                if len(holders.get(name, [])) != 1:
                    raise PlanError(f"{function.path} takes '{name}', which {'several views hold' if name in holders else 'nothing gives'}")
                taken[name] = holders[name][0]
        return taken

    @property
    def views(self) -> tuple[ContractView, ...]:
        return tuple(p.view for p in self._views)

    def keys(self, batches: Sequence[ParsedInputs]) -> KeyPlan:
        """What to read for all rows and views, each value once: a hundred flights from one airport read its weather once."""
        reads: list[Request] = []
        rows: dict[str, npt.NDArray[np.intp]] = {}
        for plan in self._views:
            fields = plan.layout.join_keys
            seen: dict[tuple[JoinValue, ...], int] = {}
            positions: list[int] = []
            for batch in batches:
                joined = zip(*(batch.values[f] for f in fields), strict=True) if fields else [()] * batch.rows
                for values in joined:
                    position = -1 if None in values else seen.get(values)
                    if position is None:
                        position = seen[values] = len(reads)
                        reads.append((plan.layout, values))
                    positions.append(position)
            rows[plan.view.name] = np.array(positions, dtype=np.intp)
        return KeyPlan(reads, rows)

    def assemble(self, columns: dict[str, Column], plan: KeyPlan, found: Sequence[Found] | None, now_us: int) -> Assembled:
        """The feature matrix. `found` in the order of `plan.reads`, None where the store is away; `now_us` UTC microseconds."""
        rows = len(next(iter(columns.values())))
        out = Assembled(np.full((rows, self._width), np.nan), [{} for _ in range(rows)], [()] * rows, [])
        stored: dict[str, Floats] = {}
        for view in self._views:
            positions = plan.rows[view.view.name] if found is not None else np.full(rows, -1, dtype=np.intp)
            looked = _look_up(view, positions, found, now_us)
            picked = looked.values[positions]
            stored[view.view.name] = picked
            out.matrix[:, view.target] = picked[:, view.source]
            _tell(out, view.view, positions, looked)
        given: dict[str, Column] = columns | {name: stored[view][:, i] for name, (view, i) in self._function_views.items()}
        computed = self._run_functions(given, rows)
        for i, path, name in self._direct:
            out.matrix[:, i] = computed[path, name] if path else columns[name]
        for i, name, codes in self._encoded:
            out.matrix[:, i] = [codes.get(_category(v), math.nan) for v in columns[name].tolist()]
        return out

    def _run_functions(self, given: Mapping[str, Column], rows: int) -> dict[tuple[str, str], Floats]:
        computed: dict[tuple[str, str], Floats] = {}
        for declared, function in self._functions:
            answer = function({name: given[name] for name in declared.inputs})
            for name in declared.outputs:
                try:
                    column = np.asarray(answer[name], dtype=np.float64)
                except (KeyError, TypeError, ValueError) as error:
                    raise FunctionOutputError(f"{declared.path} did not give numbers for '{name}'") from error
                if column.shape != (rows,):
                    raise FunctionOutputError(
                        f"{declared.path} gave '{name}' in the shape {column.shape}, not one number for each of {rows} rows"
                    )
                computed[declared.path, name] = column
        return computed


def _category(value: Any) -> str:
    # Trained on text: 7 and 7.0 are the category "7".
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _look_up(plan: _ViewPlan, positions: npt.NDArray[np.intp], found: Sequence[Found] | None, now_us: int) -> _Looked:
    slots = (0 if found is None else len(found)) + 1
    looked = _Looked(
        np.empty((slots, len(plan.view.features))), [None] * slots, ["missing" if found is not None else "unreachable"] * slots
    )
    looked.values[-1] = plan.defaults
    for slot in set(positions.tolist()) - {-1}:
        value = None if found is None else found[slot]
        if not isinstance(value, Decoded):
            looked.why[slot] = "missing" if value is None else "unreadable"
            looked.values[slot] = plan.defaults
            continue
        expired = plan.layout.state(value, now_us) == "expired"
        looked.ages[slot] = plan.layout.age_us(value, now_us) / 1e6
        looked.why[slot] = "expired" if expired else None
        looked.values[slot] = plan.defaults if expired and plan.view.on_stale == "impute" else plan.filled(value.values)
    return looked


def _tell(out: Assembled, view: ContractView, positions: npt.NDArray[np.intp], looked: _Looked) -> None:
    """Writes each row's age, and whether the view's values were replaced or have to be refused."""
    name = view.name
    for row, slot in enumerate(positions.tolist()):
        out.ages_s[row][name] = looked.ages[slot]
        why = looked.why[slot]
        if why is None:
            continue
        out.shortfalls[name, why] = out.shortfalls.get((name, why), 0) + 1
        if view.on_stale == "refuse":
            out.refused.append((row, name, why))
        elif not (why == "expired" and view.on_stale == "serve"):
            out.imputed[row] = (*out.imputed[row], name)
