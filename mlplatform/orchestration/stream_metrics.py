"""What the streaming worker tells Prometheus, on a loopback port.

Belongs here: names, help texts, setting values. Does not belong here: deciding anything.
"""

import socket
from collections.abc import Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from mlplatform.orchestration.stream_contract import DayRows
from mlplatform.orchestration.stream_inputs import Counts

HOST = "127.0.0.1"
# Seconds; the target is 2.
_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, float("inf"))


class PortTakenError(OSError):
    """Something else listens where the metrics should be told."""

    def __init__(self, port: int, why: OSError) -> None:
        super().__init__(f"the metrics cannot be told on {HOST}:{port}: {why.strerror or why}")


def check_port(port: int) -> None:
    """Raises PortTakenError where `serve` would now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as taken:
            raise PortTakenError(port, taken) from taken


class StreamMetrics:
    """One registry of its own: the worker may be started twice in one process, as tests do."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "mlplatform_stream_"
        self.entries = Counter(name + "entries", "Entries by what became of them", ["source", "outcome"], registry=registry)
        self.rows = Counter(name + "rows", "Rows appended to the view's table", ["view"], registry=registry)
        self.restated = Counter(name + "restated_rows", "Rows given again because their values changed", ["view"], registry=registry)
        self.latency = Histogram(
            name + "latency_seconds",
            "From the oldest entry of a round (its id) to its rows readable online",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.behind = Gauge(name + "lag_seconds", "Between the newest entry of a stream and the last one read", registry=registry)
        self.freshness = Gauge(name + "freshness_seconds", "Platform clock minus the view's newest row", ["view"], registry=registry)
        self.connected = Gauge(name + "connected", "1 while streams, tables and Redis answer", registry=registry)
        self.leads = Gauge(name + "leads", "1 while this worker holds the lease, 0 while it stands by", registry=registry)
        self.stopped = Gauge(name + "view_stopped", "1 while a fault of the view's own keeps it from going on", ["view"], registry=registry)
        self.faults = Counter(name + "view_faults", "How often a fault of its own stopped the view", ["view"], registry=registry)
        self.today = Gauge(
            name + "contract_rows", "Rows of the platform's day by whether they keep the contract", ["source", "outcome"], registry=registry
        )
        self.share = Gauge(name + "contract_broken_share", "Share of the day's rows that do not", ["source"], registry=registry)
        self.allowed = Gauge(name + "contract_allowed_share", "What the contract allows of it", ["source"], registry=registry)
        self.starts = Counter(name + "starts", "How often the state was built from the tables", registry=registry)
        self._told: dict[tuple[str, str], int] = {}

    def serve(self, port: int) -> None:
        """Raises PortTakenError."""
        try:
            start_http_server(port, addr=HOST, registry=self.registry)
        except OSError as taken:
            raise PortTakenError(port, taken) from taken

    def count(self, counts: Mapping[str, Counts]) -> None:
        for source, of in counts.items():
            for outcome, total in vars(of).items():
                new = total - self._told.get((source, outcome), 0)
                self._told[source, outcome] = total
                self.entries.labels(source, outcome).inc(new)

    def contract(self, source: str, today: DayRows, allowed: float) -> None:
        self.today.labels(source, "kept").set(today.kept)
        self.today.labels(source, "broken").set(today.broken)
        self.share.labels(source).set(today.share)
        self.allowed.labels(source).set(allowed)

    def fresh(self, view: str, newest: datetime | None, now: datetime) -> None:
        if newest is not None:
            self.freshness.labels(view).set((now - newest).total_seconds())
