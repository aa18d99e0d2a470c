"""Publishes the demo's deliveries into Redis Streams, each exactly once however often the publisher is restarted.

Belongs here: what has been published and publishing the rest. Does not belong here: when events are due (`deliveries`),
or who asks (`sources`).
"""

import threading
from collections.abc import Mapping
from datetime import datetime

import polars as pl
import redis

from mlplatform.local.deliveries import DELIVERED_AT

# Beside the streams, in the same Redis: entries and position are written in one transaction, so they are lost or kept together.
PROGRESS_KEY = "mlplatform:sources:published"
_BATCH = 2000


def stream_name(source: str) -> str:
    return f"flights.{source}"


class OtherWorldError(RuntimeError):
    """The Redis holds streams published from other deliveries (another seed, start or version)."""


class Publisher:
    """Publishes the rows of `deliveries` (per source, in the order of delivery) as `XADD flights.<source> * event <JSON>`.

    The JSON object holds the event's columns (timestamps ISO 8601 UTC), not `delivered_at`. `fingerprint` names the
    deliveries; a Redis with another one raises `OtherWorldError`. `client` decodes its responses. Thread-safe.
    """

    def __init__(self, client: redis.Redis, deliveries: Mapping[str, pl.DataFrame], fingerprint: str) -> None:
        self._client = client
        self._deliveries = deliveries
        self._fingerprint = fingerprint
        self._lock = threading.Lock()

    def published(self) -> dict[str, int]:
        """Deliveries published so far, by source."""
        state = self._state(self._client)
        return {source: state.get(source, 0) for source in self._deliveries}

    def publish_until(self, now: datetime) -> dict[str, int]:
        """Publishes everything due at `now` (`delivered_at <= now`) that is not out yet; gives the counts of this call.

        Raises `redis.RedisError` where Redis does not answer: what was published stays counted, the next call goes on.
        """
        with self._lock:
            return {source: self._publish(source, rows, now) for source, rows in self._deliveries.items()}

    def _publish(self, source: str, rows: pl.DataFrame, now: datetime) -> int:
        due = int(rows[DELIVERED_AT].search_sorted(now, side="right"))
        first = self.published()[source]
        for start in range(first, due, _BATCH):
            self._publish_batch(source, rows, start, min(start + _BATCH, due))
        return max(due - first, 0)

    def _publish_batch(self, source: str, rows: pl.DataFrame, start: int, end: int) -> None:
        events = rows[start:end].select(event=pl.struct(pl.exclude(DELIVERED_AT)).struct.json_encode())["event"]
        with self._client.pipeline(transaction=True) as pipe:
            # Watched, so that a second publisher on the same Redis fails instead of publishing twice.
            pipe.watch(PROGRESS_KEY)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            if self._state(pipe).get(source, 0) != start:
                raise redis.WatchError(f"another publisher moved '{source}' on: only one source-systems process may run")
            pipe.multi()
            for event in events:
                pipe.xadd(stream_name(source), {"event": event})
            pipe.hset(PROGRESS_KEY, mapping={"fingerprint": self._fingerprint, source: end})
            pipe.execute()

    def _state(self, client: redis.Redis) -> dict[str, int]:
        stored = {str(key): str(value) for key, value in client.hgetall(PROGRESS_KEY).items()}
        fingerprint = stored.pop("fingerprint", self._fingerprint)
        if fingerprint != self._fingerprint:
            raise OtherWorldError(
                f"this Redis holds events published as '{fingerprint}', the source systems were asked for '{self._fingerprint}': "
                "start with the same start and seed, or with an empty home"
            )
        return {source: int(position) for source, position in stored.items()}
