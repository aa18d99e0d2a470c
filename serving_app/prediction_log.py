"""The prediction log: every answered input, through a bounded queue, to its model's Redis Stream.

Belongs here: queueing, batched writing, the accounting `accepted = written + dropped + queued`, flushing at shutdown.
Does not belong here: what a record says, reading the stream (the platform drains it, and trims what it has stored).

A write whose answer was lost is tried again, so a record can stand twice in the stream; `request_id` and `input_index`
identify it. A full queue drops the newest records: a dead stream must never slow down or stop predictions.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import structlog
from redis.exceptions import RedisError

from mlplatform.contracts import prediction_stream
from mlplatform.feature_store.pipe import Pipe

_BATCH = 500
_LINGER_S = 0.01  # lets single requests share a write; nobody waits for it
_LONGEST_PAUSE_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One request's records on their way, with the fields of `contracts.PredictionRecord`: those all share, and each row's.

    `rows` one mapping for each row; `inputs` as received; `features` float64 of shape (rows, features).
    """

    model: str
    common: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    inputs: Sequence[dict[str, Any]]
    features: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, end: int) -> "LogEntry":
        return LogEntry(self.model, self.common, self.rows[start:end], self.inputs[start:end], self.features[start:end])

    def records(self) -> list[bytes]:
        """Each row's record as JSON. orjson writes NaN as null, which is what PredictionRecord.features wants."""
        shared = orjson.dumps(self.common)[:-1] + b","
        return [
            shared + orjson.dumps({**row, "inputs": given, "features": values}, option=orjson.OPT_SERIALIZE_NUMPY)[1:]
            for row, given, values in zip(self.rows, self.inputs, self.features, strict=True)
        ]


class PredictionLog:
    """Used from one event loop. `offer` never waits."""

    def __init__(self, redis: Pipe, capacity: int) -> None:
        self._redis = redis
        self._streams: dict[str, str] = {}
        self._capacity = capacity
        self._queue: deque[LogEntry] = deque()
        self._queued = 0  # records in the queue
        self._in_flight = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._writer: asyncio.Task[None] | None = None
        self.accepted = 0
        self.written = 0
        self.dropped = 0

    def counts(self) -> dict[str, int]:
        return {"accepted": self.accepted, "written": self.written, "dropped": self.dropped, "queued": self._queued + self._in_flight}

    def offer(self, entry: LogEntry) -> None:
        """Takes what there is room for and counts the rest as dropped."""
        self.accepted += len(entry)
        room = self._capacity - self._queued - self._in_flight
        if len(entry) > room:
            if not self.dropped:
                log.warning("prediction_log_full", capacity=self._capacity)
            self.dropped += len(entry) - max(0, room)
            if room <= 0:
                return
            entry = entry.part(0, room)
        self._queue.append(entry)
        self._queued += len(entry)
        self._wake.set()

    def start(self) -> None:
        self._writer = asyncio.create_task(self._write_forever(), name="prediction-log")

    async def close(self, timeout_s: float) -> None:
        """Writes what is queued, for at most `timeout_s`; what is left then is counted as dropped and logged."""
        self._closing = True
        self._wake.set()
        if self._writer is not None:
            _, unfinished = await asyncio.wait({self._writer}, timeout=timeout_s)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        left = self._queued + self._in_flight
        if left:
            self.dropped += left
            self._queue.clear()
            self._queued = self._in_flight = 0
            log.error("prediction_log_lost_at_shutdown", records=left)
        log.info("prediction_log_closed", **self.counts())

    async def _write_forever(self) -> None:
        pause = 0.0
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                if not self._closing:
                    await asyncio.sleep(_LINGER_S)
                continue
            batch = self._take()
            try:
                await self._write(batch)
            except (RedisError, OSError, TimeoutError) as error:
                self._queue.extendleft(reversed(batch))
                self._queued += self._in_flight
                self._in_flight = 0
                if not pause:
                    log.warning("prediction_log_stalled", error=str(error), queued=self._queued)
                pause = min(_LONGEST_PAUSE_S, max(0.05, pause * 2))
                # While closing, every attempt counts: the time left is short.
                await asyncio.sleep(min(pause, 0.2) if self._closing else pause)
            else:
                self.written += self._in_flight
                self._in_flight = 0
                if pause:
                    log.info("prediction_log_resumed", queued=self._queued)
                pause = 0.0

    def _take(self) -> list[LogEntry]:
        """The oldest entries, some hundred records of them."""
        batch: list[LogEntry] = []
        self._in_flight = 0
        while self._queue and self._in_flight < _BATCH:
            entry = self._queue.popleft()
            batch.append(entry)
            self._in_flight += len(entry)
        self._queued -= self._in_flight
        return batch

    async def _write(self, batch: list[LogEntry]) -> None:
        # One transaction: a lost connection leaves all of the batch or nothing of it.
        added: list[tuple[str | bytes, ...]] = []
        for entry in batch:
            stream = self._stream(entry.model)
            added += [("XADD", stream, "*", "record", record) for record in entry.records()]
        *_, ids = await self._redis.execute([("MULTI",), *added, ("EXEC",)])
        for reply in ids:
            if isinstance(reply, Exception):
                raise reply

    def _stream(self, model: str) -> str:
        name = self._streams.get(model)
        if name is None:
            name = self._streams[model] = prediction_stream(model)
        return name
