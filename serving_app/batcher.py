"""Micro-batches: requests that arrive in the same turn of the event loop share one feature read and one prediction.

Belongs here: gathering, and giving each request its own part of the result. Does not belong here: parsing, routing, logging.
No timer: a lone request never waits, and under load a turn holds many.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

from mlplatform.clock import Clock
from serving_app.features import Assembled, Found, KeyPlan
from serving_app.inputs import ParsedInputs
from serving_app.metrics import Metrics
from serving_app.model_handle import ModelHandle
from serving_app.online_features import OnlineFeatures
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# More rows than this are computed beside the event loop, so that one large request does not hold up small ones.
_INLINE_ROWS = 256


@dataclass(frozen=True)
class Scored:
    """One request's part of a batch: `matrix` float64 (rows, features), `predictions` float32 (rows,), the rest per row."""

    at: datetime
    matrix: npt.NDArray[np.float64]
    predictions: npt.NDArray[np.float32]
    ages_s: list[dict[str, float | None]]
    imputed: list[tuple[str, ...]]
    # Where the contract says to refuse a view's missing or old value; then there are no predictions to give.
    refused: list[tuple[int, str, str]]


@dataclass(frozen=True)
class _Job:
    parsed: ParsedInputs
    answer: "asyncio.Future[Scored]"


class Batcher:
    """Used from one event loop."""

    def __init__(self, online: OnlineFeatures, clock: Clock, metrics: Metrics) -> None:
        self._online = online
        self._clock = clock
        self._metrics = metrics
        self._waiting: dict[ModelHandle, list[_Job]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def submit(self, handle: ModelHandle, parsed: ParsedInputs) -> "asyncio.Future[Scored]":
        """The result for one request, by exactly this handle."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        job = _Job(parsed, loop.create_future())
        self._waiting.setdefault(handle, []).append(job)
        return job.answer

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for handle, jobs in waiting.items():
            task = asyncio.create_task(self._run(handle, jobs))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, handle: ModelHandle, jobs: list[_Job]) -> None:
        try:
            plan = handle.plan.keys([j.parsed for j in jobs])
            found = await self._online.read(handle.plan.project, plan.reads)
            # After the read: what was stored by then had been made available, so no value is newer than its request.
            now = self._clock.now()
            scored = await self._compute(handle, jobs, plan, found, now)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the requests that wait, not to the event loop
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                # One request's inputs must not fail its neighbours': each is tried alone.
                await asyncio.gather(*(self._run(handle, [job]) for job in jobs))
            return
        for job, result in zip(jobs, scored, strict=True):
            if not job.answer.done():  # the caller may have been cancelled
                job.answer.set_result(result)

    async def _compute(
        self, handle: ModelHandle, jobs: list[_Job], plan: KeyPlan, found: Sequence[Found] | None, now: datetime
    ) -> list[Scored]:
        rows = sum(j.parsed.rows for j in jobs)
        self._metrics.batch_rows.labels(handle.name).observe(rows)
        work = (handle, jobs, plan, found, now)
        whole, predictions = _score(*work) if rows <= _INLINE_ROWS else await asyncio.to_thread(_score, *work)
        for (view, why), count in whole.shortfalls.items():
            self._metrics.shortfalls.labels(handle.name, view, why).inc(count)
        return _split(whole, predictions, [j.parsed.rows for j in jobs], now)


def _score(
    handle: ModelHandle, jobs: list[_Job], plan: KeyPlan, found: Sequence[Found] | None, now: datetime
) -> tuple[Assembled, npt.NDArray[np.float32]]:
    columns = handle.parser.columns([j.parsed for j in jobs])
    whole = handle.plan.assemble(columns, plan, found, (now - _EPOCH) // timedelta(microseconds=1))
    with np.errstate(over="ignore"):
        infinite = np.isinf(whole.matrix.astype(np.float32))  # as the model would see it
    if infinite.any():
        raise _not_finite(handle, *(int(i[0]) for i in np.nonzero(infinite)))
    return whole, handle.predict(whole.matrix)


def _not_finite(handle: ModelHandle, row: int, column: int) -> ProblemError:
    """A feature came out infinite: nothing the model has seen, so it gets no prediction."""
    feature = handle.contract.features[column]
    text = f"the feature '{feature.name}' comes out infinite"
    if feature.kind == "view":
        return unavailable("features-unavailable", f"input {row}: {text}", (FieldError(text, input=row),))
    return invalid_input([FieldError(f"{text} for these values", input=row)])


def _split(whole: Assembled, predictions: npt.NDArray[np.float32], sizes: Sequence[int], now: datetime) -> list[Scored]:
    parts = []
    start = 0
    for size in sizes:
        end = start + size
        refused = [(row - start, view, why) for row, view, why in whole.refused if start <= row < end]
        parts.append(
            Scored(now, whole.matrix[start:end], predictions[start:end], whole.ages_s[start:end], whole.imputed[start:end], refused)
        )
        start = end
    return parts


def _fail(job: _Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
