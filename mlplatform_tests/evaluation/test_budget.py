"""What a version costs to serve is measured so that a busy machine stops nothing, and too much of it stops the version."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xgboost as xgb

from mlplatform.evaluation.budget import BATCH, judge_budget, measure_cost
from mlplatform.gate_specs import ServingBudget
from mlplatform.records import PredictionCost

BUDGET = ServingBudget(model_bytes=1000, cpu_ms=2.0, cpu_ms_100=8.0)


def ticking(durations_ms: list[float]) -> Callable[[], int]:
    """A clock by which the predictions take these times, the last one for ever after."""

    def read() -> Iterator[int]:
        now = 0
        for duration in [*durations_ms, *[durations_ms[-1]] * 1000]:
            yield now
            now += int(duration * 1e6)
            yield now

    return read().__next__


def small_booster(trees: int) -> xgb.Booster:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 5))
    return xgb.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, xgb.DMatrix(rows, rows[:, 0] > 0), trees)


def many_trees(booster: xgb.Booster, trees: int) -> bytes:
    """The booster's trees over and over, in its own format."""
    told = json.loads(bytes(booster.save_raw("json")))
    model = told["learner"]["gradient_booster"]["model"]
    few = model["trees"]
    model["trees"] = [{**few[n % len(few)], "id": n} for n in range(trees)]
    model["tree_info"] = [0] * trees
    model["iteration_indptr"] = list(range(trees + 1))
    model["gbtree_model_param"]["num_trees"] = str(trees)
    grown = xgb.Booster()
    grown.load_model(bytearray(json.dumps(told).encode()))
    assert grown.num_boosted_rounds() == trees
    return bytes(grown.save_raw("ubj"))


def test_a_model_of_fifty_thousand_trees_is_over_the_budget_and_one_of_three_hundred_far_below(tmp_path: Path) -> None:
    booster = small_booster(300)
    grown = many_trees(booster, 50_000)
    rows = np.zeros((1, 5))
    cost = measure_cost(booster.inplace_predict, rows, len(booster.save_raw("ubj")))
    assert cost.model_bytes * 50 < ServingBudget().model_bytes
    assert cost.cpu_ms > 0
    assert cost.cpu_ms_100 > 0
    size = judge_budget(ServingBudget(), PredictionCost(len(grown), 0.1, 0.1))[0]
    assert not size.passed
    assert "MB, 32 may be" in size.reason


@pytest.mark.parametrize(
    ("cost", "failed"),
    [
        (PredictionCost(1000, 2.0, 8.0), []),
        (PredictionCost(1001, 2.0, 8.0), ["model_bytes"]),
        (PredictionCost(1000, 2.01, 8.0), ["cpu_ms"]),
        (PredictionCost(1000, 2.0, 8.01), ["cpu_ms_100"]),
    ],
)
def test_each_part_of_the_budget_stops_a_version_and_says_by_how_much(cost: PredictionCost, failed: list[str]) -> None:
    results = judge_budget(BUDGET, cost)
    assert [r.name for r in results if not r.passed] == failed
    assert all(r.blocking for r in results)
    assert "a prediction of a row takes 2.0" in results[1].reason


def test_the_best_of_many_counts_however_busy_the_machine_was_meanwhile() -> None:
    cost = measure_cost(lambda rows: rows, np.zeros((3, 2)), 10, ticking([10.0] * 20 + [1.5] + [10.0] * 20 + [2.5] + [10.0]))
    assert (cost.cpu_ms, cost.cpu_ms_100) == (1.5, 2.5)


def test_a_slow_model_is_not_asked_thirty_times() -> None:
    asked: list[int] = []

    def slow(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return rows

    cost = measure_cost(slow, np.zeros((250, 2)), 10, ticking([300.0]))
    assert cost == PredictionCost(10, 300.0, 300.0)
    assert asked == [BATCH, 1, 1, BATCH, BATCH]


def test_fewer_rows_than_a_batch_are_repeated_and_none_is_an_error() -> None:
    seen: list[np.ndarray] = []

    def keep(rows: np.ndarray) -> np.ndarray:
        seen.append(rows)
        return rows

    measure_cost(keep, np.array([[1.0, 2.0], [3.0, 4.0]]), 10)
    assert seen[0].shape == (BATCH, 2)
    assert seen[0][:4].tolist() == [[1.0, 2.0], [3.0, 4.0]] * 2
    with pytest.raises(ValueError, match="no rows"):
        measure_cost(keep, np.zeros((0, 2)), 10)
