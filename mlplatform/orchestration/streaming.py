"""The streaming worker: reads event streams, keeps the windowed views' state, writes their rows as they become due.

Belongs here: the order of a round, starting anew, waiting for what is away. Does not belong here: windows (room
`features`), what is read and written (`stream_inputs`, `stream_outputs`), Dagster.

Delta is the truth: a start builds the state from the raw tables and what the streams hold beyond them, computes the rows of
the recent past and appends those that the tables lack. So the worker may be killed at any point.
"""

import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl
import structlog
from redis.exceptions import RedisError

from mlplatform.clients.lake import Lake
from mlplatform.clients.lease import Lease, LeaseHeldError
from mlplatform.clients.stream import StreamError
from mlplatform.clock import Clock, clock_from
from mlplatform.contracts import STREAM_LEASE
from mlplatform.feature_store.commands import open_client
from mlplatform.features.plan import ViewPlan, since_epoch
from mlplatform.features.stream_choice import reason_against
from mlplatform.features.stream_view import ViewState
from mlplatform.ingestion.arrival import partition_days, stream_order
from mlplatform.orchestration.feature_tables import STREAMED
from mlplatform.orchestration.stream_faults import AWAY, Stops
from mlplatform.orchestration.stream_inputs import Batch, Changes, StreamInputs
from mlplatform.orchestration.stream_metrics import HOST, StreamMetrics
from mlplatform.orchestration.stream_outputs import ViewOutput
from mlplatform.records import DayRange
from mlplatform.settings import Settings
from mlplatform.specs import SourceSpec

log = structlog.get_logger(__name__)

# How long an entry may take from the stream into the validated tables: for so long the batch knows less than the worker.
LANDING = timedelta(hours=1)
HOLD_S = 5.0  # how long ticks wait for the end of a stream that does not end
CARE_EVERY_S = 60.0  # forgetting, references, what came too late
WAIT_S = (0.5, 10.0)  # first and longest wait for what is away
STAND_BY_S = 0.5  # how often a worker that waits for the lease asks for it


@dataclass(frozen=True)
class StreamOptions:
    """`lateness`: how long after its time an event still restates rows. `keep`: how long rows wait for others of their group.

    `interval_s`: seconds from one round to the next. `limit`: entries of a stream a round. `days`: per source the days an
    event may lie on at a time, as ingestion has them; None: any. `lease_s`: after so long without a sign of life another
    worker takes over.
    """

    lateness: timedelta = timedelta(days=1)
    keep: timedelta = timedelta(days=4)
    interval_s: float = 0.25
    limit: int = 20_000
    days: Callable[[str, datetime], DayRange] | None = None
    lease_s: float = 6.0


class NothingToStreamError(ValueError):
    """No view can be streamed; names the reasons."""


def choose(plans: Mapping[str, ViewPlan], sources: Mapping[str, SourceSpec]) -> tuple[list[ViewPlan], dict[str, str]]:
    """The views the worker keeps, and for each other one the reason why not."""
    against = {name: reason for name, plan in plans.items() if (reason := reason_against(plan, sources)) is not None}
    return [plan for name, plan in plans.items() if name not in against], against


class Worker:
    """Keeps some views up to date. `step` is one round; `run` goes on until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        plans: Sequence[ViewPlan],
        sources: Mapping[str, SourceSpec],
        options: StreamOptions | None = None,
        metrics: StreamMetrics | None = None,
    ) -> None:
        if not plans:
            raise NothingToStreamError("no view can be streamed: `mlplatform stream --list` gives the reasons")
        self.options = options or StreamOptions()
        self.metrics = metrics or StreamMetrics()
        self.clock = clock
        self.lake = Lake(settings.lake_root, settings.storage_options())
        self.online = open_client(settings.online_redis_url, settings.online_cluster)
        self.inputs = StreamInputs(settings, self.lake, sources, plans, self.options.lateness, self.options.keep, self.options.days)
        self.outputs = {plan.name: ViewOutput(self.lake, self.online, plan) for plan in plans}
        self.states: dict[str, ViewState] = {}  # of the views that are not stopped
        self.stops = Stops(self.metrics)
        self._started = False
        self.lease = Lease(self.online, STREAM_LEASE, self.options.lease_s)
        self._number = 0  # of the lease under which the state was built
        self._behind: str | None = None  # the holder this worker waits for
        self._waiting_since: float | None = None
        self._cared = 0.0

    def close(self) -> None:
        with suppress(RedisError):  # then it runs out
            self.lease.release()
        self.inputs.close()
        self.online.close()

    # --- starting ---

    def start(self) -> None:
        """Builds the state and writes what is missing in the tables.

        Raises LeaseHeldError, LeaseLostError, StreamError, RedisError, MissingTableError.
        """
        self._number = self._lead()
        began, now = time.monotonic(), self.clock.now()
        self._started, self.states = False, {}
        # From where rows may be missing: what was late when the last row was written, and what came too late since.
        last = {name: min(output.open(now) or now, self.inputs.missed_at or now, now) for name, output in self.outputs.items()}
        since = {name: moment - self.options.lateness - LANDING for name, moment in last.items()}
        changes = self.inputs.restore(min(since.values()), now, self.options.limit)
        faults = changes.faults | self._kept_back(now)
        for name, fault in faults.items():
            self.stops.stop(name, fault)
        appended = 0
        for name in [name for name in self.outputs if name not in faults]:
            with self.stops.guard(name):
                appended += self._begin(name, changes.events.pop(name, None), since[name], now)
        self._started = True
        self.metrics.starts.inc()
        self.metrics.connected.set(1)
        seconds = round(time.monotonic() - began, 2)
        log.info("started", views=sorted(self.states), positions=self.inputs.positions, appended=appended, seconds=seconds, **_used())

    def _begin(self, name: str, events: pl.DataFrame | None, since: datetime, now: datetime) -> int:
        """A view's state from all its events; writes the rows from `since` on that are missing. Returns how many."""
        output, state = self.outputs[name], ViewState(self.outputs[name].plan, since_epoch(since))
        rows = state.advance(events, since_epoch(now)).rows
        state.warm(since_epoch(now))
        self.lease.check()
        appended = output.settle(rows, since, now, self._metadata(now))
        self.lease.check()
        output.publish(now)
        self.states[name] = state
        self.stops.go_on(name)
        return appended

    # --- one round ---

    def step(self) -> Batch:
        """Reads what has come and writes the rows that are due. Raises StreamError and LeaseHeldError with nothing taken in."""
        if self._lead() != self._number or not self._started:
            self.start()  # whoever held the lease in between wrote too
        now = self.clock.now()  # before reading: what happened by then and was published is read below
        horizon = since_epoch(self._horizon(now))
        try:
            batch = self.inputs.read(now, self.options.limit, self.states)
            hold = self._hold(batch)
            self._emit(batch.changes, now, horizon, hold)
        except StreamError:
            raise
        except BaseException:  # an interrupt too: what was read may not be in the state, or the state be ahead of the tables
            self._started = False
            raise
        for name in list(self.states):
            with self._stopping(name):
                self.lease.check()
                self.outputs[name].publish(now)
        if not hold:
            self._take_up_again(now)
        self._tell(batch, now)
        self._care()
        return batch

    def _emit(self, changes: Changes, now: datetime, horizon: int, hold: bool) -> None:
        for name, fault in (self._kept_back(now) | changes.faults).items():
            if name in self.states:
                self.stops.stop(name, fault)
                del self.states[name]
        for name, state in list(self.states.items()):
            output = self.outputs[name]
            with self._stopping(name):
                until = state.given if hold and not output.plan.event_triggered else since_epoch(now)
                emission = state.advance(changes.events.get(name), until, horizon)
                if not emission.rows.is_empty():
                    self.lease.check()
                    self.metrics.rows.labels(name).inc(output.write(emission.rows, now, self._metadata(now)))
                    self.metrics.restated.labels(name).inc(emission.restated)

    def _kept_back(self, now: datetime) -> dict[str, BaseException]:
        return self.inputs.contracts.kept_back([output.plan for output in self.outputs.values()], now)

    @contextmanager
    def _stopping(self, name: str) -> Iterator[None]:
        """A fault of the view's own within stops the view: its state is no longer that of its events, so it is given up."""
        with self.stops.guard(name):
            yield
        if name in self.stops:
            del self.states[name]

    def _take_up_again(self, now: datetime) -> None:
        """Tries the stopped views whose wait is over, each as a start does: what it missed is found by comparison."""
        due = self.stops.due()
        kept_back = self._kept_back(now) if due else {}
        for name in due:
            if self.inputs.missed:
                self._started = False  # the other views do not hold these entries yet: only a new start is exact
                return
            output = self.outputs[name]
            with self.stops.guard(name, everything=True):
                if name in kept_back:
                    raise kept_back[name]
                since = min(output.open(now) or now, now) - self.options.lateness - LANDING
                self._begin(name, self.inputs.restore_one(output.plan, since, now, self.options.limit), since, now)

    def _hold(self, batch: Batch) -> bool:
        """Whether ticks wait: entries of the time before them are still unread."""
        if batch.drained:
            self._waiting_since = None
            return False
        self._waiting_since = self._waiting_since or time.monotonic()
        return time.monotonic() - self._waiting_since < HOLD_S

    def _horizon(self, now: datetime) -> datetime:
        """Rows before it are not restated any more: what was read to its end then cannot have been late by more."""
        return (self.inputs.caught_up or now) - self.options.lateness

    def _metadata(self, now: datetime) -> dict[str, str]:
        mine = self._horizon(now) - LANDING
        told = {"at": now.isoformat(), "from": mine.isoformat(), "positions": self.inputs.positions}
        return {STREAMED: json.dumps(told), "writer": "mlplatform stream"}

    def _tell(self, batch: Batch, now: datetime) -> None:
        self.metrics.count(self.inputs.counts)
        for name, spec in self.inputs.sources.items():
            self.metrics.contract(name, self.inputs.contracts.of(name, now.date()), spec.contract.max_quarantine_share)
        self.metrics.behind.set(0.0 if batch.drained else self.inputs.behind_s())
        for name, output in self.outputs.items():
            self.metrics.fresh(name, output.newest, now)
        self.lease.note = {**self.lease.note, "stopped": dict(self.stops.reasons())}
        if batch.first_id is not None:
            self.metrics.latency.observe(time.time() - stream_order(batch.first_id)[0] / 1000)

    def _care(self) -> None:
        """Now and then: what is over is forgotten, and what came too late is counted once it has landed."""
        if time.monotonic() - self._cared < CARE_EVERY_S:
            return
        self._cared = time.monotonic()
        self.inputs.forget()
        self.inputs.refresh_references()
        if self.inputs.missed and self.inputs.missed_have_landed():
            log.info("what came too late has landed: starting anew", positions=self.inputs.missed)
            self._started = False

    # --- going on ---

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop` is set; the round under way is finished. What does not answer is waited for and told."""
        patience = WAIT_S[0]
        while not stop.is_set():
            began = time.monotonic()
            try:
                batch = self.step()
            except LeaseHeldError as held:
                self._stand_by(held)
                stop.wait(STAND_BY_S)
                continue
            except (*AWAY, pl.exceptions.PolarsError) as away:  # Polars' own where an object store does not answer
                self.metrics.connected.set(0)
                log.warning("waiting", reason=str(away) or type(away).__name__, seconds=patience)
                stop.wait(patience)
                patience = min(2 * patience, WAIT_S[1])
                continue
            self._at_work()
            patience = WAIT_S[0]
            if batch.entries:
                log.debug("round", entries=batch.entries, drained=batch.drained, seconds=round(time.monotonic() - began, 3))
            if batch.drained:
                stop.wait(max(0.0, self.options.interval_s - (time.monotonic() - began)))
        log.info("stopped", positions=self.inputs.positions, **_used())

    def _lead(self) -> int:
        number = self.lease.take()
        self.metrics.leads.set(1)
        return number

    def _stand_by(self, held: LeaseHeldError) -> None:
        """Told once for each holder: it may last for weeks."""
        self.metrics.leads.set(0)
        if held.holder != self._behind:
            self._behind = held.holder
            log.warning("standing by", holder=held.holder, reason="another worker keeps these views; this one takes over when it ends")

    def _at_work(self) -> None:
        self.metrics.connected.set(1)
        self._behind = None


def _used() -> dict[str, float]:
    """Processor time and memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu_s": round(time.process_time(), 2), "max_rss_mb": round(peak / (1_048_576 if sys.platform == "darwin" else 1024), 1)}


def declared() -> tuple[dict[str, ViewPlan], dict[str, SourceSpec]]:
    """The views and sources of every catalog of the installation. Imports Feast, which takes seconds."""
    from mlplatform.catalog.discover import catalogs
    from mlplatform.features.declared import plans

    found = catalogs()
    views = {name: plan for catalog in found for name, plan in plans(catalog.feature_package).items()}
    return views, {spec.name: spec for catalog in found for spec in catalog.sources}


def worker(settings: Settings, chosen: Sequence[ViewPlan], sources: Mapping[str, SourceSpec]) -> Worker:
    """A worker with the options of the settings."""
    from mlplatform.catalog.discover import catalogs

    homes = {spec.name: catalog for catalog in catalogs() for spec in catalog.sources}
    options = StreamOptions(
        lateness=timedelta(seconds=settings.stream_lateness_s),
        keep=timedelta(seconds=settings.stream_keep_s),
        interval_s=settings.stream_interval_s,
        days=lambda source, now: partition_days(homes[source], now),
    )
    return Worker(settings, clock_from(settings.clock), chosen, sources, options)


def serve(worker: Worker, metrics_port: int | None) -> None:
    """Runs the worker in this process until SIGTERM or SIGINT; then it ends its round and returns. Logs are JSON lines."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ]
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if metrics_port is not None:
        worker.metrics.serve(metrics_port)
        worker.lease.note = {**worker.lease.note, "metrics": f"{HOST}:{metrics_port}"}
    try:
        worker.run(stop)
    finally:
        worker.close()
