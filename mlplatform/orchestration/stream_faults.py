"""Views of the streaming worker that are stopped because of a fault of their own: which, why, and when each is tried again.

Belongs here: what is one view's fault and what everybody's, the waits, telling it. Does not belong here: taking a view up again
(`streaming`), the metrics' names (`stream_metrics`).
"""

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
from deltalake.exceptions import DeltaError
from deltalake.exceptions import SchemaMismatchError as TableSchemaError
from polars.exceptions import PanicException
from redis.exceptions import RedisError

from mlplatform.clients.lake import MissingTableError, TableMovedError
from mlplatform.clients.lease import LeaseHeldError, LeaseLostError
from mlplatform.clients.stream import StreamError
from mlplatform.feature_store.codec import SchemaMismatchError
from mlplatform.features.stream_entity import StaleStateError
from mlplatform.orchestration.stream_contract import ContractBreachError
from mlplatform.orchestration.stream_metrics import StreamMetrics

log = structlog.get_logger(__name__)

# What a worker waits for as a whole: it comes back by itself, or a new start mends it.
AWAY = (LeaseLostError, StaleStateError, StreamError, RedisError, MissingTableError, TableMovedError, DeltaError, OSError)

# Whatever a recipe may raise; a panic of Polars is no Exception.
VIEWS_OWN = (Exception, PanicException)

# First and longest wait until a stopped view is tried again, which reads its raw tables; the fault of a view that has run
# for longer than the longest wait is a new one.
RETRY_S = (5.0, 600.0)


@dataclass
class _Stopped:
    reason: str
    wait_s: float
    retry_at: float


@dataclass
class Stops:
    """The stopped views. Times are those of the monotonic clock."""

    metrics: StreamMetrics
    _stopped: dict[str, _Stopped] = field(default_factory=dict)
    _waited: dict[str, tuple[float, float]] = field(default_factory=dict)  # view → its last wait, and when it was taken up again

    @contextmanager
    def guard(self, view: str, *, everything: bool = False) -> Iterator[None]:
        """A fault of the view's own within stops the view and goes no further; with `everything` whatever else is away does too."""
        try:
            yield
        except (LeaseHeldError, LeaseLostError):
            raise
        except VIEWS_OWN as fault:  # a recipe is anybody's code: whatever it raises must not take the other views along
            if not everything and isinstance(fault, AWAY) and not isinstance(fault, TableSchemaError):
                raise
            self.stop(view, fault)

    def stop(self, view: str, fault: BaseException) -> None:
        """Tells it loudly; the view is due again after a wait that grows while the fault lasts."""
        now = time.monotonic()
        waited, since = self._waited.pop(view, (0.0, now))
        if known := self._stopped.get(view):
            waited, since = known.wait_s, now
        wait_s = RETRY_S[0] if not waited or now - since > RETRY_S[1] else min(2 * waited, RETRY_S[1])
        reason = f"{type(fault).__name__}: {(str(fault).strip() or 'no more is known').splitlines()[0]}"
        self._stopped[view] = _Stopped(reason, wait_s, now + wait_s)
        self.metrics.stopped.labels(view).set(1)
        self.metrics.faults.labels(view).inc()
        log.error("view stopped", view=view, reason=reason, retry_s=wait_s, mend=_mend(view, fault), trace=_trace(fault))

    def go_on(self, view: str) -> None:
        self.metrics.stopped.labels(view).set(0)
        if stopped := self._stopped.pop(view, None):
            self._waited[view] = (stopped.wait_s, time.monotonic())
            log.info("view goes on", view=view, was_stopped_by=stopped.reason)

    def due(self) -> list[str]:
        now = time.monotonic()
        return [view for view, stopped in self._stopped.items() if stopped.retry_at <= now]

    def __contains__(self, view: object) -> bool:
        return view in self._stopped

    def reasons(self) -> Mapping[str, str]:
        return {view: stopped.reason for view, stopped in self._stopped.items()}


def _trace(fault: BaseException) -> list[str]:
    """Where it arose, outermost first; without the values of variables, which may be anybody's data."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(fault.__traceback__)]


def _mend(view: str, fault: BaseException) -> str:
    if isinstance(fault, ContractBreachError):
        return "look at the quarantine of the source named: mend the source or its contract; nothing is lost"
    if isinstance(fault, SchemaMismatchError | TableSchemaError):
        return f"rebuild offline/{view} and online/{view} with the features now declared, or start the worker with those of the table"
    return f"mend the recipe of {view} and start the worker again, or mend its data: it is tried again by itself; nothing is lost"
