"""Counters and histograms for the hot path, in Prometheus' format.

Belongs here: counting in one thread, without locks, and handing the sums out when Prometheus asks. Does not belong here: which
metrics there are (`metrics`). prometheus_client's own cost 1 to 3 µs for each call with labels, a tenth of a request's whole time.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]
_TOGETHER = 64  # batches whose values are counted in one go


class TallyCounter(Collector):
    """A counter with labels. `add` is called from the event loop only."""

    def __init__(self, name: str, text: str, labels: Labels, registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._counts: dict[Labels, int] = {}
        registry.register(self)

    def add(self, labels: Labels, count: int = 1) -> None:
        self._counts[labels] = self._counts.get(labels, 0) + count

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        yield family


class TallyHistogram(Collector):
    """A histogram with labels; `bounds` are the buckets' upper limits, ascending. Used from the event loop only."""

    def __init__(self, name: str, text: str, labels: Labels, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(float(b) for b in bounds)
        self._edges = np.array(self._bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        self._waiting: dict[Labels, list[npt.NDArray[np.float64]]] = {}
        registry.register(self)

    def observe(self, labels: Labels, value: float) -> None:
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._start(labels)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def observe_all(self, labels: Labels, values: npt.NDArray[np.float64]) -> None:
        """Counts each of the values but NaN, at the latest when Prometheus asks. They must not change after."""
        waiting = self._waiting.get(labels)
        if waiting is None:
            waiting = self._waiting[labels] = []
        waiting.append(values)
        if len(waiting) >= _TOGETHER:
            self._count(labels)

    def _count(self, labels: Labels) -> None:
        values = np.concatenate(self._waiting.pop(labels))
        values = values[~np.isnan(values)]
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._start(labels)
        self._sums[labels] += float(values.sum())
        found = np.bincount(np.searchsorted(self._edges, values), minlength=len(counts))
        for i in np.flatnonzero(found).tolist():
            counts[i] += int(found[i])

    def _start(self, labels: Labels) -> list[int]:
        self._sums[labels] = 0.0
        counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        return counts

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*map(str, self._bounds), "+Inf"]
        for labels in tuple(self._waiting):
            self._count(labels)
        for labels, counts in self._counts.items():
            family.add_metric(labels, list(zip(names, np.cumsum(counts).tolist(), strict=True)), self._sums[labels])
        yield family
