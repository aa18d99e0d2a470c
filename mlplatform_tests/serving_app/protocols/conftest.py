"""What the protocols' tests share: a model whose stored values are there, and what its booster says of features."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xgboost as xgb


@pytest.fixture
def model(make_model, tmp_path, put_values) -> Any:
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=60)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=120)
    put_values("all_stats", ["all"], [4.0], age_s=30)
    made = make_model()
    made.into_cache(tmp_path)
    return made


@pytest.fixture
def expected(model) -> Callable[..., list[float]]:
    """`expected(rows)`: the booster's own answers to rows of features."""

    def answer(rows: Any) -> list[float]:
        names = [f.name for f in model.contract.features]
        data = xgb.DMatrix(np.array(rows, dtype=np.float32), feature_names=names)
        return [float(p) for p in model.booster.predict(data)]

    return answer
