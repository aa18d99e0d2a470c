"""The prediction log: every answered input, through a bounded queue, to its model's Redis Stream; to disk while that is away.

Belongs here: queueing, batched writing, when records go to disk and come back, the accounting, shutdown. Does not belong here: what
a record says, the files (`log_spill`), reading the stream (the platform drains it, and trims what it has stored).

`accepted = written + spilled + dropped + queued` at any moment, each in records this process accepted: in the stream, on disk now, lost,
in memory. A record that comes back from disk goes from `spilled` to `written`; `replayed` counts those, and those of ended
processes, which are `adopted` and in none of the four: the process that accepted them has counted them.

A dead stream must never slow down or stop predictions. A write that fails is tried again for a moment; then batches go to disk, and
what is there is tried instead, so that the oldest records are the first in the stream again. So do batches when half of the queue
is full, whatever the reason. Where the disk takes none either, the queue fills and the newest records are dropped and counted.
Records are encoded on the event loop, as they are for the stream; the thread that writes them only does what lets go of the
interpreter's lock, so spilling costs requests no more than writing does.

A record can stand twice in the stream: a write whose answer was lost is tried again, or goes to disk; a process that dies leaves a file
it has read in part. `request_id`, `input_index` and `variant` identify it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import structlog
from redis.exceptions import RedisError

from mlplatform.contracts import prediction_stream, record_count
from mlplatform.feature_store.pipe import Pipe, pack_each
from serving_app.log_entry import RECORDS_A_LINE, LogEntry
from serving_app.log_frames import Frame
from serving_app.log_spill import Spill, Taken
from serving_app.row_texts import members

_BATCH = 2_000  # a full batch of requests brings a thousand records at once, and the next write comes after the next one
_FRAME = 500  # on disk, where a damaged frame is lost as a whole; and back from there
_LINGER_S = 0.01  # lets single requests share a write; nobody waits for it
_LONGEST_PAUSE_S = 5.0
_MOMENT_S = 1.0  # a stream that fails for longer is away
_STEP_S = 0.1  # how often a write under way is looked at
_DISK_PAUSE_S = 5.0  # after the disk has refused
_REST = 4  # times as long as replaying a batch took, for the requests
_LOOK_S = 30.0  # between looks for what ended processes left
_DISK_STOP_S = 5.0  # beyond its time limit, a shutdown waits so long for a disk that hangs

_NOTHING: Mapping[str, Any] = {}
_T = TypeVar("_T")
_FAULTS = (RedisError, OSError, TimeoutError)

log = structlog.get_logger(__name__)


class _Sink:
    """How the stream has fared lately: whether it fails, since when, and how long to leave it alone."""

    def __init__(self) -> None:
        self._failing_since: float | None = None
        self.pause_s = 0.0

    @property
    def away(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since >= _MOMENT_S

    def failed(self, began: float, error: Exception) -> None:
        """`began`: when the attempt was made, on the monotonic clock."""
        if self._failing_since is None:
            self._failing_since = began
            log.warning("prediction_log_stalled", error=str(error))
        self.pause_s = min(_LONGEST_PAUSE_S, max(0.05, self.pause_s * 2))

    def worked(self) -> None:
        if self._failing_since is not None:
            log.info("prediction_log_resumed", after_s=round(time.monotonic() - self._failing_since, 1))
        self._failing_since, self.pause_s = None, 0.0


class PredictionLog:
    """Used from one event loop. `offer` never waits. Without a `spill` nothing goes to disk."""

    def __init__(self, redis: Pipe, capacity: int, spill: Spill | None = None, stamp: Mapping[str, Any] = _NOTHING) -> None:
        """`stamp`: fields that stand in every record of this process."""
        self._redis = redis
        self._stamp = members(stamp) + b"," if stamp else b""
        self._streams: dict[str, str] = {}
        self._capacity = capacity
        self._high_water = capacity // 2
        self._queue: deque[LogEntry] = deque()
        self._wake = asyncio.Event()
        self._pressed = asyncio.Event()  # more is queued than may wait
        self._spilt = asyncio.Event()
        self._deadline: float | None = None  # set while closing
        self._sink = _Sink()
        self._spill = spill
        self._disk = ThreadPoolExecutor(1, "prediction-log")
        self._disk_refuses_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self.accepted = 0
        self.written = 0
        self.spilled = 0
        self.dropped = 0
        self.queued = 0  # with those of a batch under way
        self.replayed = 0
        self.adopted = 0

    def counts(self) -> dict[str, int]:
        return {
            "accepted": self.accepted,
            "written": self.written,
            "spilled": self.spilled,
            "dropped": self.dropped,
            "queued": self.queued,
            "replayed": self.replayed,
            "adopted": self.adopted,
            "damaged": self._spill.damaged if self._spill else 0,
            "spill_bytes": self._spill.bytes if self._spill else 0,
        }

    def offer(self, entry: LogEntry) -> None:
        """Takes what there is room for and counts the rest as dropped."""
        records = entry.count
        self.accepted += records
        room = self._capacity - self.queued
        if records > room:
            if not self.dropped:
                log.warning("prediction_log_full", capacity=self._capacity)
            self.dropped += records - max(0, room)
            if room <= 0:
                return
            entry, records = entry.part(0, room), room
        self._queue.append(entry)
        self.queued += records
        self._wake.set()
        if self.queued > self._high_water:
            self._pressed.set()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._write_forever(), name="prediction-log")]
        if self._spill is not None:
            self._tasks.append(asyncio.create_task(self._replay_forever(self._spill), name="prediction-log-replay"))

    async def close(self, timeout_s: float) -> None:
        """Writes what is queued, for at most `timeout_s`; what is left then goes to disk, or is counted as dropped and logged."""
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        writer, *replayer = self._tasks
        for task in replayer:
            task.cancel()
        # The writer sees the deadline by itself; it is only stopped where the disk does not answer.
        _, unfinished = await asyncio.wait({writer}, timeout=timeout_s + _DISK_STOP_S)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(writer, *replayer, return_exceptions=True)
        if self.queued:
            log.error("prediction_log_lost_at_shutdown", records=self.queued)
            self.dropped += self.queued
            self._queue.clear()
            self.queued = 0
        if self._spill is not None and not unfinished:
            await self._on_disk(self._spill.close)
        self._disk.shutdown(wait=not unfinished)
        log.info("prediction_log_closed", **self.counts())

    # --- from the queue to the stream, or to disk ------------------------------------------------------------------

    async def _write_forever(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                if not self._closing:
                    await asyncio.sleep(_LINGER_S)
                continue
            to_disk = self._to_disk()
            batch = self._take(_FRAME if to_disk else _BATCH)
            if to_disk and await self._spill_batch(batch):
                continue
            if self._late:
                self._queue.extendleft(reversed(batch))
                return
            await self._to_stream(batch)

    @property
    def _closing(self) -> bool:
        return self._deadline is not None

    @property
    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _to_disk(self) -> bool:
        return self._sink.away or self._late or self.queued > self._high_water

    @property
    def _disk_refuses(self) -> bool:
        return self._spill is None or time.monotonic() < self._disk_refuses_until

    def _take(self, most: int) -> list[LogEntry]:
        """The oldest entries, some hundred records and no more than `most`; they stay counted as queued until they are elsewhere."""
        batch = [self._queue.popleft()]
        records = batch[0].count
        while self._queue and records + self._queue[0].count <= most:
            batch.append(self._queue.popleft())
            records += batch[-1].count
        return batch

    async def _to_stream(self, batch: list[LogEntry]) -> None:
        """Writes the batch, or puts it back and waits a little. What cannot wait goes to disk meanwhile."""
        began = time.monotonic()
        records = sum(entry.count for entry in batch)
        writing = asyncio.ensure_future(self._write(self._frames(batch)))
        try:
            while not writing.done():
                await asyncio.wait({writing}, timeout=_STEP_S)
                while not writing.done() and self._queue and self.queued > self._high_water:
                    waiting = self._take(_FRAME)
                    if not await self._spill_batch(waiting):
                        self._queue.extendleft(reversed(waiting))
                        break
                if self._late:
                    writing.cancel()
            await writing
        except (*_FAULTS, asyncio.CancelledError) as error:
            self._queue.extendleft(reversed(batch))
            if isinstance(error, asyncio.CancelledError):
                if not self._late:
                    raise
                return
            self._sink.failed(began, error)
            await self._pause()
        else:
            self.written += records
            self.queued -= records
            self._sink.worked()
        finally:
            writing.cancel()

    async def _pause(self) -> None:
        """As long as the stream is to be left alone, or until the queue is too full to wait, if there is a disk to go to."""
        # While closing, every attempt counts: the time left is short.
        pause_s = min(self._sink.pause_s, 0.2) if self._closing else self._sink.pause_s
        if self._disk_refuses:
            await asyncio.sleep(pause_s)
            return
        self._pressed.clear()
        if self.queued <= self._high_water:
            await _soon(self._pressed, pause_s)

    async def _write(self, frames: Sequence[Frame]) -> None:
        added = [command for frame in frames for command in pack_each(("XADD", self._stream(frame.model), "*", "record"), _entries(frame))]
        if len(added) == 1:
            await self._redis.execute(added)
            return
        # One transaction: a lost connection leaves all of the batch or nothing of it.
        *_, ids = await self._redis.execute([("MULTI",), *added, ("EXEC",)])
        for reply in ids:
            if isinstance(reply, Exception):
                raise reply

    def _stream(self, model: str) -> str:
        name = self._streams.get(model)
        if name is None:
            name = self._streams[model] = prediction_stream(model)
        return name

    async def _spill_batch(self, batch: list[LogEntry]) -> bool:
        """Whether the batch is on disk now. One that the disk refuses is the caller's still."""
        if self._spill is None or self._disk_refuses:
            return False
        try:
            await self._on_disk(self._spill.append, self._frames(batch))
        except OSError as error:
            if not self._disk_refuses_until:
                log.error("prediction_log_disk_refuses", error=str(error))
            self._disk_refuses_until = time.monotonic() + _DISK_PAUSE_S
            return False
        self._disk_refuses_until = 0.0
        records = sum(entry.count for entry in batch)
        self.queued -= records
        self.spilled += records
        self._spilt.set()
        return True

    # --- from disk to the stream -----------------------------------------------------------------------------------

    async def _replay_forever(self, spill: Spill) -> None:
        look_at = 0.0
        while True:
            if time.monotonic() >= look_at:
                await self._adopt(spill)
                look_at = time.monotonic() + _LOOK_S
            self._spilt.clear()
            taken = await self._on_disk(spill.take, _FRAME)
            self._count_lost(spill)
            if taken:
                await self._replay(taken)
                continue
            await _soon(self._spilt, look_at - time.monotonic())

    async def _adopt(self, spill: Spill) -> None:
        try:
            await self._on_disk(spill.adopt)
        except OSError as error:
            log.warning("prediction_log_adopts_none", error=str(error))

    async def _replay(self, taken: list[Taken]) -> None:
        """Tries until the frames are in the stream."""
        while True:
            # New records first, where the stream takes any: they have no other place than memory.
            while not self._sink.away and self.queued > self._high_water // 2:
                await asyncio.sleep(_STEP_S)
            began = time.monotonic()
            try:
                await self._write([one.frame for one in taken])
            except _FAULTS as error:
                self._sink.failed(began, error)
                await asyncio.sleep(self._sink.pause_s)
                continue
            self._sink.worked()
            own = sum(one.frame.records for one in taken if one.own)
            records = sum(one.frame.records for one in taken)
            self.replayed += records
            self.spilled -= own
            self.written += own
            self.adopted += records - own
            await asyncio.sleep(min(_STEP_S, _REST * (time.monotonic() - began)))
            return

    def _count_lost(self, spill: Spill) -> None:
        lost, spill.lost = spill.lost, 0
        self.spilled -= lost
        self.dropped += lost

    def _frames(self, batch: Sequence[LogEntry]) -> list[Frame]:
        """The batch's records by model, in their order."""
        lines: dict[str, list[bytes]] = {}
        for entry in batch:
            lines.setdefault(entry.model, []).extend(entry.lines(self._stamp))
        return [Frame(model, found) for model, found in lines.items()]

    async def _on_disk(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)


def _entries(frame: Frame) -> list[bytes]:
    """The frame's lines as the stream has them, many to an entry: an entry costs as much as a record, and a reader that wants few gets no
    more than a hundred."""
    entries: list[bytes] = []
    held: list[bytes] = []
    records = 0
    for line in frame.lines:
        more = record_count(line)
        if held and records + more > RECORDS_A_LINE:
            entries.append(b"\n".join(held))
            held, records = [], 0
        held.append(line)
        records += more
    return [*entries, b"\n".join(held)] if held else entries


async def _soon(event: asyncio.Event, timeout_s: float) -> None:
    """Waits for the event, but not longer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
