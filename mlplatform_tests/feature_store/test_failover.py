"""A replica takes over in a real cluster while rows are written and read: asked to, and because its primary was killed."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from redis import Redis
from redis.exceptions import RedisError

from mlplatform.feature_store.codec import COUNTER_KEY
from mlplatform.feature_store.commands import open_async_client, open_client
from mlplatform.feature_store.generations import build_generation
from mlplatform.feature_store.reader import OnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import newest_events
from mlplatform.feature_store.writer import write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
LAYOUT = ViewLayout.declare("v", ["who"], ["a"], None)
ENTITIES = 200
PATIENCE_S = 90.0  # a failover takes seconds, on a machine with other work a minute


def rows(minute: int) -> pl.DataFrame:
    at = [T0 + timedelta(minutes=minute)] * ENTITIES
    return pl.DataFrame({"who": range(ENTITIES), "a": [float(minute)] * ENTITIES, "event_timestamp": at, "created": at})


@dataclass
class Work:
    """A writer and the service's reader, each in a thread, that go on whatever happens.

    The writer asks the primary that will be lost for whatever can be asked of any node (`first_primary`, a port).
    `acknowledged`: the last minute whose rows were all written; `reads`: (lowest, highest) value of each read of all entities.
    """

    url: str
    first_primary: int
    acknowledged: int = 0
    reads: list[tuple[float, float]] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def write(self) -> None:
        with contextlib.closing(open_client(self.url, cluster=True, socket_timeout=1)) as client:
            client.replace_default_node(client.get_node("127.0.0.1", self.first_primary))
            minute = 1
            while not self.over.is_set():
                try:
                    write_frame(client, "p", "v", ["who"], ["a"], rows(minute))
                except (RedisError, OSError) as error:
                    self.faults.append(error)
                    time.sleep(0.05)
                    continue  # the same rows once more: a write that was half done is a replay
                self.acknowledged = minute
                minute += 1

    def read(self) -> None:
        asyncio.run(self._read())

    async def _read(self) -> None:
        client = open_async_client(self.url, cluster=True, socket_timeout=1, socket_connect_timeout=1)
        reader = OnlineReader(client, "p")
        try:
            while not self.over.is_set():
                try:
                    found = await reader.read([(LAYOUT, (who,)) for who in range(ENTITIES)])
                except (RedisError, OSError) as error:
                    self.faults.append(error)
                    await asyncio.sleep(0.05)
                    continue
                values = [float(f.values[0]) for f in found if f is not None]
                if len(values) == ENTITIES:
                    self.reads.append((min(values), max(values)))
        finally:
            await client.aclose()

    def until(self, holds: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < limit, (self.acknowledged, self.reads[-1:], self.faults[-3:])
            time.sleep(0.02)

    def goes_on(self) -> None:
        """Rows of a later minute than the last acknowledged one are written and read."""
        then = self.acknowledged
        self.until(lambda: bool(self.reads) and self.reads[-1][0] > then)


@pytest.fixture
def ports(start_cluster: Any) -> Iterator[list[int]]:
    """Three primaries, which can outvote a dead one, and a replica of the first."""
    with start_cluster(primaries=3, replicas=1) as found:
        yield found


@pytest.fixture
def work(ports: list[int]) -> Iterator[Work]:
    made = Work(f"redis://127.0.0.1:{ports[1]}", ports[0])
    threads = [threading.Thread(target=made.write), threading.Thread(target=made.read)]
    for thread in threads:
        thread.start()
    made.goes_on()
    yield made
    made.over.set()
    for thread in threads:
        thread.join(PATIENCE_S)


def is_primary(node: Any) -> bool:
    with contextlib.suppress(RedisError):
        return bool(node.info("replication")["role"] == "master")
    return False


def test_a_replica_that_is_asked_to_take_over_loses_nothing_acknowledged_and_reads_go_on(ports: list[int], work: Work) -> None:
    with Redis(port=ports[3]) as replica:
        replica.execute_command("CLUSTER", "FAILOVER")
        work.until(lambda: is_primary(replica))
        before = work.acknowledged
        work.goes_on()
        assert replica.dbsize() > 0
    work.over.set()
    # What was acknowledged is never gone again: each read is at least as new as the one before.
    lowest = [low for low, _ in work.reads]
    assert lowest == sorted(lowest)
    assert lowest[-1] >= before


def test_reads_and_writes_go_on_by_themselves_after_a_primary_was_killed(ports: list[int], work: Work) -> None:
    with Redis(port=ports[0]) as primary, Redis(port=ports[3]) as replica:
        os.kill(int(primary.info("server")["process_id"]), signal.SIGKILL)
        work.until(lambda: is_primary(replica))
        work.goes_on()
    work.over.set()
    with contextlib.closing(open_client(work.url, cluster=True)) as client:
        built = build_generation(client, "p", "v", ["who"], ["a"], lambda: rows(0), at=T0, by="a test")
        assert newest_events(client)[built.generation] >= T0


def test_a_generation_number_that_is_given_out_twice_is_passed_over(redis_client: Redis) -> None:
    """As after a failover in which the counter's last step was lost."""
    numbers = [build_generation(redis_client, "p", "v", ["who"], ["a"], lambda: rows(1), at=T0, by="a test").generation]
    redis_client.set(COUNTER_KEY, numbers[0] - 1)
    numbers.append(build_generation(redis_client, "p", "v", ["who"], ["a"], lambda: rows(0), at=T0, by="a test").generation)
    assert numbers[1] == numbers[0] + 1
