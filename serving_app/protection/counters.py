"""What the protection exports to Prometheus.

Belongs here: names and labels. Does not belong here: deciding what is refused.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving_app.protection.admission import Admission
from serving_app.tallies import TallyHistogram

_DELAYS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class _AdmissionCollector(Collector):
    """Reads the admission at scrape time; nothing is counted twice."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("mlplatform_requests_in_work", "Requests worked on now", value=self._admission.in_work)
        yield GaugeMetricFamily("mlplatform_requests_in_work_limit", "Requests worked on at once, at most", value=self._admission.limit)
        yield GaugeMetricFamily("mlplatform_request_bytes_held", "Bytes of request bodies in memory", value=self._admission.held_bytes)


class _ByReason:
    """A counter whose children are looked up once."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._counters: dict[str, Counter] = {}

    def count(self, reason: str) -> None:
        counter = self._counters.get(reason)
        if counter is None:
            counter = self._counters[reason] = self._counter.labels(reason)
        counter.inc()


class Refusals:
    """Counts requests refused before any model saw them, and connections closed before there was a request, by reason (the last part of
    the problem's type)."""

    def __init__(self, registry: CollectorRegistry, admission: Admission) -> None:
        by = ("reason",)
        self._requests = _ByReason(
            Counter("mlplatform_requests_refused", "Requests refused before any model saw them", by, registry=registry)
        )
        about = "Connections answered and closed before there was a request"
        self._connections = _ByReason(Counter("mlplatform_connections_refused", about, by, registry=registry))
        registry.register(_AdmissionCollector(admission))

    def count(self, reason: str) -> None:
        self._requests.count(reason)

    def count_connection(self, reason: str) -> None:
        self._connections.count(reason)


def loop_delays(registry: CollectorRegistry) -> TallyHistogram:
    """What a request waits in the event loop before its own code runs, looked at a hundred times a second."""
    return TallyHistogram(
        "mlplatform_event_loop_delay_seconds", "Wait in the event loop before a request's code runs", (), _DELAYS_S, registry
    )
