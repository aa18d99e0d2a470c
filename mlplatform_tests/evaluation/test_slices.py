"""Slices add up, and say what they cannot know."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.evaluation.metrics import score
from mlplatform.evaluation.slices import slice_metrics


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.sampled_from(["a", "b", "c", "d", None])), max_size=60), st.integers(1, 6))
def test_every_row_is_in_exactly_one_slice_of_a_column(rows: list[tuple[int, float, str | None]], max_values: int) -> None:
    frame = pl.DataFrame({"s": [r[2] for r in rows]}, schema={"s": pl.String})
    found = slice_metrics([r[0] for r in rows], [r[1] for r in rows], frame, ["s"], max_values=max_values)
    assert sum(s["rows"] for s in found) == len(rows)
    assert len(found) <= max_values
    assert sum(s["pooled"] or 1 for s in found) == frame["s"].n_unique()
    json.dumps(found, allow_nan=False)


def test_a_slice_is_scored_like_its_rows_alone(forecast: tuple[np.ndarray, np.ndarray, pl.DataFrame]) -> None:
    y, p, frame = forecast
    oslo = next(s for s in slice_metrics(y, p, frame, ["town"]) if s["value"] == "Oslo")
    inside = (frame["town"] == "Oslo").to_numpy()
    expected = score(y[inside], p[inside])
    for name in ("base_rate", "mean_prediction", "auc", "auc_low", "log_loss", "ece"):
        assert oslo[name] == pytest.approx(expected[name])


def test_small_and_null_slices_are_marked(forecast: tuple[np.ndarray, np.ndarray, pl.DataFrame]) -> None:
    y, p, frame = forecast
    found = slice_metrics(y, p, frame, ["town", "station"])
    assert {s["value"] for s in found if s["small"]} == {"Tromsø"}
    assert [s["rows"] for s in found if s["value"] is None] == [400]
    assert [s["column"] for s in found] == ["town"] * 3 + ["station"] * 4


def test_a_slice_of_one_class_has_no_auc() -> None:
    found = slice_metrics([1, 1, 0], [0.5, 0.6, 0.1], pl.DataFrame({"s": ["a", "a", "b"]}), ["s"])
    assert [s["auc"] for s in found] == [None, None]


def test_misaligned_or_missing_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rows of slice columns for 2"):
        slice_metrics([0, 1], [0.1, 0.2], pl.DataFrame({"s": ["a"]}), ["s"])
    with pytest.raises(ValueError, match="nowhere"):
        slice_metrics([0], [0.1], pl.DataFrame({"s": ["a"]}), ["nowhere"])
