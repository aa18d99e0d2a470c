"""The state of the running parts, read when Prometheus asks: nothing is counted twice, and nothing is paid in between.

Belongs here: names of these figures, and which attribute each comes from. Does not belong here: what is counted at the moment it
happens (`metrics`), and figures of parts that collect their own (`protection.counters`, `shadow`).
"""

import platform
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving_app.batcher import Batcher
from serving_app.model_watcher import ModelWatcher
from serving_app.online_features import OnlineFeatures


class PartsCollector(Collector):
    """`follows_registry`: whether there is a registry to be seen at all; `revision`: the commit the code was built from, or ''."""

    def __init__(self, online: OnlineFeatures, batcher: Batcher, watcher: ModelWatcher, follows_registry: bool, revision: str) -> None:
        self._online = online
        self._batcher = batcher
        self._watcher = watcher
        self._follows_registry = follows_registry
        self._build = {"version": version("mlplatform"), "revision": revision, "python": platform.python_version()}

    def collect(self) -> Iterator[Metric]:
        yield from self._features()
        waiting, running = self._batcher.depth()
        yield GaugeMetricFamily("mlplatform_batch_requests_waiting", "Requests that wait for a batch", value=waiting)
        yield GaugeMetricFamily("mlplatform_batches_running", "Batches under way: features read, then predicted", value=running)
        if self._follows_registry:
            yield GaugeMetricFamily(
                "mlplatform_registry_seen_timestamp_seconds",
                "When MLflow answered last; 0 before it did",
                value=self._watcher.registry_seen_s,
            )
        yield GaugeMetricFamily("mlplatform_models_missing", "Wanted models that are not loaded", value=len(self._watcher.missing()))
        yield InfoMetricFamily("mlplatform_build", "What runs here", value=self._build)

    def _features(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "mlplatform_online_store_away",
            "1 while the breaker is open: the online store did not answer the last read",
            value=self._online.away,
        )
        reads = CounterMetricFamily(
            "mlplatform_feature_reads",
            "Reads of a batch's features, by where the values came from: store, cache (young enough), fallback (the store is away)",
            labels=("source",),
        )
        for source, count in self._online.reads.items():
            reads.add_metric((source,), count)
        yield reads
