"""What is served in `mlplatform bench serving`: a made-up model in a real MLflow, its features in a real Valkey.

Belongs here: model, contract, values, questions with their true answers. Does not belong here: services that answer (`contenders`), load.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
from redis import Redis

from mlplatform.clients.registry import NewVersion, Registry
from mlplatform.contracts import (
    EVALUATION_TAG,
    GATES_TAG,
    ONLINE_PROJECT,
    PRODUCTION,
    VERIFIED_TAG,
    ContractFeature,
    ContractField,
    ContractView,
    ServingContract,
)
from mlplatform.feature_store.writer import write_frame
from mlplatform.records import TrainingManifest
from mlplatform.verified import Identity, seal

MODEL = "bench"
ENTITIES = 10_000
TREES, DEPTH = 200, 6
VIEWS = {
    "users": ("user_id", tuple(f"u{i}" for i in range(10))),
    "merchants": ("merchant_id", tuple(f"m{i}" for i in range(10))),
    "devices": ("device_id", tuple(f"d{i}" for i in range(10))),
}
KEYS = tuple(key for key, _ in VIEWS.values())
COLUMNS = tuple(column for _, columns in VIEWS.values() for column in columns)
MODEL_FILE = "model.ubj"
_TRAINING_ROWS = 50_000
_TTL = timedelta(days=30)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """The inputs of one request; where known, their features, float32 (inputs, features), and what `Booster.predict` says to them."""

    inputs: Sequence[Mapping[str, Any]]
    features: npt.NDArray[np.float32] | None = None
    answers: npt.NDArray[np.float32] | None = None


class Subject(Protocol):
    """What is served: a model in a registry, values online, and requests. `clock`: the service's setting for it."""

    model: str
    clock: str
    model_file: Path
    tolerance: float  # how far a prediction may be from what `predict` says; 0: not by a bit

    def prepare(self, redis: Redis, registry: Registry) -> None:
        """Puts values and model where the service finds them, as far as they are not there yet."""
        ...

    def questions(self, count: int, rows: int) -> list[Question]:
        """`count` requests of `rows` inputs each."""
        ...

    def predict(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """What the model's own library says to features (inputs, features); of quantiles the median."""
        ...


class World:
    """`values`: float64 (views, `entities`, features of a view). Training takes seconds; registering and writing are calls of their own."""

    def __init__(self, folder: Path, seed: int = 7, entities: int = ENTITIES) -> None:
        import xgboost

        self.model, self.clock, self.tolerance = MODEL, "system", 0.0
        self.model_file = folder / MODEL_FILE
        rng = np.random.default_rng(seed)
        # As float32 holds them, so that features given in a request as decimal text are the very same numbers.
        self.entities = entities
        shape = (len(VIEWS), entities, len(COLUMNS) // len(VIEWS))
        self.values: Floats = rng.standard_normal(shape).astype(np.float32).astype(np.float64)
        rows = rng.standard_normal((_TRAINING_ROWS, len(COLUMNS))).astype(np.float32)
        score = rows @ rng.standard_normal(len(COLUMNS)) * 0.4 + 0.8 * rows[:, 0] * rows[:, 11] - 0.6 * np.abs(rows[:, 21])
        label = score + rng.standard_normal(_TRAINING_ROWS) > 0
        data = xgboost.DMatrix(rows, label, feature_names=list(COLUMNS))
        options = {"objective": "binary:logistic", "max_depth": DEPTH, "eta": 0.1, "tree_method": "hist", "seed": seed, "nthread": 1}
        self.booster = xgboost.train(options, data, TREES)
        self.booster.save_model(self.model_file)
        self._rng = rng

    def prepare(self, redis: Redis, registry: Registry) -> None:
        self.write_values(redis)
        self.register(registry)

    def predict(self, rows: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        import xgboost

        answers: npt.NDArray[np.float32] = self.booster.predict(xgboost.DMatrix(rows, feature_names=list(COLUMNS)))
        return answers

    def questions(self, count: int, rows: int) -> list[Question]:
        """`count` requests of `rows` inputs each, entities drawn anew for every input."""
        ids = self._rng.integers(0, self.entities, (count, rows, len(KEYS)))
        features = np.concatenate([self.values[view][ids[:, :, view]] for view in range(len(KEYS))], axis=2).astype(np.float32)
        answers = self.predict(features.reshape(count * rows, -1)).reshape(count, rows)
        return [
            Question([dict(zip(KEYS, row, strict=True)) for row in asked], given, true)
            for asked, given, true in zip(ids.tolist(), features, answers, strict=True)
        ]

    def write_values(self, redis: Redis) -> None:
        """Every entity's values into the online store, known since a minute ago."""
        moment = datetime.now(UTC) - timedelta(minutes=1)
        for (view, (key, columns)), values in zip(VIEWS.items(), self.values, strict=True):
            frame = pl.DataFrame(
                {key: np.arange(self.entities), "event_timestamp": [moment] * self.entities, "created": [moment] * self.entities}
            )
            frame = frame.with_columns(**{column: values[:, i] for i, column in enumerate(columns)})
            write_frame(redis, ONLINE_PROJECT, view, [key], columns, frame)

    def register(self, registry: Registry, alias: bool = True) -> int:
        """Logs the model the way the platform does, as one whose gates passed; `alias`: to serve. Returns its version."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MODEL_FILE).write_bytes(self.model_file.read_bytes())
            contract = self.contract()
            version = registry.log_version(NewVersion(contract, _manifest(), Path(folder)))
        # There are no gates here; the service asks for their seal.
        identity = Identity(MODEL, version.version, contract.digest(), contract.model_sha256)
        registry.set_tags(version, {GATES_TAG: "passed", EVALUATION_TAG: "{}", VERIFIED_TAG: seal("", identity, "{}")})
        if alias:
            registry.set_alias(MODEL, PRODUCTION, version.version)
        return version.version

    def contract(self) -> ServingContract:
        examples = np.concatenate([self.values[view][:16] for view in range(len(VIEWS))], axis=1)
        return ServingContract(
            model=MODEL,
            task="binary",
            description="A made-up model of 30 features in 3 views, for measuring the service",
            framework="xgboost",
            model_file=MODEL_FILE,
            model_sha256=hashlib.sha256(self.model_file.read_bytes()).hexdigest(),
            project=ONLINE_PROJECT,
            fields=tuple(ContractField(name=key, dtype="int", description=key, example=7, minimum=0) for key in KEYS),
            views=tuple(
                ContractView(
                    name=view,
                    join_keys=(key,),
                    features=columns,
                    ttl_s=_TTL.total_seconds(),
                    on_stale="impute",
                    defaults=dict.fromkeys(columns),
                )
                for view, (key, columns) in VIEWS.items()
            ),
            functions=(),
            features=tuple(
                ContractFeature(name=column, kind="view", source=view, column=column)
                for view, (_, columns) in VIEWS.items()
                for column in columns
            ),
            training_set_hash="0" * 64,
            example_features=tuple(tuple(row) for row in examples.tolist()),
            example_predictions=tuple(self.predict(examples.astype(np.float32)).tolist()),
        )


def _manifest() -> TrainingManifest:
    return TrainingManifest(
        model=MODEL,
        feature_service="none",
        rows=_TRAINING_ROWS,
        labelled_in=_TRAINING_ROWS,
        columns=COLUMNS,
        content_hash="0" * 64,
        delta_versions={},
        definition_hash="0" * 64,
        split={},
        rows_by_part={"train": _TRAINING_ROWS},
        base_rate=0.5,
        null_shares={},
    )


def write_bodies(path: Path, bodies: Iterable[Mapping[str, Any]]) -> Path:
    """One request body a line, as the load generators read them."""
    path.write_text("".join(json.dumps(body, separators=(",", ":")) + "\n" for body in bodies))
    return path
