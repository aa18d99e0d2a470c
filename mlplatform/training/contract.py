"""The serving contract of a freshly trained model version.

Belongs here: naming, for each model input, where the service finds it. Does not belong here: serving, or reading Feast (the
layouts of the views come in as `ContractView`).
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np

from mlplatform.contracts import (
    ContractFeature,
    ContractField,
    ContractFunction,
    ContractView,
    ServingContract,
    source_hash,
)
from mlplatform.specs import FeatureRecipe, ModelSpec, RequestFunction
from mlplatform.training.dataset import Dataset
from mlplatform.training.fitting import SavedModel, TrainedModel


def view_layout(name: str, join_keys: Sequence[str], features: Sequence[str], ttl: timedelta, recipe: FeatureRecipe) -> ContractView:
    """One view as the online store packs it, with its recipe's defaults (None = NaN) for every feature."""
    if unknown := sorted(set(recipe.defaults) - set(features)):
        raise ValueError(f"view {name}: defaults name features it does not have: {unknown}")
    return ContractView(
        name=name,
        join_keys=tuple(join_keys),
        features=tuple(features),
        ttl_s=ttl.total_seconds(),
        on_stale=recipe.on_stale,
        defaults={feature: json_number(recipe.defaults.get(feature, math.nan)) for feature in features},
    )


def build_contract(
    spec: ModelSpec,
    dataset: Dataset,
    trained: TrainedModel,
    saved: SavedModel,
    *,
    framework: Literal["xgboost", "torch"],
    views: Sequence[ContractView],
    functions: Sequence[RequestFunction],
    training_set_hash: str,
    project: str,
    tolerance: float = 0.0,
    examples: int = 16,
) -> ServingContract:
    """Everything the service must know of this version. Views no input comes from are left out.

    A model column is looked for as `view__feature`, then as a bare name among the views' features, the functions' outputs
    and the request fields. Raises ValueError where it is found nowhere, or in several places.
    The examples are rows of the test part, spread evenly over time.
    """
    sources = _Sources(spec, views, functions)
    features = [sources.find(name) for name in trained.numeric]
    features += [_category(spec, name, values) for name, values in trained.categories.items()]
    used_views = {f.source for f in features if f.kind == "view"}
    used_functions = {f.source for f in features if f.kind == "request"}
    matrix = trained.matrix(dataset, "test").values
    rows = matrix[np.unique(np.linspace(0, len(matrix) - 1, min(examples, len(matrix))).astype(np.intp))]
    return ServingContract(
        model=spec.name,
        task=spec.task,
        description=spec.description,
        framework=framework,
        model_file=saved.name,
        model_sha256=saved.sha256,
        project=project,
        fields=tuple(ContractField(**field.model_dump()) for field in spec.request_fields),
        views=tuple(v for v in views if v.name in used_views),
        functions=tuple(_function(f) for f in functions if function_path(f) in used_functions),
        features=tuple(features),
        threshold=spec.cost.threshold if spec.cost else None,
        training_set_hash=training_set_hash,
        example_features=tuple(tuple(json_number(v) for v in row) for row in rows),
        example_predictions=answers_as_json(trained.fitted.predict(rows)),
        quantiles=spec.quantiles,
        tolerance=tolerance,
    )


def function_path(function: RequestFunction) -> str:
    """`module:function`, importable by the service."""
    return f"{function.function.__module__}:{function.function.__qualname__}"


def json_number(value: float) -> float | None:
    """NaN as None, which JSON has. Infinities are an error: no feature may be one."""
    if math.isinf(value):
        raise ValueError("a feature is infinite")
    return None if math.isnan(value) else float(value)


def answers_as_json(answers: np.ndarray) -> tuple[float | tuple[float, ...], ...]:
    """Probabilities (n,) as numbers, quantiles (n, levels) as tuples of them."""
    return tuple(tuple(row) if isinstance(row, list) else row for row in np.asarray(answers, dtype=np.float64).tolist())


def from_json_numbers(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """The inverse for a table of examples: float64, None as NaN."""
    return np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


class _Sources:
    """Where each column of the feature service comes from."""

    def __init__(self, spec: ModelSpec, views: Sequence[ContractView], functions: Sequence[RequestFunction]) -> None:
        self._model = spec.name
        self._full: dict[str, tuple[Literal["view", "request"], str, str]] = {}
        self._bare: dict[str, list[tuple[Literal["view", "request"], str, str]]] = {}
        for view in views:
            for feature in view.features:
                self._full[f"{view.name}__{feature}"] = ("view", view.name, feature)
                self._bare.setdefault(feature, []).append(("view", view.name, feature))
        for function in functions:
            for output in function.outputs:
                self._full[f"{function.name}__{output}"] = ("request", function_path(function), output)
                self._bare.setdefault(output, []).append(("request", function_path(function), output))
        for field in spec.request_fields:
            # A function's output of the same name is the field as that function passes it on.
            if field.name not in self._bare:
                self._bare[field.name] = [("request", field.name, field.name)]

    def find(self, name: str) -> ContractFeature:
        found = [self._full[name]] if name in self._full else self._bare.get(name, [])
        if len(found) != 1:
            where = "nowhere" if not found else "in " + " and ".join(source for _, source, _ in found)
            raise ValueError(f"model {self._model}: input '{name}' is found {where}; the service could not tell where to take it from")
        kind, source, column = found[0]
        return ContractFeature(name=name, kind=kind, source=source, column=column)


def _category(spec: ModelSpec, name: str, values: Sequence[str]) -> ContractFeature:
    if name not in {field.name for field in spec.request_fields}:
        raise ValueError(f"model {spec.name}: categorical input '{name}' is not a request field")
    return ContractFeature(name=name, kind="category", source=name, column=name, categories=tuple(values))


def _function(function: RequestFunction) -> ContractFunction:
    return ContractFunction(
        path=function_path(function), inputs=function.inputs, outputs=function.outputs, source_hash=source_hash(function.function)
    )
