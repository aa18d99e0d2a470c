"""The summary adds up, and never scores what is not known."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.evaluation.metrics import score
from mlplatform.figures import markdown
from mlplatform.monitoring.performance import performance_plot, summarise

START = datetime(2024, 5, 1, tzinfo=UTC)


def outcomes(rows: list[tuple[int, str, int, float]]) -> pl.DataFrame:
    """(day, state, label, prediction) each."""
    return pl.DataFrame(
        {
            "event_date": [(START + timedelta(days=day)).date() for day, *_ in rows],
            "state": [r[1] for r in rows],
            "label": [float(r[2]) if r[1] == "known" else None for r in rows],
            "prediction": [r[3] for r in rows],
        },
        schema={"event_date": pl.Date, "state": pl.String, "label": pl.Float64, "prediction": pl.Float64},
    )


rows = st.tuples(st.integers(0, 4), st.sampled_from(["known", "pending", "missing"]), st.integers(0, 1), st.floats(0, 1))


@given(st.lists(rows, min_size=1, max_size=40))
def test_predictions_are_outcomes_missing_and_pending_in_each_day_and_overall(entries: list[tuple[int, str, int, float]]) -> None:
    summary = summarise(outcomes(entries), "m", score)
    for day in summary.by_day:
        assert day["predictions"] == day["outcomes"] + day["missing"] + day["pending"]
    assert sum(d["predictions"] for d in summary.by_day) == summary.predictions == len(entries)
    assert sum(d["outcomes"] for d in summary.by_day) == summary.outcomes
    assert sum(d["missing"] for d in summary.by_day) == summary.missing_outcomes
    assert [d["day"] for d in summary.by_day] == sorted({d["day"] for d in summary.by_day})
    assert summary.days == (summary.by_day[0]["day"], summary.by_day[-1]["day"])
    known = [(label, p) for _, state, label, p in entries if state == "known"]
    assert bool(summary.metrics) == bool(known)
    if known:
        assert summary.metrics["log_loss"] == pytest.approx(score([k[0] for k in known], [k[1] for k in known])["log_loss"])


def test_a_day_of_one_class_has_no_auc_and_a_day_without_outcomes_no_metrics() -> None:
    summary = summarise(outcomes([(0, "known", 1, 0.5), (0, "known", 1, 0.6), (1, "pending", 0, 0.5)]), "m", score)
    assert summary.by_day[0]["auc"] is None
    assert summary.by_day[0]["base_rate"] == 1.0
    assert "auc" not in summary.by_day[1]


def test_no_predictions_are_an_error_not_a_perfect_score() -> None:
    with pytest.raises(ValueError, match="no predictions of m"):
        summarise(outcomes([]), "m", score)


@pytest.mark.parametrize("days", [1, 30])
def test_the_plot_over_days_is_small_with_gaps_where_nothing_is_known(days: int) -> None:
    rng = np.random.default_rng(0)
    entries = [(d, "known" if d % 3 else "pending", int(rng.integers(2)), float(rng.uniform())) for d in range(days) for _ in range(20)]
    picture = performance_plot(summarise(outcomes(entries), "m", score))
    assert picture.startswith(b"\x89PNG")
    assert len(markdown(picture, "performance")) < 100_000


def test_quantiles_are_measured_as_quantiles_by_day_and_drawn() -> None:
    from functools import partial

    from mlplatform.evaluation.quantile_metrics import score_quantiles

    frame = outcomes([(day, state, 1, 0.0) for day in (0, 1) for state in ("known", "known", "missing")])
    frame = frame.with_columns(quantiles=pl.Series([[-1.0, 0.0, 2.0]] * frame.height, dtype=pl.List(pl.Float64)))
    summary = summarise(frame, "m", partial(score_quantiles, levels=(0.1, 0.5, 0.9)))
    assert (summary.outcomes, summary.missing_outcomes) == (4, 2)
    assert summary.metrics["mae"] == 1.0
    assert summary.metrics["coverage"] == 1.0
    assert [day["pinball_p50"] for day in summary.by_day] == [0.5, 0.5]
    assert performance_plot(summary).startswith(b"\x89PNG")
