"""Copies of answered requests for shadow versions: asked beside the request path, logged as variant `shadow`, seen by no caller.

Belongs here: the queue of copies, its budget, the thread that works through it, the records. Does not belong here: which version is
the shadow (`router`), how features are read and scored (the batcher, given by whoever puts the application together).

The thread has an event loop, connections and a batcher of its own, so that a request-time function that hangs, a slow read or an
error ends there. Two bounds hold: at most `queue_rows` inputs wait and more are dropped, and after a batch that took t seconds the
thread rests for t * (1 / time_share - 1). What a caller still feels is the interpreter's lock, which all threads share; so the
thread keeps the usual priority: from a low one the system would take the processor while it holds that lock.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving_app.batcher import Scored
from serving_app.inputs import ParsedInputs
from serving_app.log_entry import LogEntry
from serving_app.log_records import log_entry
from serving_app.model_handle import ModelHandle, VersionRef
from serving_app.router import Choice, ModelRouter
from serving_app.traffic import Draw

Submit = Callable[[ModelHandle, ParsedInputs], Awaitable[Scored]]
_BATCH_ROWS = 128
_LONGEST_S = 5.0  # an answer that takes longer counts as failed
_JOIN_S = 2.0  # a thread that hangs does not hold up the end of the process
_BALANCE = "offered = answered + failed + dropped + waiting"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ShadowBudget:
    """Inputs that may wait, and the largest share of the time, in (0, 1], in which a shadow batch may be under way."""

    queue_rows: int
    time_share: float


@dataclass(frozen=True)
class _Copy:
    choice: Choice
    inputs: ParsedInputs
    request_id: str


class Shadow(Collector):
    """`offer` from the application's event loop. It never waits, and nothing a shadow version does reaches its caller."""

    def __init__(
        self,
        router: ModelRouter,
        open_scorer: Callable[[], AbstractAsyncContextManager[Submit]],
        write: Callable[[LogEntry], None],
        budget: ShadowBudget,
    ) -> None:
        """`open_scorer` is entered in the shadow's own event loop; `write` is called in the application's."""
        self._router = router
        self._open_scorer = open_scorer
        self._write = write
        self._budget = budget
        self._draw = Draw("shadow", "shadow")
        self._queue: deque[_Copy] = deque()
        self._wake = asyncio.Event()
        self._own = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._application: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._failing: set[VersionRef] = set()
        # In inputs; each is counted by one thread only, so that none is lost.
        self.offered = 0
        self.dropped = 0
        self.answered = 0
        self.failed = 0

    def start(self) -> None:
        self._application = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread; copies that still wait are dropped and counted."""
        self._closing = True
        self._rouse()
        await asyncio.to_thread(self._thread.join, _JOIN_S)
        if self._thread.is_alive():
            log.error("shadow_hangs", waiting=self.counts()["waiting"])
            return
        while self._queue:
            self.dropped += self._queue.popleft().inputs.rows
        log.info("shadow_closed", **self.counts())

    def offer(self, model: str, inputs: ParsedInputs, request_id: str) -> None:
        """A copy of an answered request for each of the model's shadow versions, or a count of what found no room."""
        for choice in self._router.shadows(model):
            slot = self._router.slot(model)
            if slot is not None and self._draw.place(request_id.encode()) * 100 >= slot.rules.shadow_share:
                continue
            waiting = self.counts()["waiting"]
            self.offered += inputs.rows
            if waiting + inputs.rows > self._budget.queue_rows:
                self.dropped += inputs.rows
                continue
            self._queue.append(_Copy(choice, inputs, request_id))
            # Looked at after the append: the first in an empty queue wakes the thread, the others find it awake.
            if len(self._queue) == 1:
                self._rouse()

    def counts(self) -> dict[str, int]:
        """Inputs, by what became of them; they balance at any moment."""
        answered, failed, dropped, offered = self.answered, self.failed, self.dropped, self.offered
        waiting = offered - answered - failed - dropped
        return {"offered": offered, "answered": answered, "failed": failed, "dropped": dropped, "waiting": waiting}

    def collect(self) -> Iterator[Metric]:
        """For Prometheus, read at scrape time."""
        counts = self.counts()
        waiting = counts.pop("waiting")
        for name, count in counts.items():
            yield CounterMetricFamily(f"mlplatform_shadow_{name}", f"Inputs copied to shadow versions: {name}; {_BALANCE}", value=count)
        yield GaugeMetricFamily("mlplatform_shadow_waiting", f"Inputs copied to shadow versions: waiting; {_BALANCE}", value=waiting)

    # --- in the shadow's own thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._own)
        try:
            self._own.run_until_complete(self._work())
        except Exception:  # whatever ended it: the service goes on without shadows, and says so
            log.exception("shadow_ended")
        finally:
            self._own.close()

    def _rouse(self) -> None:
        # A thread that has ended needs no waking: what waits is dropped at the end, or fills the queue and is dropped there.
        with suppress(RuntimeError):
            self._own.call_soon_threadsafe(self._wake.set)

    async def _work(self) -> None:
        async with self._open_scorer() as submit:
            while not self._closing:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                started = time.perf_counter()
                await asyncio.gather(*(self._ask(submit, copy) for copy in self._take()))
                busy = time.perf_counter() - started
                await asyncio.sleep(busy * (1 / self._budget.time_share - 1))

    def _take(self) -> list[_Copy]:
        taken = [self._queue.popleft()]
        rows = taken[0].inputs.rows
        while self._queue and rows + self._queue[0].inputs.rows <= _BATCH_ROWS:
            taken.append(self._queue.popleft())
            rows += taken[-1].inputs.rows
        return taken

    async def _ask(self, submit: Submit, copy: _Copy) -> None:
        handle, rows = copy.choice.handle, copy.inputs.rows
        started = time.perf_counter()
        try:
            # Parsed anew: the version that answered may have other fields.
            parsed = handle.parser.parse(copy.inputs.received, rows)
            async with asyncio.timeout(_LONGEST_S):
                scored = await submit(handle, parsed)
            if refused := scored.refused():
                raise RuntimeError(f"the view '{refused[0][1]}' has no usable value ({refused[0][2]})")
            entry = log_entry(copy.choice, copy.request_id, parsed, scored, (time.perf_counter() - started) * 1000)
        except Exception as error:  # noqa: BLE001 - any error of a shadow version is a count and a line, and ends here
            self.failed += rows
            if handle.ref not in self._failing:
                log.warning("shadow_fails", model=handle.name, version=handle.version, error=repr(error))
            self._failing.add(handle.ref)
            return
        self._failing.discard(handle.ref)
        self.answered += rows
        if self._application is not None and not self._application.is_closed():
            self._application.call_soon_threadsafe(self._write, entry)
