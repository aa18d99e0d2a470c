"""Metrics of quantiles against a brute force, and what a task is measured by."""

from datetime import date

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.evaluation import quantile_plots
from mlplatform.evaluation.evaluate import Champion, evaluate
from mlplatform.evaluation.measures import baselines_of, scorer, shown_metrics
from mlplatform.evaluation.plots import comparison
from mlplatform.evaluation.quantile_metrics import calibration_table, score_quantiles
from mlplatform.gate_specs import ChampionGate, Gate
from mlplatform.specs import ModelSpec, Split

LEVELS = (0.1, 0.5, 0.9)
PNG = b"\x89PNG"


def spec(**changes) -> ModelSpec:
    given = {
        "name": "wait",
        "description": "How long?",
        "task": "quantiles",
        "quantiles": LEVELS,
        "label_range": (-60.0, 300.0),
        "feature_service": "s",
        "inputs": {},
        "rows": lambda tables: tables["rows"],
        "row_key": ("id",),
        "request_fields": (),
        "slices": ("site",),
        "split": Split(train_start=date(2024, 1, 1), validate_start=date(2024, 2, 1), test_start=date(2024, 3, 1), end=date(2024, 4, 1)),
        "gates": (Gate(metric="coverage", minimum=0.7, maximum=0.9, reason="it promises .8"),),
        "champion_gate": ChampionGate(metric="pinball", tolerance=0.05),
    }
    return ModelSpec(**(given | changes))


@pytest.fixture(scope="module")
def measured() -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    """Labels, the true quantiles of their distribution, and a slice column."""
    rng = np.random.default_rng(5)
    spread = rng.uniform(1, 20, 4000)
    y = spread * rng.normal(size=4000)
    return y, spread[:, None] * np.array([-1.2816, 0.0, 1.2816]), pl.DataFrame({"site": rng.choice(["A", "B", "C"], 4000)})


@given(st.lists(st.tuples(st.floats(-500, 500), st.lists(st.floats(-500, 500), min_size=3, max_size=3)), min_size=1, max_size=20))
def test_every_metric_is_that_of_a_loop_over_the_rows(rows) -> None:
    y, q = np.array([r[0] for r in rows]), np.array([sorted(r[1]) for r in rows])
    losses = [
        [(level * (a - b)) if a >= b else ((1 - level) * (b - a)) for level, b in zip(LEVELS, row, strict=True)]
        for a, row in zip(y, q, strict=True)
    ]
    found = score_quantiles(y, q, LEVELS)
    assert found["pinball"] == pytest.approx(np.mean(losses), abs=1e-9)
    assert [found[f"pinball_{p}"] for p in ("p10", "p50", "p90")] == pytest.approx(np.mean(losses, axis=0), abs=1e-9)
    assert found["mae"] == pytest.approx(2 * found["pinball_p50"], abs=1e-9)
    assert found["coverage"] == np.mean([low <= a <= high for a, (low, _, high) in zip(y, q, strict=True)])
    assert found["crossed"] == 0


def test_the_true_quantiles_are_calibrated_and_crossed_ones_are_counted(measured) -> None:
    y, q, _ = measured
    found = score_quantiles(y, q, LEVELS)
    assert found["calibration_error"] < 0.01
    assert found["coverage_low"] < 0.8 < found["coverage_high"]
    assert calibration_table(y, q, LEVELS)["observed"].to_list() == pytest.approx(LEVELS, abs=0.02)
    assert score_quantiles(y, q[:, ::-1], LEVELS)["crossed"] == 1


def test_a_missing_answer_makes_every_metric_missing_and_wrong_shapes_are_refused(measured) -> None:
    y, q, _ = measured
    broken = q.copy()
    broken[7, 1] = np.nan
    found = score_quantiles(y, broken, LEVELS)
    assert {name for name, value in found.items() if np.isfinite(value)} == {"rows", "mean_label"}
    for labels, answers in ((y, q[:, :2]), (y[:5], q), (np.full(len(y), np.inf), q)):
        with pytest.raises(ValueError, match="must be"):
            score_quantiles(labels, answers, LEVELS)


def test_labels_are_clipped_wherever_they_are_measured(measured) -> None:
    y, q, _ = measured
    far = y.copy()
    far[0] = 100_000.0
    clipped = far.copy()
    clipped[0] = 300.0
    assert scorer(spec())(far, q) == score_quantiles(clipped, q, LEVELS)


def test_an_evaluation_of_quantiles_has_slices_gates_a_champion_and_pictures(measured) -> None:
    y, q, frame = measured
    baselines = baselines_of(spec(), pl.DataFrame({"label": y}), frame, (), ())
    result = evaluate(spec(), 2, y, q, frame, Champion(1, q * 1.5), baselines)
    assert result.passed
    assert [g.name for g in result.gates] == ["coverage_range", "champion"]
    assert result.metrics["pinball"] < result.baselines["constant"]["pinball"]
    assert sum(s["rows"] for s in result.slices) == len(y)
    assert {"mae", "coverage", "mae_low"} <= result.slices[0].keys()
    narrow = evaluate(spec(), 2, y, q * 0.2, frame)
    assert not narrow.passed
    pictures = [
        comparison(result, shown_metrics(spec())),
        quantile_plots.quantile_calibration(y, q, LEVELS, q * 1.5),
        quantile_plots.error_histogram(y, q, LEVELS),
        quantile_plots.quantile_slice_bars(result.slices, "site", 0.8),
    ]
    assert all(picture.startswith(PNG) for picture in pictures)
    with pytest.raises(ValueError, match="no slices"):
        quantile_plots.quantile_slice_bars(result.slices, "nowhere", 0.8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantiles": ()}, "if, and only if"),
        ({"task": "binary", "label_range": None}, "if, and only if"),
        ({"quantiles": (0.1, 0.9)}, "the median"),
        ({"quantiles": (0.9, 0.5, 0.1)}, "must ascend"),
        ({"label_range": (300.0, -60.0)}, "label_range"),
    ],
)
def test_a_declaration_that_does_not_fit_its_task_is_refused(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        spec(**changes)
