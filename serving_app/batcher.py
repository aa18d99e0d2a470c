"""Micro-batches: requests that arrive in the same turn of the event loop share one feature read and one prediction.

Belongs here: gathering, and giving each request its own part of the result. Does not belong here: parsing, routing, logging.
No timer: a lone request never waits, and under load a turn holds many.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlplatform.clock import Clock
from serving_app.features import Assembled, Found, KeyPlan, Reason
from serving_app.inputs import ParsedInputs
from serving_app.metrics import Metrics
from serving_app.model_handle import ModelHandle
from serving_app.online_features import OnlineFeatures
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable
from serving_app.row_texts import RowTexts

_NONE: tuple[str, ...] = ()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# A request of more rows than this is predicted beside the event loop, so that it does not hold up small ones.
_LARGE_ROWS = 256
# Requests are put together up to this many rows. A row costs half of what it costs at 256, and a full batch some ten milliseconds, for
# which requests wait that come meanwhile; only where so many wait already is there one.
_BATCH_ROWS = 1024


@dataclass(slots=True)
class Batch:
    """What was scored together.

    `predictions` (rows,), `texts` what answers and log say of each row, `quantiles` (rows, levels) where the model answers them (the
    prediction is their median). `moments`: of the begin and of the end of reading, assembling and predicting, by `time.perf_counter`.
    """

    requested_at: str  # ISO 8601 UTC, microseconds
    assembled: Assembled
    predictions: Sequence[float]
    texts: RowTexts
    quantiles: Sequence[Sequence[float]] | None = None
    moments: tuple[float, ...] = ()


@dataclass(slots=True)  # not frozen: there is one for each request, and it would cost three times as much
class Scored:
    """A request's part of a batch: its rows are `start` to `end`."""

    batch: Batch
    start: int
    end: int

    @property
    def predictions(self) -> Sequence[float]:
        return self.batch.predictions[self.start : self.end]

    @property
    def quantiles(self) -> Sequence[Sequence[float]] | None:
        """Of each row, where the model answers them."""
        return None if self.batch.quantiles is None else self.batch.quantiles[self.start : self.end]

    @property
    def answered(self) -> Sequence[bytes]:
        """What the answer says of each row."""
        return self.batch.texts.answered[self.start : self.end]

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """float64 (rows, features)."""
        return self.batch.assembled.matrix[self.start : self.end]

    @property
    def imputed(self) -> list[Sequence[str]]:
        """Of each row the views whose values were replaced by defaults."""
        return [self.batch.assembled.imputed.get(row, _NONE) for row in range(self.start, self.end)]

    def refused(self) -> list[tuple[int, str, Reason]]:
        """(row, view, why) where the contract says to refuse a view's missing or old value: then there is no prediction to give."""
        return [(row - self.start, view, why) for row, view, why in self.batch.assembled.refused if self.start <= row < self.end]


class Waiting(Protocol):
    """Who waits for a result, as `asyncio.Future` is. Told exactly once; `set_result` and `set_exception` raise nothing."""

    def done(self) -> bool:
        """Whether nobody waits any more."""
        ...

    def set_result(self, result: Scored, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


@dataclass(slots=True)
class _Job:
    parsed: ParsedInputs
    answer: Waiting


class Batcher:
    """Used from one event loop."""

    def __init__(self, online: OnlineFeatures, clock: Clock, metrics: Metrics) -> None:
        self._online = online
        self._clock = clock
        self._metrics = metrics
        self._waiting: dict[ModelHandle, list[_Job]] = {}
        self._due = False  # a flush comes with the next turn of the event loop
        self._running: set[asyncio.Task[None]] = set()
        # Versions with a batch under way: what comes meanwhile makes the next one, so that batches grow with the load.
        self._busy: set[ModelHandle] = set()

    def depth(self) -> tuple[int, int]:
        """(requests that wait for a batch, batches under way)."""
        return sum(map(len, self._waiting.values())), len(self._running)

    def submit(self, handle: ModelHandle, parsed: ParsedInputs) -> "asyncio.Future[Scored]":
        """The result for one request, by exactly this handle."""
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self.enqueue(handle, parsed, answer)
        return answer

    def enqueue(self, handle: ModelHandle, parsed: ParsedInputs, answer: Waiting) -> None:
        """The same, told to whoever waits for it."""
        if parsed.rows > _LARGE_ROWS:  # large alone: it neither waits for the small ones nor they for it
            self._start(self._run(handle, [_Job(parsed, answer)]))
            return
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._flush)
        jobs = self._waiting.get(handle)
        if jobs is None:
            self._waiting[handle] = [_Job(parsed, answer)]
        else:
            jobs.append(_Job(parsed, answer))

    def _flush(self) -> None:
        self._due = False
        for handle in [h for h in self._waiting if h not in self._busy]:
            self._busy.add(handle)
            self._start(self._work(handle))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _work(self, handle: ModelHandle) -> None:
        """Batches of one version, one after the other, until nothing waits."""
        try:
            while jobs := self._waiting.pop(handle, None):
                for batch in _batches(jobs):
                    await self._run(handle, batch)
                # Who asked while the batch was computed stands in the sockets still: one look at them makes the next batch larger.
                await asyncio.sleep(0)
        finally:
            self._busy.discard(handle)

    async def _run(self, handle: ModelHandle, jobs: list[_Job]) -> None:
        try:
            started = time.perf_counter()
            plan = handle.plan.keys([job.parsed for job in jobs])
            found = await self._online.read(handle.plan.project, plan)
            read = time.perf_counter()
            self._metrics.stages.observe(handle.stages["features"], read - started)
            # After the read: what was stored by then had been made available, so no value is newer than its request.
            now = self._clock.now()
            assembled, predictions, *spent = await self._compute(handle, jobs, plan, found, now)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the requests that wait, not to the event loop
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                # One request's inputs must not fail its neighbours': each is tried alone.
                await asyncio.gather(*(self._run(handle, [job]) for job in jobs))
            return
        at = now if assembled.at_us == (now - _EPOCH) // _MICROSECOND else _EPOCH + assembled.at_us * _MICROSECOND
        told = at.isoformat(timespec="microseconds")
        moments = started, read, *spent
        points, quantiles = (predictions, None) if handle.median is None else ([row[handle.median] for row in predictions], predictions)
        texts = handle.writer.write(assembled, points, quantiles)
        batch = Batch(told, assembled, points, texts, quantiles, moments)
        start = 0
        for job in jobs:
            end = start + job.parsed.rows
            if not job.answer.done():  # the caller may have been cancelled
                job.answer.set_result(Scored(batch, start, end))
            start = end

    async def _compute(
        self, handle: ModelHandle, jobs: list[_Job], plan: KeyPlan, found: Sequence[Found], now: datetime
    ) -> tuple[Assembled, list[Any], float, float]:
        started = time.perf_counter()
        columns = handle.parser.columns([job.parsed for job in jobs], handle.plan.fields)
        whole = handle.plan.assemble(columns, plan, found, (now - _EPOCH) // _MICROSECOND)
        with np.errstate(over="ignore"):
            rows = whole.matrix.astype(np.float32)  # as the model sees it
        infinite = np.isinf(rows)
        if infinite.any():
            raise _not_finite(handle, *(int(i[0]) for i in np.nonzero(infinite)))
        ready = time.perf_counter()
        beside = len(jobs) == 1 and len(rows) > _LARGE_ROWS
        predictions = await asyncio.to_thread(handle.predict, rows) if beside else handle.predict(rows)
        done = time.perf_counter()
        self._metrics.stages.observe(handle.stages["assemble"], ready - started)
        self._metrics.stages.observe(handle.stages["predict"], done - ready)
        self._count(handle, whole, len(rows))
        return whole, predictions.tolist(), ready, done

    def _count(self, handle: ModelHandle, whole: Assembled, rows: int) -> None:
        metrics = self._metrics
        metrics.batch_rows.observe((handle.name,), rows)
        for view, ages in zip(handle.plan.views, whole.ages_s, strict=True):
            metrics.feature_age.observe_all((handle.name, view.name), ages)
        for views in whole.shortfalls.values():
            for view_name, why in views.items():
                metrics.shortfalls.add((handle.name, view_name, why))
        for names in whole.imputed.values():
            for name in names:
                metrics.imputed.add((handle.name, name))


def _batches(jobs: list[_Job]) -> list[list[_Job]]:
    """Jobs in their order, put together up to the limit."""
    batches: list[list[_Job]] = []
    rows = _BATCH_ROWS
    for job in jobs:
        if rows + job.parsed.rows > _BATCH_ROWS:
            batches.append([])
            rows = 0
        batches[-1].append(job)
        rows += job.parsed.rows
    return batches


def _not_finite(handle: ModelHandle, row: int, column: int) -> ProblemError:
    """A feature came out infinite: nothing the model has seen, so it gets no prediction."""
    feature = handle.contract.features[column]
    text = f"the feature '{feature.name}' comes out infinite"
    if feature.kind == "view":
        return unavailable("features-unavailable", f"input {row}: {text}", (FieldError(text, input=row),))
    return invalid_input([FieldError(f"{text} for these values", input=row)])


def _fail(job: _Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
