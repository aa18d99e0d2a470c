"""Every plot is a PNG small enough to live inside an asset's metadata, for odd rows too."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mlplatform.evaluation import plots
from mlplatform.evaluation.evaluate import Champion, evaluate
from mlplatform.figures import markdown
from mlplatform.specs import CostMatrix, ModelSpec

Forecast = tuple[np.ndarray, np.ndarray, pl.DataFrame]


def assert_small_png(picture: bytes) -> None:
    assert picture.startswith(b"\x89PNG")
    text = markdown(picture, "a plot")
    assert text.startswith("![a plot](data:image/png;base64,")
    assert len(text) < 80_000


def test_every_plot_of_an_evaluation_is_a_small_png(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    found = evaluate(spec, 2, y, p, frame, Champion(1, p * 0.9), {"constant": np.full(len(y), 0.5), "logistic": p**2})
    assert_small_png(plots.reliability_diagram(y, p, champion=p * 0.9))
    assert_small_png(plots.slice_bars(found.slices, "town", found.metrics["auc"]))
    assert_small_png(plots.cost_plot(y, p, CostMatrix(miss=5, false_alarm=1)))
    assert_small_png(plots.score_histogram(y, p))
    assert_small_png(plots.comparison(found))
    assert_small_png(plots.comparison(replace(found, champion_version=None, champion_metrics=None, baselines={})))


def test_rows_of_a_single_class_and_a_single_slice_are_drawn(spec: ModelSpec) -> None:
    y, p, frame = np.ones(5), np.full(5, 1.0), pl.DataFrame({"town": ["a"] * 5, "station": [None] * 5})
    found = evaluate(spec, 1, y, p, frame)
    assert_small_png(plots.reliability_diagram(y, p))
    assert_small_png(plots.slice_bars(found.slices, "station", found.metrics["auc"]))
    assert_small_png(plots.score_histogram(y, p))
    assert_small_png(plots.comparison(found))


def test_slices_nobody_scored_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no slices of column 'x'"):
        plots.slice_bars([], "x", 0.5)


def test_the_same_numbers_give_the_same_picture(forecast: Forecast) -> None:
    y, p, _ = forecast
    assert plots.score_histogram(y, p) == plots.score_histogram(y, p)


def test_a_picture_too_large_for_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match="draw fewer points"):
        markdown(b"x" * 200_000, "huge")
