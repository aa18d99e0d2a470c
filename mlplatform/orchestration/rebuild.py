"""A registered version made again from what was recorded with it, and compared.

Belongs here: reading the record, time travel, the fit, the comparison. Does not belong here: registering anything (nothing is written),
printing.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from deltalake.exceptions import DeltaError

from mlplatform.contracts import ServingContract
from mlplatform.features.plan import ViewPlan
from mlplatform.fingerprint import content_hash
from mlplatform.orchestration.assets.training import read_training_data, request_functions
from mlplatform.orchestration.ingredients import CIRCUMSTANCES, INGREDIENTS_TAG, PARAMS, ingredients
from mlplatform.orchestration.resources import Clients
from mlplatform.specs import Catalog, ModelSpec, Split
from mlplatform.training import fitting
from mlplatform.training.contract import from_json_numbers
from mlplatform.training.trainers import base as trainers
from mlplatform.training.trainers.base import Resources


class RebuildError(LookupError):
    """What was recorded does not suffice to make the version again, or is gone."""


@dataclass(frozen=True)
class Ingredient:
    """One thing a version was made of. `circumstance`: the version may come out the same without it."""

    name: str
    recorded: str
    now: str
    circumstance: bool = False

    @property
    def same(self) -> bool:
        return self.recorded == self.now


@dataclass(frozen=True)
class Outcome:
    """What the rebuilt model is like. `identical`: the same file, byte for byte; `difference`: the largest one between the predictions it
    makes for the version's recorded examples and the recorded ones, allowed up to `tolerance`."""

    identical: bool
    difference: float
    tolerance: float

    @property
    def same(self) -> bool:
        return self.identical or (self.tolerance > 0 and self.difference <= self.tolerance)


@dataclass(frozen=True)
class Rebuilt:
    """`outcome` is None where only the record was looked at."""

    model: str
    version: int
    ingredients: tuple[Ingredient, ...]
    outcome: Outcome | None

    @property
    def changed(self) -> tuple[Ingredient, ...]:
        """What differs, the circumstances last."""
        return tuple(sorted((i for i in self.ingredients if not i.same), key=lambda i: i.circumstance))


def rebuild(
    clients: Clients, catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan], number: int, verify: bool = True
) -> Rebuilt:
    """Compares what the version was made of with what is there now; with `verify` also makes it again, from the tables as they were.

    Raises UnknownModelError for a version there is not, RebuildError where the record does not suffice or a table's version is gone.
    """
    version = clients.registry.version(spec.name, number)
    text = version.tags.get(INGREDIENTS_TAG)
    if text is None:
        raise RebuildError(f"version {number} of {spec.name} was registered without a record of its ingredients: it cannot be rebuilt")
    recorded: dict[str, str] = json.loads(text)
    manifest, contract = clients.registry.manifest_of(version), clients.registry.contract_of(version)
    params = json.loads(recorded[PARAMS])
    resources = Resources(clients.device_for(contract.framework), int(recorded["threads"]), int(recorded["workers"]), engine=clients.engine)
    now = ingredients(spec, plans, request_functions(catalog), params, resources, clients.settings.code_version)
    found = [Ingredient(name, recorded.get(name, "-"), now.get(name, "-"), name in CIRCUMSTANCES) for name in {**recorded, **now}]
    found += _tables(clients, manifest["delta_versions"])
    if not verify:
        return Rebuilt(spec.name, number, tuple(found), None)
    used = spec.model_copy(update={"split": Split(**{k: date.fromisoformat(v) for k, v in manifest["split"].items()})})
    versions = {_key(name): int(place[1]) for name, place in manifest["delta_versions"].items()}
    try:
        data = read_training_data(clients, used, plans, versions)
    except (DeltaError, OSError, pl.exceptions.PolarsError) as error:  # an old version's files, or its log, were cleaned away
        raise RebuildError(f"the tables cannot be read as they were for version {number}: {error}") from error
    found.append(Ingredient("training set", manifest["content_hash"], content_hash(data.frame)))
    trained = fitting.fit(used, data, trainers.get(spec.trainer), params, resources)
    return Rebuilt(spec.name, number, tuple(found), compare(trained, contract))


def _tables(clients: Clients, versions: Mapping[str, Any]) -> list[Ingredient]:
    """A table is told by its id: dropped and written anew, its versions begin again and name other rows."""
    found = []
    for name, (identity, _) in versions.items():
        there = clients.lake.identity(_key(name))[0] if clients.lake.exists(_key(name)) else "gone"
        found.append(Ingredient(f"table {name}", identity, there))
    return found


def _key(name: str) -> tuple[str, str]:
    stage, table = name.split("/")
    return stage, table


def compare(trained: fitting.TrainedModel, contract: ServingContract) -> Outcome:
    """What was made again, beside what the version's contract recorded of its file and its answers."""
    with tempfile.TemporaryDirectory() as folder:
        identical = fitting.save(trained.fitted, Path(folder)).sha256 == contract.model_sha256
    answers = trained.fitted.predict(from_json_numbers(contract.example_features))
    difference = np.abs(np.asarray(answers) - np.array(contract.example_predictions, dtype=float))
    return Outcome(identical, float(difference.max(initial=0.0)), contract.tolerance)
