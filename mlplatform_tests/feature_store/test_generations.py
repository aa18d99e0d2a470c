"""Generations on a real Valkey: built beside what is read, verified, flipped, restored, reclaimed; killed at any point."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from redis import Redis

from mlplatform.feature_store import generations
from mlplatform.feature_store.codec import COUNTER_KEY, RETIRED_KEY, entity_part, generation_of, manifest_key, pointer_key, value_keys
from mlplatform.feature_store.generations import (
    Built,
    NoPreviousGenerationError,
    TakenOverError,
    VerificationError,
    build_generation,
    restore,
)
from mlplatform.feature_store.pointer import Pointer
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import manifest_of, pointers, reclaim, reclaim_due, remove_views
from mlplatform.feature_store.writer import GRACE_S, WriteCounts, write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
FEATURES = ("a", "b")
LAYOUT = ViewLayout.declare("v", ["who"], FEATURES, timedelta(days=1))
ENTITIES = 40


def rows(value: float, minute: float = 0, entities: int = ENTITIES, first: int = 0) -> pl.DataFrame:
    """Every entity with the same value in both features, known at T0 + `minute`."""
    at = T0 + timedelta(minutes=minute)
    columns = {"who": list(range(first, first + entities)), "a": [value] * entities, "b": [value] * entities}
    return pl.DataFrame({**columns, "event_timestamp": [at] * entities, "created": [at] * entities})


def build(client: Redis, source: Callable[[], pl.DataFrame], **options: Any) -> Built:
    return build_generation(client, "p", "v", ["who"], FEATURES, source, at=T0, by="a test", **options)


def push(client: Redis, frame: pl.DataFrame) -> WriteCounts:
    return write_frame(client, "p", "v", ["who"], FEATURES, frame)


def values(client: Redis, entities: int = ENTITIES) -> list[float | None]:
    """What is read of each entity, after a look that both its features belong together."""
    found = SyncOnlineReader(client, "p").read([(LAYOUT, (who,)) for who in range(entities)])
    assert all(f is None or f.values[0] == f.values[1] for f in found)
    return [None if f is None else float(f.values[0]) for f in found]


def pointer(client: Redis) -> Pointer:
    return Pointer.parse(client.get(pointer_key("p", "v")))


def stored(client: Redis) -> dict[int, int]:
    """Generation → its number of values."""
    found = [place[0] for key in client.keys("fs:*") if (place := generation_of(key))]
    return {number: found.count(number) for number in set(found)}


def expire(client: Redis) -> None:
    """The time of grace passes for every retired generation."""
    for member in client.smembers(RETIRED_KEY):
        client.delete(manifest_key(int(member)))


# --- building --------------------------------------------------------------------------------------------------------


def test_readers_see_the_new_generation_whole_after_the_flip_and_the_old_one_before(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0, entities=ENTITIES + 3))

    def source() -> pl.DataFrame:
        assert values(redis_client) == [1.0] * ENTITIES
        return rows(2.0, minute=-5)  # older rows: a rebuild says what is true, whatever was there

    built = build(redis_client, source)
    assert (built.entities, built.sample, built.overtaken, built.newest) == (ENTITIES, ENTITIES, 0, T0 - timedelta(minutes=5))
    assert values(redis_client, ENTITIES + 3) == [2.0] * ENTITIES + [None] * 3


def test_the_manifest_tells_what_was_built(redis_client: Redis) -> None:
    built = build(redis_client, lambda: rows(1.0))
    manifest = manifest_of(redis_client, built.generation)
    assert manifest is not None
    assert (manifest.project, manifest.view, tuple(manifest.features), manifest.schema) == ("p", "v", FEATURES, LAYOUT.schema)
    assert (manifest.state, manifest.entities, manifest.sample) == ("verified", ENTITIES, ENTITIES)
    assert (manifest.built_at, manifest.built_by, manifest.newest_event) == (T0.isoformat(), "a test", T0.isoformat())
    assert redis_client.ttl(manifest_key(built.generation)) == -1


def test_a_push_during_a_build_is_in_both_generations(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))

    def source() -> pl.DataFrame:
        push(redis_client, rows(9.0, minute=5, entities=1))
        push(redis_client, rows(8.0, minute=-9, entities=1, first=ENTITIES))
        assert values(redis_client)[0] == 9.0
        return rows(2.0, minute=1)

    built = build(redis_client, source)
    assert built.overtaken == 1
    assert values(redis_client, ENTITIES + 1) == [9.0] + [2.0] * (ENTITIES - 1) + [8.0]


def test_a_push_that_began_before_a_build_is_in_the_new_generation_too(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))
    steps = generations_push(rows(9.0, minute=5, entities=1))
    commands = next(steps)
    commands = steps.send(generations.execute(redis_client, commands))  # the pointer is read: it names one generation

    def source() -> pl.DataFrame:
        finish(redis_client, steps, commands)
        return rows(2.0)

    build(redis_client, source)
    assert values(redis_client) == [9.0] + [2.0] * (ENTITIES - 1)


def finish(client: Redis, steps: Any, commands: Any) -> None:
    with contextlib.suppress(StopIteration):
        while True:
            commands = steps.send(generations.execute(client, commands))


def generations_push(frame: pl.DataFrame) -> Any:
    from mlplatform.feature_store.writer import View, newest_rows
    from mlplatform.feature_store.writer import push as push_steps

    view = View("p", "v", FEATURES)
    return push_steps(view, newest_rows(view, ["who"], frame).packed(view), clustered=False)


def test_carrying_over_keeps_other_entities_and_newer_values(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))
    push(redis_client, rows(9.0, minute=9, entities=1))
    built = build(redis_client, lambda: rows(2.0, minute=5, entities=2), carry_over=True)
    assert (built.entities, built.carried_over, built.overtaken) == (2, ENTITIES - 2, 1)
    assert values(redis_client) == [9.0, 2.0] + [1.0] * (ENTITIES - 2)


def test_changed_features_are_a_new_generation_and_never_misread(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))
    build_generation(redis_client, "p", "v", ["who"], ["a"], lambda: rows(2.0), at=T0, by="a test", carry_over=True)
    with pytest.raises(ValueError, match="rebuild it"):
        values(redis_client)
    with pytest.raises(ValueError, match="rebuild the view"):
        push(redis_client, rows(3.0, minute=1))
    narrow = ViewLayout.declare("v", ["who"], ["a"], None)
    found = SyncOnlineReader(redis_client, "p").read([(narrow, (0,))])[0]
    assert found is not None
    assert found.values.tolist() == [2.0]
    restore(redis_client, "p", "v", at=T0, by="a test")
    assert values(redis_client) == [1.0] * ENTITIES


def test_of_two_builders_the_second_wins_and_the_first_is_told(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))

    def source() -> pl.DataFrame:
        build(redis_client, lambda: rows(3.0))
        return rows(2.0)

    with pytest.raises(TakenOverError, match="another materialization took over"):
        build(redis_client, source)
    assert values(redis_client) == [3.0] * ENTITIES
    assert pointer(redis_client).building is None


def test_a_source_that_fails_leaves_what_is_read_and_no_build_behind(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))

    def source() -> pl.DataFrame:
        raise OSError("the lake is away")

    with pytest.raises(OSError, match="the lake is away"):
        build(redis_client, source)
    assert values(redis_client) == [1.0] * ENTITIES
    assert pointer(redis_client).building is None


def test_a_generation_that_lost_values_is_not_flipped_to(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    build(redis_client, lambda: rows(1.0))
    fill = generations.fill_rows

    def losing(generation: int, packed: Any, clustered: bool) -> Any:
        yield from fill(generation, packed, clustered)
        redis_client.delete(*value_keys(generation, [entity_part("v", [3])]))

    monkeypatch.setattr(generations, "fill_rows", losing)
    with pytest.raises(VerificationError, match=f"{ENTITIES - 1} of {ENTITIES}"):
        build(redis_client, lambda: rows(2.0))
    assert values(redis_client) == [1.0] * ENTITIES


def test_a_generation_with_a_changed_bit_is_not_flipped_to(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = generations.fill_rows

    def flipping(generation: int, packed: Any, clustered: bool) -> Any:
        yield from fill(generation, packed, clustered)
        key = value_keys(generation, [entity_part("v", [3])])[0]
        value = redis_client.get(key)
        redis_client.set(key, value[:-1] + bytes([value[-1] ^ 1]))

    monkeypatch.setattr(generations, "fill_rows", flipping)
    with pytest.raises(VerificationError, match="not what was written"):
        build(redis_client, lambda: rows(2.0))
    assert values(redis_client) == [None] * ENTITIES


# --- restoring and reclaiming ----------------------------------------------------------------------------------------


def test_restoring_brings_the_generation_before_back_with_every_push_since(redis_client: Redis) -> None:
    first = build(redis_client, lambda: rows(1.0))
    second = build(redis_client, lambda: rows(2.0))
    push(redis_client, rows(9.0, minute=5, entities=1))
    manifest = restore(redis_client, "p", "v", at=T0, by="someone")
    assert values(redis_client) == [9.0] + [1.0] * (ENTITIES - 1)
    assert [tuple(r) for r in manifest.restored] == [(T0.isoformat(), second.generation, "someone")]
    kept = manifest_of(redis_client, first.generation)
    assert kept is not None
    assert len(kept.restored) == 1
    restore(redis_client, "p", "v", at=T0, by="someone")
    assert values(redis_client) == [9.0] + [2.0] * (ENTITIES - 1)


@pytest.mark.parametrize("builds", [0, 1])
def test_restoring_what_has_no_generation_before_is_a_clear_error(redis_client: Redis, builds: int) -> None:
    for _ in range(builds):
        build(redis_client, lambda: rows(1.0))
    with pytest.raises(NoPreviousGenerationError, match="view v"):
        restore(redis_client, "p", "v", at=T0, by="someone")


def test_the_generation_before_the_previous_is_reclaimed_after_its_time_of_grace(redis_client: Redis) -> None:
    one, two, three = (build(redis_client, lambda v=v: rows(v)).generation for v in (1.0, 2.0, 3.0))
    assert set(stored(redis_client)) == {one, two, three}
    assert 0 < redis_client.ttl(manifest_key(one)) <= GRACE_S
    assert reclaim_due(redis_client) == 0
    assert reclaim(redis_client).keys == 0
    expire(redis_client)
    four = build(redis_client, lambda: rows(4.0)).generation
    assert set(stored(redis_client)) == {two, three, four}
    assert values(redis_client) == [4.0] * ENTITIES


def test_reclaiming_removes_what_dead_builders_left_and_nothing_else(redis_client: Redis) -> None:
    current = build(redis_client, lambda: rows(1.0)).generation
    redis_client.set("fs:other", b"not ours")
    redis_client.incrby(COUNTER_KEY, 100)
    orphan = value_keys(current + 50, [entity_part("v", [1])])[0]
    redis_client.set(orphan, b"left by a writer that was very late")
    assert reclaim(redis_client).keys == 1
    assert stored(redis_client) == {current: ENTITIES}
    assert redis_client.get("fs:other") == b"not ours"


def test_a_live_generation_survives_reclaiming_even_without_its_manifest(redis_client: Redis) -> None:
    current = build(redis_client, lambda: rows(1.0)).generation
    redis_client.delete(manifest_key(current))
    assert reclaim(redis_client, grace_s=0).keys == 0
    assert values(redis_client) == [1.0] * ENTITIES


def test_reclaiming_during_a_build_takes_nothing_of_it(redis_client: Redis) -> None:
    def source() -> pl.DataFrame:
        push(redis_client, rows(9.0, minute=5, entities=1))
        reclaim(redis_client, grace_s=0)
        return rows(2.0)

    build(redis_client, source)
    reclaim(redis_client, grace_s=0)
    assert values(redis_client) == [9.0] + [2.0] * (ENTITIES - 1)


def test_a_reader_that_remembers_a_reclaimed_generation_reads_the_new_one(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))
    reader = SyncOnlineReader(redis_client, "p")
    assert reader.read([(LAYOUT, (0,))])[0] is not None
    for value in (2.0, 3.0):
        build(redis_client, lambda value=value: rows(value))
    expire(redis_client)
    assert reclaim_due(redis_client) == ENTITIES
    found = reader.read([(LAYOUT, (0,))])[0]
    assert found is not None
    assert found.values[0] == 3.0


def test_a_view_that_was_never_written_reads_as_missing_until_it_is(redis_client: Redis) -> None:
    reader = SyncOnlineReader(redis_client, "p")
    assert reader.read([(LAYOUT, (0,))]) == [None]
    push(redis_client, rows(1.0))
    assert reader.read([(LAYOUT, (0,))])[0] is not None


def test_a_removed_view_is_gone_at_once(redis_client: Redis) -> None:
    build(redis_client, lambda: rows(1.0))
    write_frame(redis_client, "p", "v2", ["who"], FEATURES, rows(1.0))
    remove_views(redis_client, "p", "v")
    assert list(pointers(redis_client)) == [("p", "v2")]
    assert sum(stored(redis_client).values()) == ENTITIES


# --- under fire ------------------------------------------------------------------------------------------------------


def _write_for_ever(url: str) -> None:
    """Builds one generation after the other, each of one value, until it is killed."""
    with Redis.from_url(url) as client:
        n = 0
        while True:
            n += 1
            value = float(os.getpid() * 1_000 + n)
            build(client, lambda value=value: rows(value))


def test_killing_the_builder_process_never_shows_a_mixture_and_the_next_build_succeeds(valkey_url: str, redis_client: Redis) -> None:
    rng = np.random.default_rng(3)
    fork = multiprocessing.get_context("fork")
    build(redis_client, lambda: rows(0.0))
    for kill in range(30):
        builder = fork.Process(target=_write_for_ever, args=(valkey_url,))
        builder.start()
        time.sleep(0.03 + 0.04 * rng.random())
        assert builder.pid is not None
        os.kill(builder.pid, signal.SIGKILL)
        builder.join(30)
        assert len(set(values(redis_client))) == 1, f"a mixture after kill {kill}"
    build(redis_client, lambda: rows(-1.0))
    reclaim(redis_client)
    expire(redis_client)
    reclaim(redis_client)
    assert values(redis_client) == [-1.0] * ENTITIES
    assert set(stored(redis_client)) == {g.number for g in pointer(redis_client).live()}


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
    valkey_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows go out in many small commands, so that cuts fall between them.
    monkeypatch.setattr("mlplatform.feature_store.writer.BATCH", 8)
    monkeypatch.setattr(generations, "execute", lambda client, commands: [client.execute_command(*c) for c in commands])
    monkeypatch.setattr("mlplatform.feature_store.commands.execute", generations.execute)
    rng = np.random.default_rng(4)
    client = CuttingClient.from_url(valkey_url)
    client.arm(10**9, answered=True)
    build(client, lambda: rows(0.0))
    client.arm(10**9, answered=True)
    build(client, lambda: rows(0.0), carry_over=True)
    whole = 10**9 - client.left
    cuts = n = 0
    while cuts < 500:
        n += 1
        if n % 2:
            push(redis_client, rows(float(-n), minute=n))  # what a build that ends is older than
        before = set(values(redis_client))
        client.arm(int(rng.integers(1, whole)), answered=bool(rng.integers(2)))
        try:
            build(client, lambda n=n: rows(float(n), minute=n + 1), carry_over=bool(n % 3))
        except Cut:
            cuts += 1
        assert set(values(redis_client)) in (before, {float(n)})
        assert len(set(values(redis_client))) == 1
        if n % 25 == 0:
            build(redis_client, lambda n=n: rows(0.5, minute=n + 1.5))
            assert values(redis_client) == [0.5] * ENTITIES
            reclaim(redis_client)
            expire(redis_client)
            reclaim(redis_client)
            assert set(stored(redis_client)) == {g.number for g in pointer(redis_client).live()}
    client.close()


def _push_race(url: str, seed: int) -> None:
    """Every row of the race, in an order of this writer's own."""
    with Redis.from_url(url) as client:
        for minute in np.random.default_rng(seed).permutation(120):
            push(client, race_rows(int(minute)))


def race_rows(minute: int) -> pl.DataFrame:
    """Two thirds of the entities; the same minute comes from all writers with the same values."""
    return rows(float(minute), minute=minute).filter((pl.col("who") + minute) % 3 != 0)


def test_writers_racing_with_builds_leave_what_one_writer_would_in_both_generations(valkey_url: str, redis_client: Redis) -> None:
    build(redis_client, lambda: rows(-1.0, minute=-1))
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_push_race, args=(valkey_url, seed)) for seed in (1, 2, 3)]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        build(redis_client, lambda: rows(-1.0, minute=-1), carry_over=True)
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0, 0]
    expected = [float(max(m for m in range(120) if (who + m) % 3)) for who in range(ENTITIES)]
    assert values(redis_client) == expected
    build(redis_client, lambda: rows(-1.0, minute=-1), carry_over=True)
    restore(redis_client, "p", "v", at=T0, by="a test")
    assert values(redis_client) == expected


def test_readers_during_flips_see_one_generation_per_read(valkey_url: str, redis_client: Redis) -> None:
    build(redis_client, lambda: rows(0.0))
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
        build(redis_client, lambda n=n: rows(float(n)))
        expire(redis_client)
        if n % 7 == 0:
            restore(redis_client, "p", "v", at=T0, by="a test")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert reads[0] > 60
    assert mixtures == []
