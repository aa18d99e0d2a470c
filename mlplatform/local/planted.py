"""Faults planted on purpose, for the demonstration that releases find them.

Belongs here: what is spoilt, and how. Does not belong here: finding it.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from mlplatform.gate_specs import ChampionGate, ServingBudget
from mlplatform.specs import Catalog, ModelSpec, Split, Tables

if TYPE_CHECKING:
    from mlplatform.orchestration.resources import Clients
    from mlplatform.records import ModelVersion

# A single row takes about a thousandth of a second more for each thousand of them.
USELESS_TREES = 12_000


def shuffled(rows: Callable[[Tables], pl.DataFrame], split: Split, seed: int) -> Callable[[Tables], pl.DataFrame]:
    """Rows whose labels are dealt out anew among themselves where they are learned from; those of the test part are as they were."""

    def spoilt(tables: Tables) -> pl.DataFrame:
        found = rows(tables)
        until = datetime.combine(split.test_start, time(), UTC)
        learned = pl.col("event_timestamp") < until
        dealt = found.filter(learned).with_columns(pl.col("label").shuffle(seed))
        return pl.concat([dealt, found.filter(~learned)])

    return spoilt


def without_gates(spec: ModelSpec) -> ModelSpec:
    """As a team declares a model that has not thought of gates: whatever is trained gets as far as a canary."""
    anything = ServingBudget(model_bytes=10**12, cpu_ms=1e9, cpu_ms_100=1e9)
    return spec.model_copy(update={"gates": (), "slice_gates": (), "champion_gate": ChampionGate(tolerance=1e9), "budget": anything})


def planted(catalog: Catalog, model: ModelSpec) -> Catalog:
    """The catalog with labels shuffled in the training of `model`, and no gates for it."""
    spoilt = without_gates(model).model_copy(update={"rows": shuffled(model.rows, model.split, model.seed)})
    return catalog.model_copy(update={"models": tuple(spoilt if m.name == model.name else m for m in catalog.models)})


def register_slow(clients: "Clients", spec: ModelSpec, version: "ModelVersion", trees: int = USELESS_TREES) -> "ModelVersion":
    """Registers a copy of an XGBoost version that answers the same, bit for bit, and takes its time: `trees` more, whose leaves are 0.
    `version` was trained on the training set that is stored now."""
    from mlplatform.clients.registry import NewVersion
    from mlplatform.contracts import TRAINED_BY_TAG
    from mlplatform.orchestration.assets.training import open_training_set

    contract = clients.registry.contract_of(version)
    with tempfile.TemporaryDirectory() as folder:
        file = clients.registry.download(version, Path(folder)) / contract.model_file
        content = heavier(file.read_bytes(), trees)
        file.write_bytes(content)
        changed = contract.model_copy(update={"model_sha256": hashlib.sha256(content).hexdigest()})
        tags = {TRAINED_BY_TAG: clients.settings.acts_as}
        return clients.registry.log_version(NewVersion(changed, open_training_set(clients, spec)[1], Path(folder), tags=tags))


def heavier(model: bytes, trees: int) -> bytes:
    """An XGBoost model file (UBJ) with `trees` more: copies of its first tree that add nothing."""
    import xgboost as xgb

    booster = xgb.Booster()
    booster.load_model(bytearray(model))
    document: dict[str, Any] = json.loads(booster.save_raw("json"))
    grown = document["learner"]["gradient_booster"]["model"]
    first, there = grown["trees"][0], len(grown["trees"])
    conditions = [0.0 if left == -1 else value for left, value in zip(first["left_children"], first["split_conditions"], strict=True)]
    nothing = {**first, "split_conditions": conditions, "base_weights": [0.0] * len(conditions)}
    grown["trees"] += [{**nothing, "id": there + n} for n in range(trees)]
    grown["tree_info"] += [0] * trees
    grown["iteration_indptr"] += [there + n + 1 for n in range(trees)]
    grown["gbtree_model_param"]["num_trees"] = str(there + trees)
    booster.load_model(bytearray(json.dumps(document).encode()))
    return bytes(booster.save_raw("ubj"))
