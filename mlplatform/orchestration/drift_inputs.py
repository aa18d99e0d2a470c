"""The two sides of a drift report: what the serving version was trained on, and what it was asked lately.

Belongs here: bringing both into the model's own input columns. Does not belong here: measuring drift.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mlplatform.contracts import SHADOW_VARIANT, ServingContract
from mlplatform.monitoring.drain import given, with_feature_columns
from mlplatform.orchestration.assets.training import open_training_set
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange, ModelVersion
from mlplatform.specs import ModelSpec
from mlplatform.training.scoring import load
from mlplatform.training.trainers.base import Floats


@dataclass(frozen=True)
class Reference:
    """Model inputs of the training rows (one Float64 column each), and the version's answers for the test rows."""

    features: pl.DataFrame
    predictions: Floats
    categorical: frozenset[str]


def training_reference(clients: Clients, spec: ModelSpec, version: ModelVersion) -> Reference:
    """The training set in the version's input columns, as its contract encodes them."""
    data, _, _ = open_training_set(clients, spec)
    contract = clients.registry.contract_of(version)
    with tempfile.TemporaryDirectory() as folder:
        scorer = load(clients.registry.download(version, Path(folder)), contract)
        matrix = scorer.inputs(data.frame)
        predictions = scorer.points(scorer.inputs(data.part("test")))
    names = [f.name for f in contract.features]
    frame = pl.DataFrame(matrix, schema=names).with_columns(pl.col(names).fill_nan(None))
    return Reference(frame, predictions, frozenset(f.name for f in contract.features if f.kind == "category"))


@dataclass(frozen=True)
class Served:
    """Answered predictions: one column per model input, and `prediction`. `given` flags those with features from the request itself:
    what an application computed says nothing about the data this platform serves."""

    rows: pl.DataFrame
    given: pl.Series

    @property
    def read(self) -> pl.DataFrame:
        """The rows whose features this service has read or computed, all of them."""
        return self.rows.filter(~self.given)


def served_features(clients: Clients, spec: ModelSpec, days: DayRange) -> Served:
    """The predictions of `days`, without a shadow's copies, which would count requests twice."""
    rows = clients.lake.read(("predictions", spec.name), days).filter(pl.col("variant") != SHADOW_VARIANT)
    contracts: dict[str, ServingContract] = {}
    for version in rows["version"].unique():
        contract = clients.registry.contract_of(clients.registry.version(spec.name, int(version)))
        contracts[contract.digest()] = contract
    slim = rows.select("features", "contract_digest", "prediction")
    spread = with_feature_columns(slim, {digest: [f.name for f in c.features] for digest, c in contracts.items()})
    return Served(spread, given(rows).list.len() > 0)
