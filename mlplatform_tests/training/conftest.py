"""A small synthetic question with a known answer, for the tests of this folder."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.specs import CostMatrix, ModelSpec, RequestField, Split, TuningSpec
from mlplatform.training.dataset import Dataset, assemble

START = datetime(2024, 1, 1, tzinfo=UTC)
FEATURES = 6


def make_spec(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": "breakdown",
        "description": "Will the machine break down within a day?",
        "feature_service": "breakdown_v1",
        "inputs": {"machines": timedelta(days=1)},
        "rows": lambda tables: tables["machines"],
        "row_key": ("row_id",),
        "request_fields": (
            RequestField(name="site", dtype="string", description="Where it stands", example="A"),
            RequestField(name="load", dtype="float", description="Load, 0 to 1", example=0.5),
        ),
        "categorical": ("site",),
        "slices": ("site",),
        "split": Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 5, 1)),
        "tuning": TuningSpec(trials=6, folds=2, max_rows=1500),
        "cost": CostMatrix(miss=5, false_alarm=1),
    }
    return ModelSpec(**(fields | changes))


def make_rows(n: int = 2400, seed: int = 1) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Labelled rows and their features, n each, evenly over 121 days."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, FEATURES))
    site = rng.choice(["A", "B", "C"], n)
    logit = 1.5 * values[:, 0] + values[:, 1] * values[:, 2] + (site == "B") - 0.5
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    values[rng.random(values.shape) < 0.05] = np.nan
    at = [START + timedelta(days=121) * (i / n) for i in range(n)]
    rows = pl.DataFrame(
        {"row_id": [f"r{i:05d}" for i in range(n)], "event_timestamp": at, "site": site, "label": label},
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC")},
    ).with_columns(label_known_at=pl.col("event_timestamp") + timedelta(hours=24))
    features = pl.DataFrame({f"x{i}": values[:, i] for i in range(FEATURES)})
    return rows, rows.select("row_id", "event_timestamp", "site").hstack(features.fill_nan(None).get_columns())


def make_dataset(n: int = 2400, **changes: object) -> tuple[ModelSpec, Dataset]:
    spec = make_spec(**changes)
    rows, features = make_rows(n)
    return spec, assemble(spec, rows, features)


@pytest.fixture
def spec() -> ModelSpec:
    return make_spec()


@pytest.fixture
def rows_and_features() -> tuple[pl.DataFrame, pl.DataFrame]:
    return make_rows()


@pytest.fixture(scope="module")
def module_spec() -> ModelSpec:
    return make_spec()


@pytest.fixture(scope="module")
def module_rows() -> tuple[pl.DataFrame, pl.DataFrame]:
    return make_rows()


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return make_dataset()[1]
