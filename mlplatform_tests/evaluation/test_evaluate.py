"""An evaluation holds everything a decision and a reader need."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.evaluation.evaluate import Champion, evaluate
from mlplatform.specs import ModelSpec

Forecast = tuple[np.ndarray, np.ndarray, pl.DataFrame]


def test_a_good_first_version_passes_every_gate(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    found = evaluate(spec, 1, y, p, frame, baselines={"constant": np.full(len(y), y.mean())})
    assert found.passed
    assert [g.name for g in found.gates] == ["auc_minimum", "auc_maximum", "ece_maximum", "champion"]
    assert found.rows == 4000
    assert found.champion_version is None
    assert found.baselines["constant"]["auc"] == 0.5
    assert {s["column"] for s in found.slices} == {"town", "station"}
    assert found.metrics["saving_low"] > 0.05


def test_a_leaking_version_is_stopped(spec: ModelSpec, forecast: Forecast) -> None:
    y, _, frame = forecast
    found = evaluate(spec, 1, y, np.where(y == 1, 0.99, 0.01), frame)
    assert not found.passed
    assert [g.name for g in found.gates if not g.passed] == ["auc_maximum"]


def test_a_challenger_worse_than_the_champion_on_the_same_rows_is_stopped(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    blurred = 0.5 + (p - 0.5) * 0.8
    found = evaluate(spec, 2, y, blurred, frame, champion=Champion(1, p))
    assert not found.passed
    assert found.champion_metrics is not None
    assert found.metrics["log_loss"] > found.champion_metrics["log_loss"] + spec.champion_gate.tolerance
    assert evaluate(spec, 2, y, p, frame, champion=Champion(1, blurred)).passed


def test_a_version_with_a_missing_prediction_never_passes(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    holed = p.copy()
    holed[7] = np.nan
    found = evaluate(spec, 2, y, holed, frame, champion=Champion(1, p))
    assert not any(g.passed for g in found.gates)


def test_no_rows_and_champions_on_other_rows_are_errors(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    with pytest.raises(ValueError, match="no test rows"):
        evaluate(spec, 1, y[:0], p[:0], frame.clear())
    with pytest.raises(ValueError, match="equal length"):
        evaluate(spec, 1, y, p, frame, champion=Champion(2, p[:-1]))


def test_rows_of_enough_days_make_the_champion_gate_a_paired_test(spec: ModelSpec, forecast: Forecast) -> None:
    y, p, frame = forecast
    start = datetime(2024, 1, 1, tzinfo=UTC)
    dated = frame.with_columns(event_timestamp=pl.Series([start + timedelta(days=row % 20) for row in range(len(y))]))
    assert "over 20 days" in evaluate(spec, 2, y, p, dated, champion=Champion(1, p * 0.9)).gates[-1].reason
    assert "points compared" in evaluate(spec, 2, y, p, frame, champion=Champion(1, p * 0.9)).gates[-1].reason
