"""From checked inputs and stored values to the model's feature matrix, with the age of every view and what was imputed.

Belongs here: keys to read, ages against the declared limits, request-time functions, the order of the columns.
Does not belong here: reading Redis (the batcher awaits that), predicting. All by columns: a batch costs some eighty NumPy
operations however many rows it has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlplatform.contracts import ContractFeature, ContractView, ServingContract
from mlplatform.feature_store.codec import Block, JoinValue, empty_block, entity_part, entity_parts
from mlplatform.feature_store.reader import CLOCK_TOLERANCE_US, Asked, ViewLayout
from serving_app import request_functions
from serving_app.inputs import Column, Given, ParsedInputs

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]
# Why a view has no usable value; the first three also say why a read found none.
Reason = Literal["missing", "unreadable", "unreachable", "expired", "future"]


class PlanError(ValueError):
    """The contract does not add up: a feature, function or view names something that is not there."""


class FunctionOutputError(RuntimeError):
    """A request-time function raised, or answered with something that is not one number per row. The message holds no value."""


@dataclass(frozen=True)
class Found:
    """What a read found for a view's entities, and why there is nothing where the block holds nothing.

    With `unreachable` the store was not read: what the block holds is remembered, and a newer value may be there.
    """

    block: Block
    absent: Reason = "missing"


@dataclass(frozen=True)
class KeyPlan:
    """The distinct reads of a batch: `asked[i]` of the plan's view i, and where each of the `rows` finds its own.

    `places[i]` has the shape (rows,), -1 for a row without a key; None where every row has an entity of its own, in order.
    `given` are the features that stood in the requests; `spared[i]` marks the rows for which view i is not looked at for them.
    """

    rows: int
    asked: list[Asked]
    places: list[Positions | None]
    given: Given | None = None
    spared: list[npt.NDArray[np.bool_]] = field(default_factory=list)


@dataclass
class Assembled:
    """Features of a batch, float64 of shape (rows, features) in the contract's order, and their honesty.

    `at_us` is the moment of the batch. `ages_s[i]` has each row's age of the plan's view i, float64 (rows,), NaN where no value was found.
    """

    at_us: int
    matrix: Floats
    ages_s: list[Floats]
    # row -> view -> why; only rows and views whose value was not there as it should be
    shortfalls: dict[int, dict[str, Reason]] = field(default_factory=dict)
    # row -> views whose values were replaced by defaults
    imputed: dict[int, list[str]] = field(default_factory=dict)
    # (row, view, why) of values that the contract says to refuse rather than to replace
    refused: list[tuple[int, str, Reason]] = field(default_factory=list)


@dataclass(frozen=True)
class _ViewPlan:
    view: ContractView
    layout: ViewLayout
    defaults: Floats
    bare: bool  # no feature has a default
    # Columns of the view that the model takes, and where they go.
    source: Positions | slice
    target: Positions | slice
    # The model's features that follow from the view: its own, and those of functions that take from it.
    dependents: Positions


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
        self._keys = tuple(sorted({key for plan in self._views for key in plan.layout.join_keys}))
        self.views = tuple(p.view for p in self._views)

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
        named = [view.defaults.get(name) for name in view.features]
        defaults = np.array([math.nan if d is None else d for d in named], dtype=np.float64)
        return _ViewPlan(
            view,
            ViewLayout.declare(view.name, view.join_keys, view.features, timedelta(seconds=max(view.ttl_s, 0))),
            defaults,
            bool(np.isnan(defaults).all()),
            _columns([position[column] for _, column in taken]),
            _columns([i for i, _ in taken]),
            self._dependents(view, features),
        )

    def _dependents(self, view: ContractView, features: tuple[ContractFeature, ...]) -> Positions:
        names = {text for name in view.features for text in (name, f"{view.name}__{name}")}
        paths = {function.path for function, _ in self._functions if names & set(function.inputs)}
        return np.array([i for i, f in enumerate(features) if f.source == view.name or f.source in paths], dtype=np.intp)

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

    def nothing(self, plan: KeyPlan, why: Reason) -> list[Found]:
        """What a read would find where there is nothing, for the reason given."""
        return [Found(empty_block(len(entities), len(layout.features)), why) for layout, entities in plan.asked]

    @cached_property
    def fields(self) -> frozenset[str]:
        """The request fields whose columns `assemble` takes; all others are only keys."""
        taken = {name for function, _ in self._functions for name in function.inputs if name in self._dtypes}
        return frozenset(taken | {name for _, path, name in self._direct if not path} | {name for _, name, _ in self._encoded})

    def keys(self, batches: Sequence[ParsedInputs]) -> KeyPlan:
        """What to read for all rows and views, each value once: a hundred flights from one airport read its weather once."""
        values: dict[str, list[JoinValue | None]] = {}
        for name in self._keys:
            values[name] = batches[0].values[name] if len(batches) == 1 else [v for batch in batches for v in batch.values[name]]
        rows = sum(batch.rows for batch in batches)
        given = _together(batches, self._width) if any(batch.given is not None for batch in batches) else None
        asked: list[Asked] = []
        places: list[Positions | None] = []
        spared: list[npt.NDArray[np.bool_]] = []
        for plan in self._views:
            keys = [values[name] for name in plan.layout.join_keys]
            if given is not None:
                free: npt.NDArray[np.bool_] = np.all(given.mask[:, plan.dependents], axis=1)
                free &= len(plan.dependents) > 0
                spared.append(free)
                keys = [[None if away else v for v, away in zip(column, free.tolist(), strict=True)] for column in keys]
            entities, where = _distinct(plan.layout, keys, rows)
            asked.append((plan.layout, entities))
            places.append(where)
        return KeyPlan(rows, asked, places, given, spared)

    def assemble(self, columns: Mapping[str, Column], plan: KeyPlan, found: Sequence[Found], now_us: int) -> Assembled:
        """The feature matrix. `columns` has the plan's `fields`, `found` one entry for each view; `now_us` UTC microseconds."""
        rows = plan.rows
        newest = [_newest(looked.block) for looked in found]
        out = Assembled(_moment(found, newest, now_us), np.empty((rows, self._width)), [])
        stored: dict[str, Floats] = {}
        for i, (view, places, looked) in enumerate(zip(self._views, plan.places, found, strict=True)):
            picked = None if looked.absent == "unreachable" else _take_good(out, view, places, looked.block, newest[i])
            if picked is None:
                picked = _take_view(
                    out, view, np.arange(rows) if places is None else places, looked, plan.spared[i] if plan.spared else None
                )
            stored[view.view.name] = picked
            out.matrix[:, view.target] = picked[:, view.source]
        given = dict(columns) | {name: stored[view][:, i] for name, (view, i) in self._function_views.items()}
        computed = self._run_functions(given, rows)
        for i, path, name in self._direct:
            out.matrix[:, i] = computed[path, name] if path else columns[name]
        for i, name, codes in self._encoded:
            out.matrix[:, i] = [codes.get(_category(v), math.nan) for v in columns[name].tolist()]
        if plan.given is not None:
            np.copyto(out.matrix, plan.given.values, where=plan.given.mask)
        return out

    def _run_functions(self, given: Mapping[str, Column], rows: int) -> dict[tuple[str, str], Floats]:
        computed: dict[tuple[str, str], Floats] = {}
        for declared, function in self._functions:
            try:
                # What a division by zero comes out as is the model's business, and checked; a warning for each request is nobody's.
                with np.errstate(all="ignore"):
                    answer = function({name: given[name] for name in declared.inputs})
            except Exception as error:
                raise FunctionOutputError(f"{declared.path} raised {type(error).__name__}") from error
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


def _together(batches: Sequence[ParsedInputs], width: int) -> Given:
    """The given features of all rows of a batch, where some requests gave some."""
    shapes = [(batch.rows, width) for batch in batches]
    values = [np.full(shape, np.nan) if b.given is None else b.given.values for b, shape in zip(batches, shapes, strict=True)]
    masks = [np.zeros(shape, np.bool_) if b.given is None else b.given.mask for b, shape in zip(batches, shapes, strict=True)]
    return Given(np.concatenate(values), np.concatenate(masks))


def _columns(places: list[int]) -> Positions | slice:
    """Columns of a matrix; a slice where they lie side by side, which NumPy copies without an index."""
    if places and places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return np.array(places, dtype=np.intp)


def _distinct(layout: ViewLayout, keys: list[list[JoinValue | None]], rows: int) -> tuple[list[bytes], Positions | None]:
    """A view's distinct entities among the rows, and each row's place among them as in `KeyPlan`."""
    if not keys:
        return [entity_part(layout.name, ())], np.zeros(rows, dtype=np.intp)
    values: Sequence[Any] = keys[0] if len(keys) == 1 else list(zip(*keys, strict=True))
    distinct = list(dict.fromkeys(values))
    positions = None
    if len(distinct) < rows:
        seen = dict(zip(distinct, range(len(distinct)), strict=True))
        positions = np.fromiter(map(seen.__getitem__, values), np.intp, rows)
    absent = [None in value for value in distinct] if len(keys) > 1 else [value is None for value in distinct] if None in distinct else []
    if any(absent):
        places = np.cumsum(~np.array(absent)) - 1
        places[absent] = -1
        positions = places if positions is None else places[positions]
        distinct = [value for value, away in zip(distinct, absent, strict=True) if not away]
    if len(keys) == 1:
        return entity_parts(layout.name, distinct), positions
    return [entity_part(layout.name, value) for value in distinct], positions


def _newest(block: Block) -> int:
    """The latest of a block's times, microseconds; 0 where it has no rows."""
    return max(int(block.event_us.max()), int(block.created_us.max())) if len(block.event_us) else 0


def _moment(found: Sequence[Found], newest: Sequence[int], now_us: int) -> int:
    """When the batch happens: now, or when the newest of its values became known, where that host's clock is a little ahead.

    What was read had been made available, so the request came after it (the receive rule of L. Lamport, "Time, Clocks, and
    the Ordering of Events in a Distributed System", 1978). So no age is negative, and history finds the same rows.
    """
    latest = now_us
    for looked, last in zip(found, newest, strict=True):
        if last > now_us:
            for times in (looked.block.event_us, looked.block.created_us):
                ahead = times[(times > now_us) & (times <= now_us + CLOCK_TOLERANCE_US)]
                latest = max(latest, int(ahead.max())) if ahead.size else latest
    return latest


def _take_good(out: Assembled, plan: _ViewPlan, places: Positions | None, block: Block, newest: int) -> Floats | None:
    """As `_take_view`, for the usual case: every row has a key, every value is there and good. None where it is not so."""
    ttl_us = plan.layout.ttl_us
    if newest > out.at_us or not block.held.all() or not len(block.held) or (places is not None and int(places.min()) < 0):
        return None
    if ttl_us is not None and out.at_us - int(block.event_us.min()) > ttl_us:
        return None
    ages_s = (out.at_us - block.event_us) / 1e6
    values = block.values if plan.bare else np.where(np.isnan(block.values), plan.defaults, block.values)
    out.ages_s.append(ages_s if places is None else ages_s[places])
    return values if places is None else values[places]


def _take_view(out: Assembled, plan: _ViewPlan, positions: Positions, found: Found, spared: npt.NDArray[np.bool_] | None) -> Floats:
    """The view's values for each row, float64 (rows, features of the view); writes ages, shortfalls and what was replaced."""
    block = found.block
    future = (block.event_us > out.at_us) | (block.created_us > out.at_us)
    age_us = out.at_us - block.event_us
    usable = block.held & ~future
    expired = usable & (age_us > plan.layout.ttl_us) if plan.layout.ttl_us is not None else np.zeros(len(usable), np.bool_)
    fine = usable & ~expired
    values = block.values if plan.bare else np.where(np.isnan(block.values), plan.defaults, block.values)
    kept = fine | expired if plan.view.on_stale == "serve" else fine
    # One more slot for rows without a key: the last, which -1 finds.
    padded = np.vstack([np.where(kept[:, None], values, plan.defaults), plan.defaults[None, :]])
    ages_s = np.append(np.where(usable, age_us / 1e6, np.nan), np.nan)
    why: list[Reason | None] = [
        None if good else _reason(found, held, late, ahead)
        for good, held, late, ahead in zip(fine.tolist(), block.held.tolist(), expired.tolist(), future.tolist(), strict=True)
    ]
    places = positions.tolist()
    out.ages_s.append(ages_s[positions])
    untold = np.zeros(len(places), np.bool_) if spared is None else spared
    for row, place in enumerate(places):
        if untold[row]:
            continue
        reason: Reason | None = why[place] if place >= 0 else "missing"
        if reason is not None:
            _tell(out, plan.view, row, reason)
        if place >= 0 and found.absent == "unreachable" and reason != "future":
            # Fine or expired, there may be a newer one: whoever compares it with the tables has to know that nobody looked.
            out.shortfalls.setdefault(row, {})[plan.view.name] = "unreachable"
    return padded[positions]


def _reason(found: Found, held: bool, expired: bool, future: bool) -> Reason:
    if not held:
        return found.absent
    return "future" if future else "expired"


def _tell(out: Assembled, view: ContractView, row: int, why: Reason) -> None:
    """Writes that a row's value was not there as it should be, and whether it was replaced or has to be refused."""
    out.shortfalls.setdefault(row, {})[view.name] = why
    if view.on_stale == "refuse":
        out.refused.append((row, view.name, why))
    elif not (why == "expired" and view.on_stale == "serve"):
        out.imputed.setdefault(row, []).append(view.name)
