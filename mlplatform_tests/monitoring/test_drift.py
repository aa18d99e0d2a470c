"""Drift as Evidently measures it: seen where it is, not where nothing changed, never where nothing was measured."""

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlplatform.figures import markdown
from mlplatform.monitoring.drift import THRESHOLDS, data_drift, drift_plot, prediction_drift


def rows(n: int, seed: int, shift: float = 0.0, storm: float = 0.1) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "wind": rng.gamma(2, 5, size=n) + shift,
            "temp": rng.normal(10, 5, size=n),
            "sky": rng.choice(["clear", "cloud", "storm"], p=[0.6 - storm / 2, 0.4 - storm / 2, storm], size=n),
            "code": rng.integers(0, 4, size=n).astype(float),
            "same": np.ones(n),
            "flag": rng.uniform(size=n) < 0.3,
            "holes": np.where(rng.uniform(size=n) < 0.2, np.nan, rng.normal(size=n)),
            "never": pl.Series([None] * n, dtype=pl.Float64),
        }
    )


COLUMNS = ("wind", "temp", "sky", "code", "same", "flag", "holes", "never")


@pytest.mark.parametrize("method", list(THRESHOLDS))
def test_nothing_drifts_between_two_samples_of_one_world(method: str) -> None:
    found = data_drift(rows(5000, 1), rows(3000, 2), COLUMNS, model="m", categorical=("code",), method=method)  # type: ignore[arg-type]
    assert found is not None
    assert (found.drifted, found.columns, found.not_compared) == (0, 7, ("never",))
    assert found.scores["same"] == 0
    assert all(np.isfinite(v) for v in found.scores.values())
    assert found.drifted_share == 0


@pytest.mark.parametrize("method", list(THRESHOLDS))
def test_a_shifted_number_and_a_commoner_category_drift_and_nothing_else(method: str) -> None:
    found = data_drift(rows(5000, 1), rows(3000, 2, shift=10, storm=0.4), COLUMNS, model="m", method=method)  # type: ignore[arg-type]
    assert found is not None
    assert {c for c, v in found.scores.items() if v >= found.threshold} == {"wind", "sky"}
    assert found.drifted == 2


def test_the_score_is_the_population_stability_index_of_the_shares() -> None:
    reference, current = pl.DataFrame({"sky": ["a"] * 600 + ["b"] * 400}), pl.DataFrame({"sky": ["a"] * 300 + ["b"] * 700})
    found = data_drift(reference, current, ["sky"], model="m")
    assert found is not None
    assert found.scores["sky"] == pytest.approx((0.6 - 0.3) * np.log(0.6 / 0.3) + (0.4 - 0.7) * np.log(0.4 / 0.7))


def test_a_source_that_fell_silent_is_drift() -> None:
    silent = rows(3000, 2).with_columns(pl.lit(None, pl.Float64).alias("wind"), pl.lit(None).alias("sky"))
    found = data_drift(rows(5000, 1), silent, COLUMNS, model="m")
    assert found is not None
    assert {c for c, v in found.scores.items() if v >= found.threshold} == {"wind", "sky"}


def test_a_column_that_appears_after_having_been_empty_is_drift() -> None:
    found = data_drift(rows(5000, 1), rows(3000, 2).with_columns(pl.lit(1.0).alias("never")), COLUMNS, model="m")
    assert found is not None
    assert found.drifted == 1
    assert found.scores["never"] > found.threshold


def test_a_constant_that_became_another_constant_is_drift() -> None:
    found = data_drift(rows(5000, 1), rows(3000, 2).with_columns(pl.lit(2.0).alias("same")), ["same"], model="m")
    assert found is not None
    assert found.drifted == 1


def test_one_absurd_value_does_not_hide_a_shift() -> None:
    absurd = pl.Series([1e9]).extend(rows(5000, 1)["wind"][1:])
    for reference, current in ((absurd, rows(3000, 2, shift=6)["wind"]), (rows(5000, 1)["wind"], absurd + 6)):
        found = data_drift(reference.alias("wind").to_frame(), current.alias("wind").to_frame(), ["wind"], model="m")
        assert found is not None
        assert found.drifted == 1


def test_codes_are_compared_by_value_whether_stored_as_integers_or_floats() -> None:
    reference, current = rows(5000, 1), rows(3000, 2).with_columns(pl.col("code").cast(pl.Int64))
    found = data_drift(reference, current, ["code"], model="m", categorical=("code",))
    assert found is not None
    assert found.scores["code"] < 0.02


def test_times_are_compared_as_numbers() -> None:
    moments = pl.DataFrame({"t": pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 2, 1), "1h", time_zone="UTC", eager=True)})
    found = data_drift(moments, moments, ["t"], model="m")
    assert found is not None
    assert found.scores["t"] == 0


@pytest.mark.parametrize("n", [0, 1, 199])
def test_too_few_rows_measure_nothing_rather_than_no_drift(n: int) -> None:
    assert data_drift(rows(5000, 1), rows(n, 2), COLUMNS, model="m") is None
    assert data_drift(rows(n, 1), rows(5000, 2), COLUMNS, model="m") is None
    assert prediction_drift(np.full(1000, 0.5), np.full(n, 0.5), model="m") is None


def test_columns_that_are_not_there_or_have_no_value_are_errors() -> None:
    with pytest.raises(ValueError, match="current rows lack columns"):
        data_drift(rows(500, 1), rows(500, 2).drop("wind"), COLUMNS, model="m")
    with pytest.raises(ValueError, match="has a value"):
        data_drift(rows(500, 1), rows(500, 2), ["never"], model="m")


def test_prediction_drift_sees_a_model_that_changed_its_mind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.beta(2, 5, size=4000), rng.beta(4, 4, size=1000)
    found = prediction_drift(before, after, model="m", html=tmp_path / "deep" / "report.html")
    assert found is not None
    assert (found.kind, found.drifted, found.columns) == ("prediction_drift", 1, 1)
    still = prediction_drift(before, rng.beta(2, 5, size=1000), model="m")
    assert still is not None
    assert still.drifted == 0
    assert b"<html" in (tmp_path / "deep" / "report.html").read_bytes()[:2000].lower()


def test_sixty_columns_of_a_long_history_take_seconds_and_the_same_seed_the_same_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"f{k}" for k in range(60)]
    reference = pl.DataFrame({n: rng.normal(size=100_000) for n in names})
    current = pl.DataFrame({n: rng.normal(size=6_000) for n in names})
    start = time.process_time()
    found = data_drift(reference, current, names, model="m", html=tmp_path / "report.html", seed=7)
    spent = time.process_time() - start
    assert found is not None
    assert (found.reference_rows, found.current_rows) == (100_000, 6_000)
    again = data_drift(reference, current, names, model="m", seed=7)
    assert again is not None
    assert again.scores == found.scores
    assert spent < 20  # about 4 s of processor time on an idle core; the bound only catches a change of order


def test_the_plot_of_scores_is_small() -> None:
    found = data_drift(rows(5000, 1), rows(3000, 2, shift=10), COLUMNS, model="m")
    assert found is not None
    picture = drift_plot(found)
    assert picture.startswith(b"\x89PNG")
    assert len(markdown(picture, "drift")) < 80_000
