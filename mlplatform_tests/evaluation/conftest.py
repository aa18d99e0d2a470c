"""A small model specification and forecasts for it."""

from datetime import date

import numpy as np
import polars as pl
import pytest

from mlplatform.gate_specs import Gate
from mlplatform.specs import CostMatrix, ModelSpec, RequestField, Split


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(
        name="rain_tomorrow",
        description="Will it rain tomorrow?",
        feature_service="rain_v1",
        inputs={},
        rows=lambda tables: pl.DataFrame(),
        row_key=("town",),
        request_fields=(RequestField(name="town", dtype="string", description="", example="Bergen"),),
        slices=("town", "station"),
        split=Split(train_start=date(2020, 1, 1), validate_start=date(2020, 3, 1), test_start=date(2020, 4, 1), end=date(2020, 5, 1)),
        gates=(
            Gate(metric="auc", minimum=0.6, reason="better than the almanac"),
            Gate(metric="auc", maximum=0.95, reason="nobody knows the weather that well"),
            Gate(metric="ece", maximum=0.05, reason="used as a probability"),
        ),
        cost=CostMatrix(miss=5, false_alarm=1),
    )


@pytest.fixture
def forecast() -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    """4,000 calibrated predictions with their outcomes and slice columns, one value of which is null."""
    rng = np.random.default_rng(11)
    p = rng.uniform(0.02, 0.98, size=4000)
    y = (rng.uniform(size=4000) < p).astype(int)
    towns = rng.choice(["Bergen", "Oslo", "Tromsø"], p=[0.7, 0.28, 0.02], size=4000)
    stations = pl.Series([None if k % 10 == 0 else k % 3 for k in range(4000)], dtype=pl.Int64)
    return y, p, pl.DataFrame({"town": towns, "station": stations})
