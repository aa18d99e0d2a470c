"""The service's Prometheus metrics.

Belongs here: names, labels and buckets. Does not belong here: deciding what is worth counting where.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving_app.tallies import TallyCounter, TallyHistogram

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048)
_STAGES = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_AGES_S = (1, 10, 60, 300, 900, 1800, 3600, 7200, 6 * 3600, 24 * 3600, 3 * 86400, 7 * 86400, 30 * 86400)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


_BALANCE = "accepted = written + spilled + dropped + queued"
_LOG_PARTS = {
    "accepted": ("handed to the log", CounterMetricFamily),
    "written": ("in their stream", CounterMetricFamily),
    "dropped": ("lost: neither stream nor disk took them, or a file was damaged", CounterMetricFamily),
    "spilled": ("on disk now, to be written later", GaugeMetricFamily),
    "queued": ("in memory", GaugeMetricFamily),
}
_LOG_OTHERS = {
    "replayed": ("Prediction records written to their stream from disk", CounterMetricFamily),
    "adopted": ("Those of the replayed that a process before this one had accepted", CounterMetricFamily),
    "damaged": ("Pieces of the log's files that could not be read: torn as a process died, or altered", CounterMetricFamily),
    "spill_bytes": ("Bytes of prediction records on disk, those of ended processes included", GaugeMetricFamily),
}


class _LogCollector(Collector):
    """Reads the prediction log's own counters at scrape time, so that the exported figures balance like they do."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        for name, (text, kind) in _LOG_PARTS.items():
            yield kind(f"mlplatform_prediction_log_{name}", f"Prediction records {text}; {_BALANCE}", value=counts[name])
        for name, (text, kind) in _LOG_OTHERS.items():
            yield kind(f"mlplatform_prediction_log_{name}", text, value=counts[name])


class Metrics:
    """One registry per application, so that two applications in one process (tests) don't share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        model, version = ("model",), ("model", "version", "variant")
        view, held = ("model", "view"), ("model", "version", "role", "contract_digest", "training_set_hash", "device")
        self.requests = TallyCounter("mlplatform_requests", "Prediction requests answered", (*version, "status"), r)
        self.seconds = TallyHistogram("mlplatform_request_seconds", "Time of a prediction request", version, _SECONDS, r)
        self.stages = TallyHistogram(
            "mlplatform_stage_seconds",
            "Time of a batch's stage: features (reading them), assemble, predict; wait: a request's, from its checked body to all that",
            ("model", "version", "stage"),
            _STAGES,
            r,
        )
        self.predictions = TallyCounter("mlplatform_predictions", "Inputs predicted", version, r)
        self.batch_rows = TallyHistogram("mlplatform_batch_rows", "Inputs predicted together", model, _ROWS, r)
        self.feature_age = TallyHistogram("mlplatform_feature_age_seconds", "Age of a view's value when used", view, _AGES_S, r)
        self.shortfalls = TallyCounter(
            "mlplatform_feature_shortfalls", "View values missing, expired, future, unreadable or unreachable", (*view, "reason"), r
        )
        self.imputed = TallyCounter("mlplatform_imputed_views", "View values replaced by the recorded defaults", view, r)
        self.model_info = Gauge("mlplatform_model_info", "1 for each loaded version", held, registry=r)
        self.swaps = Counter("mlplatform_model_swaps", "Times another version took over", model, registry=r)
        self.refused = Counter("mlplatform_model_refused", "Versions refused, by the step that failed", ("model", "step"), registry=r)
        self.registry_errors = Counter("mlplatform_registry_errors", "Calls to MLflow that failed", registry=r)
        self.ready = Gauge("mlplatform_ready", "1 while the service answers ready", registry=r)

    def watch_log(self, counts: Callable[[], dict[str, int]]) -> None:
        """Exports the prediction log's counters."""
        self.registry.register(_LogCollector(counts))
