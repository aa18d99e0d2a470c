"""Generations while builders are killed, writers race and readers hammer, on a real Valkey: never a mixture."""

import multiprocessing
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from redis import Redis

from mlplatform.feature_store import generations
from mlplatform.feature_store.generations import (
    restore,
)
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import reclaim

T0 = datetime(2013, 9, 1, tzinfo=UTC)
FEATURES = ("a", "b")
LAYOUT = ViewLayout.declare("v", ["who"], FEATURES, timedelta(days=1))
ENTITIES = 40


def _write_for_ever(kind: Any, url: str) -> None:
    """Builds one generation after the other, each of one value, until it is killed."""
    with Redis.from_url(url) as client:
        view, n = kind(client), 0
        while True:
            n += 1
            value = float(os.getpid() * 1_000 + n)
            view.build(lambda value=value: view.rows(value))


def test_killing_the_builder_process_never_shows_a_mixture_and_the_next_build_succeeds(
    valkey_url: str, view: Any, redis_client: Redis
) -> None:
    rng = np.random.default_rng(3)
    fork = multiprocessing.get_context("fork")
    view.build(lambda: view.rows(0.0))
    for kill in range(30):
        builder = fork.Process(target=_write_for_ever, args=(type(view), valkey_url))
        builder.start()
        time.sleep(0.03 + 0.04 * rng.random())
        assert builder.pid is not None
        os.kill(builder.pid, signal.SIGKILL)
        builder.join(30)
        assert len(set(view.values())) == 1, f"a mixture after kill {kill}"
    view.build(lambda: view.rows(-1.0))
    reclaim(redis_client)
    view.expire()
    reclaim(redis_client)
    assert view.values() == [-1.0] * ENTITIES
    assert set(view.stored()) == {g.number for g in view.pointer().live()}


class Cut(BaseException):
    """Ends a builder as a kill does: nothing of it runs any more."""


class CuttingClient(Redis):
    """Stops for good before, or after, its n-th command reaches the server."""

    def arm(self, commands: int, answered: bool) -> None:
        self.left, self.answered = commands, answered

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0 or (self.left == 0 and not self.answered):
            raise Cut
        answer = super().execute_command(*args, **options)
        if self.left == 0:
            raise Cut
        return answer


def test_cutting_the_builder_off_at_500_random_commands_never_shows_a_mixture_and_the_next_build_succeeds(
    valkey_url: str, view: Any, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows go out in many small commands, so that cuts fall between them.
    monkeypatch.setattr("mlplatform.feature_store.writer.BATCH", 8)
    monkeypatch.setattr(generations, "execute", lambda client, commands: [client.execute_command(*c) for c in commands])
    monkeypatch.setattr("mlplatform.feature_store.commands.execute", generations.execute)
    rng = np.random.default_rng(4)
    client = CuttingClient.from_url(valkey_url)
    cut = type(view)(client)
    client.arm(10**9, answered=True)
    cut.build(lambda: view.rows(0.0))
    client.arm(10**9, answered=True)
    cut.build(lambda: view.rows(0.0), carry_over=True)
    whole = 10**9 - client.left
    cuts = n = 0
    while cuts < 500:
        n += 1
        if n % 2:
            view.push(view.rows(float(-n), minute=n))  # what a build that ends is older than
        before = set(view.values())
        client.arm(int(rng.integers(1, whole)), answered=bool(rng.integers(2)))
        try:
            cut.build(lambda n=n: view.rows(float(n), minute=n + 1), carry_over=bool(n % 3))
        except Cut:
            cuts += 1
        assert set(view.values()) in (before, {float(n)})
        assert len(set(view.values())) == 1
        if n % 25 == 0:
            view.build(lambda n=n: view.rows(0.5, minute=n + 1.5))
            assert view.values() == [0.5] * ENTITIES
            reclaim(redis_client)
            view.expire()
            reclaim(redis_client)
            assert set(view.stored()) == {g.number for g in view.pointer().live()}
    client.close()


def _push_race(kind: Any, url: str, seed: int) -> None:
    """Every row of the race, in an order of this writer's own."""
    with Redis.from_url(url) as client:
        view = kind(client)
        for minute in np.random.default_rng(seed).permutation(120):
            view.push(race_rows(kind, int(minute)))


def race_rows(kind: Any, minute: int) -> pl.DataFrame:
    """Two thirds of the entities; the same minute comes from all writers with the same values."""
    return kind.rows(float(minute), minute=minute).filter((pl.col("who") + minute) % 3 != 0)


def test_writers_racing_with_builds_leave_what_one_writer_would_in_both_generations(
    valkey_url: str, view: Any, redis_client: Redis
) -> None:
    view.build(lambda: view.rows(-1.0, minute=-1))
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_push_race, args=(type(view), valkey_url, seed)) for seed in (1, 2, 3)]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        view.build(lambda: view.rows(-1.0, minute=-1), carry_over=True)
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0, 0]
    expected = [float(max(m for m in range(120) if (who + m) % 3)) for who in range(ENTITIES)]
    assert view.values() == expected
    view.build(lambda: view.rows(-1.0, minute=-1), carry_over=True)
    restore(redis_client, "p", "v", at=T0, by="a test")
    assert view.values() == expected


def test_readers_during_flips_see_one_generation_per_read(valkey_url: str, view: Any, redis_client: Redis) -> None:
    view.build(lambda: view.rows(0.0))
    mixtures: list[set[float | None]] = []
    reads = [0]
    stop = threading.Event()

    def hammer() -> None:
        with Redis.from_url(valkey_url) as client:
            reader = SyncOnlineReader(client, "p")
            while not stop.is_set():
                found = reader.read([(LAYOUT, (who,)) for who in range(ENTITIES)])
                seen = {None if f is None else float(f.values[0]) for f in found}
                reads[0] += 1
                if len(seen) > 1 or None in seen:
                    mixtures.append(seen)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(60):
        view.build(lambda n=n: view.rows(float(n)))
        view.expire()
        if n % 7 == 0:
            restore(redis_client, "p", "v", at=T0, by="a test")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert reads[0] > 60
    assert mixtures == []
