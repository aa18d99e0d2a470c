"""A slice gate stops what is broken for somebody, and not what only looks so."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from mlplatform.evaluation.evaluate import evaluate
from mlplatform.evaluation.slice_gates import judge_slices, slice_gate_names
from mlplatform.evaluation.slices import quantile_slices, slice_metrics
from mlplatform.gate_specs import SliceGate
from mlplatform.specs import ModelSpec

FLOOR = SliceGate(column="town", metric="auc", minimum=0.6, reason="for everybody")
CEILING = SliceGate(column="town", metric="log_loss", maximum=0.69, reason="for everybody")


def forecasts(rng: np.random.Generator, sizes: dict[str, int], broken: str = "") -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    """Calibrated forecasts with an AUC of about .74, those of one town mixed up among its rows."""
    towns = np.repeat(list(sizes), list(sizes.values()))
    p = rng.beta(1.6, 4.4, size=len(towns))
    y = (rng.random(len(towns)) < p).astype(int)
    inside = towns == broken
    p[inside] = rng.permutation(p[inside])
    return y, p, pl.DataFrame({"town": towns})


def one_slice(**values: Any) -> dict[str, Any]:
    return {"column": "town", "value": "Oslo", "pooled": 0, "rows": 500, "small": False, **values}


def test_a_town_for_which_the_model_guesses_is_named_although_all_rows_together_are_fine(spec: ModelSpec) -> None:
    y, p, frame = forecasts(np.random.default_rng(3), {"Bergen": 9000, "Oslo": 4000, "Narvik": 700}, broken="Narvik")
    found = evaluate(spec.model_copy(update={"slices": ("town",), "slice_gates": (FLOOR, CEILING)}), 1, y, p, frame)
    gate, loss = (g for g in found.gates if g.name.endswith("_by_town"))
    assert all(g.passed for g in found.gates if g not in (gate, loss))
    assert not found.passed
    assert (gate.name, gate.passed) == ("auc_minimum_by_town", False)
    assert "auc of town Narvik is 0.5" in gate.reason
    assert "over 700 rows: below 0.6 beyond doubt" in gate.reason
    assert gate.value == pytest.approx(0.5, abs=0.07)


def test_chance_in_small_slices_stops_nothing_where_their_figures_alone_would() -> None:
    rng = np.random.default_rng(4)
    sizes = {f"town {n}": 200 for n in range(20)}
    floor = SliceGate(column="town", metric="auc", minimum=0.68, reason="for everybody")
    draws = [slice_metrics(*forecasts(rng, sizes), ["town"]) for _ in range(60)]
    by_figure = np.mean([min(s["auc"] for s in slices) < 0.68 for slices in draws])
    by_gate = np.mean([not judge_slices((floor,), slices)[0].passed for slices in draws])
    assert by_figure > 0.5
    assert by_gate <= 0.05


def test_a_slice_is_judged_from_its_number_of_rows_on_and_the_reason_counts_the_others() -> None:
    bad = one_slice(auc=0.5, auc_low=0.45, auc_high=0.55)
    assert not judge_slices((FLOOR,), [{**bad, "rows": 200}])[0].passed
    (passed,) = judge_slices((FLOOR,), [one_slice(auc=0.7, auc_low=0.65, auc_high=0.75), {**bad, "value": "Ny", "rows": 199}])
    assert passed.passed
    assert "1 of fewer rows not judged" in passed.reason
    (nothing,) = judge_slices((FLOOR,), [{**bad, "rows": 199}])
    assert nothing.passed
    assert "no town has 200 rows; 1 of fewer rows not judged" in nothing.reason


def test_the_bound_of_the_interval_decides_on_either_side() -> None:
    floor = [judge_slices((FLOOR,), [one_slice(auc=0.55, auc_low=0.4, auc_high=high)])[0].passed for high in (0.599, 0.6)]
    ceiling = [judge_slices((CEILING,), [one_slice(log_loss=0.8, log_loss_low=low, log_loss_high=0.9)])[0].passed for low in (0.691, 0.69)]
    assert floor == ceiling == [False, True]


def test_rare_values_are_judged_together() -> None:
    rng = np.random.default_rng(5)
    y, p, frame = forecasts(rng, {"Bergen": 5000, "rare": 900}, broken="rare")
    town = frame["town"].to_numpy().astype("U8")
    town[5000:] = [f"rare {n % 90}" for n in range(900)]
    slices = slice_metrics(y, p, pl.DataFrame({"town": town}), ["town"])
    (result,) = judge_slices((FLOOR,), slices)
    assert not result.passed
    assert "auc of town (other) is" in result.reason


def test_a_slice_that_could_not_be_measured_fails() -> None:
    slices = slice_metrics([1] * 300 + [0, 1] * 150, [0.5] * 600, pl.DataFrame({"town": ["Oslo"] * 300 + ["Bergen"] * 300}), ["town"])
    (result,) = judge_slices((FLOOR,), slices)
    assert not result.passed
    assert "auc could not be measured for town Oslo" in result.reason
    assert not judge_slices((SliceGate(column="town", metric="ece", maximum=0.9, reason="no interval"),), slices)[0].passed


def test_quantiles_have_slice_gates_too() -> None:
    rng = np.random.default_rng(6)
    y = rng.normal(0, 10, 2000)
    q = np.tile([-12.8, 0.0, 12.8], (2000, 1))
    q[:500] += 30
    slices = quantile_slices(y, q, (0.1, 0.5, 0.9), pl.DataFrame({"town": ["Oslo"] * 500 + ["Bergen"] * 1500}), ["town"])
    gates = [SliceGate(column="town", metric=m, maximum=limit, reason="") for m, limit in (("mae", 12), ("pinball", 6))]
    gates.append(SliceGate(column="town", metric="coverage", minimum=0.6, reason=""))
    assert [(r.passed, "town Oslo" in r.reason) for r in judge_slices(gates, slices)] == [(False, True)] * 3


def test_names_are_unique_and_a_gate_is_declared_for_slices_that_there_are(spec: ModelSpec) -> None:
    assert slice_gate_names((FLOOR, CEILING, FLOOR)) == ("auc_minimum_by_town", "log_loss_maximum_by_town", "auc_minimum_by_town_2")
    with pytest.raises(ValueError, match=r"slices by \['country'\]"):
        ModelSpec(**{**dict(spec), "slice_gates": (FLOOR.model_copy(update={"column": "country"}),)})
    with pytest.raises(ValueError, match="one of them only"):
        SliceGate(column="town", metric="auc", minimum=0.5, maximum=0.9, reason="")
