"""The service's own count of its prediction log, beside what the stream holds.

Belongs here: reading and comparing the counters. Does not belong here: load.
"""

import http.client
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from mlplatform.contracts import prediction_stream, record_count, record_lines

_PREFIX = "mlplatform_prediction_log_"
_DRAIN_S = 60.0
_ENTRIES = 500  # to a read


@dataclass(frozen=True)
class LogBalance:
    """`counts` by the service's names, which must add up: accepted = written + spilled + dropped + queued. `in_stream`: records its
    stream was given since it started."""

    counts: Mapping[str, int]
    in_stream: int

    @property
    def missing(self) -> int:
        """Records that counters or stream don't account for. One written twice, because an answer was lost, is not missing."""
        kept = sum(self.counts.get(name, 0) for name in ("written", "spilled", "dropped", "queued"))
        return abs(self.counts["accepted"] - kept) + max(0, self.counts["written"] - self.in_stream)


def read_counts(port: int) -> dict[str, int]:
    """The counters of the prediction log as the service exports them, by name without prefix."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    return {name.removeprefix(_PREFIX): int(samples[0].value) for name, samples in families.items() if name.startswith(_PREFIX) and samples}


def drained(port: int, timeout_s: float = _DRAIN_S) -> dict[str, int]:
    """The counters once nothing is queued or on disk, or as they are after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (counts := read_counts(port))["queued"] + counts["spilled"] and time.monotonic() < deadline:
        time.sleep(0.05)
    return counts


def lines(redis: Redis, model: str) -> Iterator[bytes]:
    """What the model's stream holds, in order: lines of records."""
    after = "-"
    while entries := cast("list[Any]", redis.xrange(prediction_stream(model), min=after, count=_ENTRIES)):
        for _, fields in entries:
            yield from record_lines(fields[b"record"])
        after = f"({entries[-1][0].decode()}"


def added(redis: Redis, model: str) -> int:
    """How many records the model's stream was ever given, those that `trim` took included."""
    return int(cast("bytes | None", redis.get(_trimmed(model))) or 0) + sum(map(record_count, lines(redis, model)))


def balance(port: int, redis: Redis, model: str, before: int) -> LogBalance:
    """`before`: records the stream had been given when the service started."""
    counts = drained(port)
    return LogBalance(counts, added(redis, model) - before)


def trim(redis: Redis, model: str) -> None:
    """Empties the stream, as the platform does once it has stored the records; the count of what was ever added stays."""
    redis.incrby(_trimmed(model), sum(map(record_count, lines(redis, model))))
    redis.xtrim(prediction_stream(model), maxlen=0, approximate=False)


def _trimmed(model: str) -> str:
    return f"bench:trimmed:{model}"
