"""Gates on what a version costs to serve: the bytes of its file, the processor time of a prediction.

Belongs here: timing something that predicts, and judging the figures. Does not belong here: loading it, the service's own time for a
request (`mlplatform bench serving`).
"""

import math
import time
from collections.abc import Callable

import numpy as np

from mlplatform.evaluation.metrics import Floats
from mlplatform.gate_specs import ServingBudget
from mlplatform.records import GateResult, PredictionCost

BATCH = 100
BUDGET_GATES = ("model_bytes", "cpu_ms", "cpu_ms_100")
_ROUNDS = 30
_ENOUGH_NS = 500_000_000  # a model that takes long is not asked thirty times
_REASON = "an answer waits for it, and so does every answer behind it"


def measure_cost(
    predict: Callable[[Floats], Floats], rows: Floats, model_bytes: int, clock: Callable[[], int] = time.thread_time_ns
) -> PredictionCost:
    """The best of many predictions of one row, and of 100, in processor time of the calling thread.

    `predict` must work on one thread, the caller's; `rows`: some inputs (n, d), repeated where there are fewer than 100. Other work on the
    machine can only add to a time, by evicting caches, and not where the thread is not running, so the least of many is the
    model's own. `clock`: nanoseconds. Raises ValueError for no rows.
    """
    if not len(rows):
        raise ValueError("no rows to time a prediction with")
    batch = np.ascontiguousarray(np.resize(rows, (BATCH, rows.shape[1])))
    predict(batch)  # the first one sets up buffers
    return PredictionCost(model_bytes, _best_ms(predict, batch[:1], clock), _best_ms(predict, batch, clock))


def _best_ms(predict: Callable[[Floats], Floats], rows: Floats, clock: Callable[[], int]) -> float:
    best, spent = math.inf, 0
    for _ in range(_ROUNDS):
        began = clock()
        predict(rows)
        took = clock() - began
        best, spent = min(best, took), spent + took
        if spent > _ENOUGH_NS:
            break
    return best / 1e6


def judge_budget(budget: ServingBudget, cost: PredictionCost) -> tuple[GateResult, ...]:
    """`BUDGET_GATES`, each blocking."""
    bytes_gate, row_gate, batch_gate = BUDGET_GATES
    size = f"the model file has {cost.model_bytes / 1e6:.2f} MB, {budget.model_bytes / 1e6:g} may be (a service holds several)"
    return (
        GateResult(bytes_gate, cost.model_bytes <= budget.model_bytes, cost.model_bytes, f"<= {budget.model_bytes}", size),
        _time(row_gate, "a row", cost.cpu_ms, budget.cpu_ms),
        _time(batch_gate, f"{BATCH} rows", cost.cpu_ms_100, budget.cpu_ms_100),
    )


def _time(name: str, what: str, measured: float, limit: float) -> GateResult:
    told = f"a prediction of {what} takes {measured:.2f} ms of a processor, {limit:g} may be"
    return GateResult(name, measured <= limit, measured, f"<= {limit:g}", f"{told} ({_REASON})")
