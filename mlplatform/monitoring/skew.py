"""Served = trained: each logged prediction's features, rebuilt from the tables and compared bit by bit.

Belongs here: which predictions are judged, their sources put together, the summary. Does not belong here: the comparison
of one source (`skew_views`, `skew_requests`), reading tables or the registry, the plot (`skew_plot`).

A logged age is a whole number of microseconds divided by a million; times a million and rounded it is that number again
for any age up to 2**51 microseconds (71 years), so the event time of every served value is known exactly.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from mlplatform.contracts import ContractFeature, ContractView, ServingContract
from mlplatform.monitoring import skew_requests as requests
from mlplatform.monitoring.drain import given
from mlplatform.monitoring.skew_faults import NEVER, OK, Flags, Floats, Judged
from mlplatform.monitoring.skew_views import AGE, AT, AWAY, IMPUTED, LARGEST_SHIFT, judge_view
from mlplatform.records import SkewSummary
from mlplatform.specs import SkewPolicy

EXAMPLES_PER_FAULT = 3
EXAMPLE_FEATURES = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def judged_window(policy: SkewPolicy, now: datetime) -> tuple[datetime, datetime]:
    """(start, end]: the predictions that are judged at `now`."""
    start = now - timedelta(days=policy.window_days)
    return (start if policy.ignore_before is None else min(max(start, policy.ignore_before), now)), now


def chosen(predictions: pl.DataFrame, policy: SkewPolicy) -> pl.DataFrame:
    """All rows, or above the policy's number a sample of them: the same rows for the same log and seed."""
    if predictions.height <= policy.sample_rows:
        return predictions
    return predictions.sort("request_id", "input_index").sample(policy.sample_rows, seed=policy.seed)


@dataclass(frozen=True)
class Logged:
    """The judged predictions of one contract: n readable ones, with inputs by field and `matrix` (n, features) as served."""

    contract: ServingContract
    predictions: pl.DataFrame
    inputs: pl.DataFrame
    matrix: Floats
    unreadable: pl.DataFrame  # predictions whose inputs are not the contract's fields
    given: frozenset[str] = frozenset()  # features that stood in each of these requests: nothing to hold them against

    def by_given(self) -> list["Logged"]:
        """The predictions apart by which features were given; what is unreadable stands with those where none was."""
        sets = [frozenset(names) for names in given(self.predictions)]
        parts = []
        none = [] if sets and self.unreadable.is_empty() else [frozenset[str]()]
        for names in dict.fromkeys([*none, *sets]):
            rows = pl.Series([found == names for found in sets], dtype=pl.Boolean)
            unreadable = self.unreadable.clear() if names else self.unreadable
            side = (self.predictions.filter(rows), self.inputs.filter(rows), self.matrix[rows.to_numpy()], unreadable)
            parts.append(Logged(self.contract, *side, names))
        return parts

    @classmethod
    def of(cls, contract: ServingContract, predictions: pl.DataFrame) -> "Logged":
        """From rows of `predictions/<model>`. Raises ValueError where a vector has not the contract's length."""
        width = len(contract.features)
        if lengths := set(predictions["features"].list.len().unique()) - {width}:
            raise ValueError(f"predictions under a contract of {width} features have {sorted(lengths)}")
        inputs, readable = requests.typed_inputs(contract.fields, [json.loads(text) for text in predictions["inputs"]])
        good = predictions.filter(readable)
        flat = good["features"].explode().fill_null(np.nan).to_numpy() if good.height else np.empty(0)
        matrix = np.asarray(flat, dtype=np.float64).reshape(good.height, width)
        return cls(contract, good, inputs.filter(readable), matrix, predictions.filter(~readable))

    def asked(self, view: ContractView) -> pl.DataFrame:
        """Keys, T, age, imputation and reach of a view, as `judge_view` takes them."""
        of_view = pl.element().filter(pl.element().struct.field("view") == view.name).struct.field("age_s")
        age_s = pl.col("feature_ages_s").list.eval(of_view).list.first()
        shortfall = pl.element().struct.field("view") == view.name
        away = shortfall & (pl.element().struct.field("reason") == "unreachable")
        told = self.predictions.select(
            pl.col("requested_at").alias(AT),
            (age_s * 1e6).round().cast(pl.Int64).alias(AGE),
            pl.col("imputed").list.contains(view.name).alias(IMPUTED),
            pl.col("shortfalls").list.eval(away).list.any().fill_null(value=False).alias(AWAY),
        )
        return told.hstack(self.inputs.select(view.join_keys).get_columns())

    def reach(self, view: ContractView) -> tuple[datetime, datetime]:
        """The first and the last event time of the rows a comparison of the view needs."""
        asked = self.asked(view)
        oldest = asked.select((pl.col(AT) - pl.duration(microseconds=AGE)).min()).item()
        first, last = asked[AT].min(), asked[AT].max()
        assert isinstance(first, datetime)
        assert isinstance(last, datetime)
        first = min(first - timedelta(seconds=view.ttl_s), oldest or first)
        return first - LARGEST_SHIFT, last + LARGEST_SHIFT


@dataclass(frozen=True)
class Truth:
    """What the predictions of one contract are held against. A view or function that is missing here is not compared:
    whoever leaves it out says why in the summary's `unresolved`."""

    rows: Mapping[str, pl.DataFrame]  # by view: as `judge_view` takes them
    propagation: Mapping[str, timedelta]  # by view
    functions: Mapping[str, requests.Function]  # by path
    predict: Callable[[Floats], Floats] | None = None


def compare(logged: Logged, truth: Truth) -> tuple[Judged, ...]:
    """Every source of the contract that `truth` has, but for the features that were given.

    A view is left out where everything that follows from it was given: the service did not read it then. A function is computed from
    what was read, whatever stood beside it in the request.
    """
    contract, matrix = logged.contract, logged.matrix
    found: list[Judged] = []
    columns = requests.as_columns(logged.inputs)
    for view in contract.views:
        if _spared(logged, view):
            continue
        taken = _positions(logged, lambda f, v=view: f.kind == "view" and f.source == v.name)  # type: ignore[misc]
        missing = _only_for_functions(contract, view, set(taken.values()))
        if view.name in truth.rows:
            side = (logged.asked(view), matrix[:, list(taken)], truth.rows[view.name], truth.propagation[view.name])
            found.append(judge_view(view, list(taken.values()), *side, also=missing))
            columns |= _under_both_names(view, {**{name: matrix[:, i] for i, name in taken.items()}, **found[-1].also})
    for function in contract.functions:
        taken = _positions(logged, lambda f, p=function.path: f.kind == "request" and f.source == p)  # type: ignore[misc]
        if logged.given and not taken:
            continue
        if function.path not in truth.functions or not set(function.inputs) <= set(columns):
            continue
        outputs = {contract.features[i].name: output for i, output in taken.items()}
        given = {name: columns[name] for name in function.inputs}
        found.append(requests.judge_function(function, truth.functions[function.path], given, outputs, matrix[:, list(taken)]))
    found += requests.judge_fields(contract, logged.inputs, matrix, logged.given)
    if truth.predict is not None:
        found.append(requests.judge_predictions(truth.predict, matrix, logged.predictions["prediction"].to_numpy(), contract.tolerance))
    return tuple(found)


def summarise(
    model: str,
    policy: SkewPolicy,
    window: tuple[datetime, datetime],
    predictions: int,
    parts: Iterable[tuple[Logged, Sequence[Judged]]],
    budgets: Mapping[str, timedelta],
    unresolved: Sequence[str] = (),
) -> SkewSummary:
    """One summary over all contracts. `predictions`: how many the window has, `budgets`: propagation by view."""
    kinds: Counter[str] = Counter()
    compared = mismatched = given_rows = fallback = 0
    sources: dict[str, list[Judged]] = {}
    examples: list[dict[str, Any]] = []
    seen: Counter[tuple[str, str]] = Counter()
    for logged, judged in parts:
        compared += logged.predictions.height + logged.unreadable.height
        given_rows += logged.predictions.height if logged.given else 0
        names: list[set[str]] = [set() for _ in range(logged.predictions.height)]
        away = np.zeros(logged.predictions.height, dtype=np.bool_)
        for one in judged:
            away |= False if one.away is None else one.away
            sources.setdefault(one.source, []).append(one)
            for i in np.flatnonzero(one.faulty):
                names[i].add(str(one.fault[i]))
                pair = (one.source, str(one.fault[i]))
                if seen[pair] < EXAMPLES_PER_FAULT:
                    seen[pair] += 1
                    examples.append(_example(logged, one, int(i)))
        kinds.update(kind for found in names for kind in found)
        kinds["unreadable_inputs"] += logged.unreadable.height
        mismatched += sum(map(bool, names)) + logged.unreadable.height
        fallback += sum(fell and not found for fell, found in zip(away.tolist(), names, strict=True))
    return SkewSummary(
        model=model,
        window=(window[0].isoformat(), window[1].isoformat()),
        predictions=predictions,
        compared=compared,
        mismatched=mismatched,
        max_rate=policy.max_mismatch_rate,
        kinds=dict((+kinds).most_common()),
        by_source=tuple(_of_source(name, group, budgets.get(name)) for name, group in sources.items()),
        by_feature=tuple(row for name, group in sources.items() for row in _of_features(name, group)),
        examples=tuple(examples),
        unresolved=tuple(unresolved),
        given=given_rows,
        fallback=fallback,
        max_fallback_share=policy.max_fallback_share,
    )


def _positions(logged: Logged, wanted: Callable[[ContractFeature], bool]) -> dict[int, str]:
    """Place in the model's columns → the feature's name within its source; of those that were not given."""
    return {i: f.column for i, f in enumerate(logged.contract.features) if wanted(f) and f.name not in logged.given}


def _spared(logged: Logged, view: ContractView) -> bool:
    """Whether all features that follow from the view, by themselves or by a function, were given."""
    names = {text for name in view.features for text in (name, f"{view.name}__{name}")}
    sources = {view.name, *(f.path for f in logged.contract.functions if names & set(f.inputs))}
    follow = {f.name for f in logged.contract.features if f.source in sources}
    return bool(follow) and follow <= logged.given


def _only_for_functions(contract: ServingContract, view: ContractView, taken: set[str]) -> list[str]:
    """Features of the view that a function takes and the model does not: they are not in the log."""
    wanted = {name.removeprefix(f"{view.name}__") for f in contract.functions for name in f.inputs} - {f.name for f in contract.fields}
    return [name for name in view.features if name in wanted - taken]


def _under_both_names(view: ContractView, columns: Mapping[str, Floats]) -> dict[str, Floats]:
    return {key: column for name, column in columns.items() for key in (name, f"{view.name}__{name}")}


def _of_source(name: str, group: Sequence[Judged], budget: timedelta | None) -> dict[str, Any]:
    rows, bad = sum(len(one.fault) for one in group), sum(int(one.faulty.sum()) for one in group)
    kinds = Counter(str(kind) for one in group for kind in one.fault if kind != OK)
    told: dict[str, Any] = {"source": name, "compared": rows, "mismatches": bad, "rate": bad / rows if rows else 0.0, "kinds": dict(kinds)}
    if budget is None:
        return told
    waits: list[Floats] = [one.lag_us[one.lag_us >= 0] / 1e6 for one in group if one.lag_us is not None]
    lags = np.concatenate(waits)
    quantiles = np.quantile(lags, [0.5, 0.99, 1.0]).tolist() if len(lags) else [None] * 3
    return told | {
        "away": sum(int(one.away.sum()) for one in group if one.away is not None),
        "budget_s": budget.total_seconds(),
        "behind": len(lags),
        **dict(zip(("lag_p50_s", "lag_p99_s", "lag_max_s"), quantiles, strict=True)),
    }


def _of_features(name: str, group: Sequence[Judged]) -> list[dict[str, Any]]:
    rows: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for one in group:
        wrong = one.wrong.sum(axis=0)
        for feature, count in zip(one.features, wrong.tolist(), strict=True):
            rows[feature] += len(one.fault)
            bad[feature] += count
    return [{"source": name, "feature": f, "compared": n, "mismatches": bad[f], "rate": bad[f] / n if n else 0.0} for f, n in rows.items()]


def _example(logged: Logged, one: Judged, i: int) -> dict[str, Any]:
    asked = logged.predictions.row(i, named=True)
    wrong: Flags = one.wrong[i]
    shown = np.flatnonzero(wrong)[:EXAMPLE_FEATURES].tolist()
    return {
        "fault": str(one.fault[i]),
        "source": one.source,
        "request_id": asked["request_id"],
        "input_index": asked["input_index"],
        "version": asked["version"],
        "requested_at": asked["requested_at"].isoformat(),
        "entity": {key: logged.inputs[key][i] for key in one.keys},
        "served": {one.features[j]: _plain(one.served[i, j]) for j in shown},
        "rebuilt": {one.features[j]: _plain(one.expected[i, j]) for j in shown},
        **{name: _moment(int(times[i])) for name, times in one.times.items()},
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _moment(at_us: int) -> str | None:
    return None if at_us == NEVER else (_EPOCH + timedelta(microseconds=at_us)).isoformat()
