"""Generations on a real Valkey: built beside what is read, verified, flipped, restored, reclaimed."""

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from redis import Redis

from mlplatform.feature_store import generations
from mlplatform.feature_store.codec import COUNTER_KEY, entity_part, manifest_key, value_keys
from mlplatform.feature_store.generations import (
    NoPreviousGenerationError,
    TakenOverError,
    VerificationError,
    build_generation,
    restore,
)
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import manifest_of, pointers, reclaim, reclaim_due, remove_views
from mlplatform.feature_store.writer import GRACE_S, write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
FEATURES = ("a", "b")
LAYOUT = ViewLayout.declare("v", ["who"], FEATURES, timedelta(days=1))
ENTITIES = 40


# --- building --------------------------------------------------------------------------------------------------------


def test_readers_see_the_new_generation_whole_after_the_flip_and_the_old_one_before(view: Any) -> None:
    view.build(lambda: view.rows(1.0, entities=ENTITIES + 3))

    def source() -> pl.DataFrame:
        assert view.values() == [1.0] * ENTITIES
        return view.rows(2.0, minute=-5)  # older rows: a rebuild says what is true, whatever was there

    built = view.build(source)
    assert (built.entities, built.sample, built.overtaken, built.newest) == (ENTITIES, ENTITIES, 0, T0 - timedelta(minutes=5))
    assert view.values(ENTITIES + 3) == [2.0] * ENTITIES + [None] * 3


def test_the_manifest_tells_what_was_built(view: Any, redis_client: Redis) -> None:
    built = view.build(lambda: view.rows(1.0))
    manifest = manifest_of(redis_client, built.generation)
    assert manifest is not None
    assert (manifest.project, manifest.view, tuple(manifest.features), manifest.schema) == ("p", "v", FEATURES, LAYOUT.schema)
    assert (manifest.state, manifest.entities, manifest.sample) == ("verified", ENTITIES, ENTITIES)
    assert (manifest.built_at, manifest.built_by, manifest.newest_event) == (T0.isoformat(), "a test", T0.isoformat())
    assert redis_client.ttl(manifest_key(built.generation)) == -1


def test_a_push_during_a_build_is_in_both_generations(view: Any) -> None:
    view.build(lambda: view.rows(1.0))

    def source() -> pl.DataFrame:
        view.push(view.rows(9.0, minute=5, entities=1))
        view.push(view.rows(8.0, minute=-9, entities=1, first=ENTITIES))
        assert view.values()[0] == 9.0
        return view.rows(2.0, minute=1)

    built = view.build(source)
    assert built.overtaken == 1
    assert view.values(ENTITIES + 1) == [9.0] + [2.0] * (ENTITIES - 1) + [8.0]


def test_a_push_that_began_before_a_build_is_in_the_new_generation_too(view: Any, redis_client: Redis) -> None:
    view.build(lambda: view.rows(1.0))
    steps = generations_push(view.rows(9.0, minute=5, entities=1))
    commands = next(steps)
    commands = steps.send(generations.execute(redis_client, commands))  # the pointer is read: it names one generation

    def source() -> pl.DataFrame:
        finish(redis_client, steps, commands)
        return view.rows(2.0)

    view.build(source)
    assert view.values() == [9.0] + [2.0] * (ENTITIES - 1)


def finish(client: Redis, steps: Any, commands: Any) -> None:
    with contextlib.suppress(StopIteration):
        while True:
            commands = steps.send(generations.execute(client, commands))


def generations_push(frame: pl.DataFrame) -> Any:
    from mlplatform.feature_store.writer import View, newest_rows
    from mlplatform.feature_store.writer import push as push_steps

    view = View("p", "v", FEATURES)
    return push_steps(view, newest_rows(view, ["who"], frame).packed(view), clustered=False)


def test_carrying_over_keeps_other_entities_and_newer_values(view: Any) -> None:
    view.build(lambda: view.rows(1.0))
    view.push(view.rows(9.0, minute=9, entities=1))
    built = view.build(lambda: view.rows(2.0, minute=5, entities=2), carry_over=True)
    assert (built.entities, built.carried_over, built.overtaken) == (2, ENTITIES - 2, 1)
    assert view.values() == [9.0, 2.0] + [1.0] * (ENTITIES - 2)


def test_changed_features_are_a_new_generation_and_never_misread(view: Any, redis_client: Redis) -> None:
    view.build(lambda: view.rows(1.0))
    build_generation(redis_client, "p", "v", ["who"], ["a"], lambda: view.rows(2.0), at=T0, by="a test", carry_over=True)
    with pytest.raises(ValueError, match="rebuild it"):
        view.values()
    with pytest.raises(ValueError, match="rebuild the view"):
        view.push(view.rows(3.0, minute=1))
    narrow = ViewLayout.declare("v", ["who"], ["a"], None)
    found = SyncOnlineReader(redis_client, "p").read([(narrow, (0,))])[0]
    assert found is not None
    assert found.values.tolist() == [2.0]
    restore(redis_client, "p", "v", at=T0, by="a test")
    assert view.values() == [1.0] * ENTITIES


def test_of_two_builders_the_second_wins_and_the_first_is_told(view: Any) -> None:
    view.build(lambda: view.rows(1.0))

    def source() -> pl.DataFrame:
        view.build(lambda: view.rows(3.0))
        return view.rows(2.0)

    with pytest.raises(TakenOverError, match="another materialization took over"):
        view.build(source)
    assert view.values() == [3.0] * ENTITIES
    assert view.pointer().building is None


def test_a_source_that_fails_leaves_what_is_read_and_no_build_behind(view: Any) -> None:
    view.build(lambda: view.rows(1.0))

    def source() -> pl.DataFrame:
        raise OSError("the lake is away")

    with pytest.raises(OSError, match="the lake is away"):
        view.build(source)
    assert view.values() == [1.0] * ENTITIES
    assert view.pointer().building is None


def test_a_generation_that_lost_values_is_not_flipped_to(view: Any, redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    view.build(lambda: view.rows(1.0))
    fill = generations.fill_rows

    def losing(generation: int, packed: Any, clustered: bool) -> Any:
        yield from fill(generation, packed, clustered)
        redis_client.delete(*value_keys(generation, [entity_part("v", [3])]))

    monkeypatch.setattr(generations, "fill_rows", losing)
    with pytest.raises(VerificationError, match=f"{ENTITIES - 1} of {ENTITIES}"):
        view.build(lambda: view.rows(2.0))
    assert view.values() == [1.0] * ENTITIES


def test_a_generation_with_a_changed_bit_is_not_flipped_to(view: Any, redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = generations.fill_rows

    def flipping(generation: int, packed: Any, clustered: bool) -> Any:
        yield from fill(generation, packed, clustered)
        key = value_keys(generation, [entity_part("v", [3])])[0]
        value = redis_client.get(key)
        redis_client.set(key, value[:-1] + bytes([value[-1] ^ 1]))

    monkeypatch.setattr(generations, "fill_rows", flipping)
    with pytest.raises(VerificationError, match="not what was written"):
        view.build(lambda: view.rows(2.0))
    assert view.values() == [None] * ENTITIES


# --- restoring and reclaiming ----------------------------------------------------------------------------------------


def test_restoring_brings_the_generation_before_back_with_every_push_since(view: Any, redis_client: Redis) -> None:
    first = view.build(lambda: view.rows(1.0))
    second = view.build(lambda: view.rows(2.0))
    view.push(view.rows(9.0, minute=5, entities=1))
    manifest = restore(redis_client, "p", "v", at=T0, by="someone")
    assert view.values() == [9.0] + [1.0] * (ENTITIES - 1)
    assert [tuple(r) for r in manifest.restored] == [(T0.isoformat(), second.generation, "someone")]
    kept = manifest_of(redis_client, first.generation)
    assert kept is not None
    assert len(kept.restored) == 1
    restore(redis_client, "p", "v", at=T0, by="someone")
    assert view.values() == [9.0] + [2.0] * (ENTITIES - 1)


@pytest.mark.parametrize("builds", [0, 1])
def test_restoring_what_has_no_generation_before_is_a_clear_error(view: Any, redis_client: Redis, builds: int) -> None:
    for _ in range(builds):
        view.build(lambda: view.rows(1.0))
    with pytest.raises(NoPreviousGenerationError, match="view v"):
        restore(redis_client, "p", "v", at=T0, by="someone")


def test_the_generation_before_the_previous_is_reclaimed_after_its_time_of_grace(view: Any, redis_client: Redis) -> None:
    one, two, three = (view.build(lambda v=v: view.rows(v)).generation for v in (1.0, 2.0, 3.0))
    assert set(view.stored()) == {one, two, three}
    assert 0 < redis_client.ttl(manifest_key(one)) <= GRACE_S
    assert reclaim_due(redis_client) == 0
    assert reclaim(redis_client).keys == 0
    view.expire()
    four = view.build(lambda: view.rows(4.0)).generation
    assert set(view.stored()) == {two, three, four}
    assert view.values() == [4.0] * ENTITIES


def test_reclaiming_removes_what_dead_builders_left_and_nothing_else(view: Any, redis_client: Redis) -> None:
    current = view.build(lambda: view.rows(1.0)).generation
    redis_client.set("fs:other", b"not ours")
    redis_client.incrby(COUNTER_KEY, 100)
    orphan = value_keys(current + 50, [entity_part("v", [1])])[0]
    redis_client.set(orphan, b"left by a writer that was very late")
    assert reclaim(redis_client).keys == 1
    assert view.stored() == {current: ENTITIES}
    assert redis_client.get("fs:other") == b"not ours"


def test_a_live_generation_survives_reclaiming_even_without_its_manifest(view: Any, redis_client: Redis) -> None:
    current = view.build(lambda: view.rows(1.0)).generation
    redis_client.delete(manifest_key(current))
    assert reclaim(redis_client, grace_s=0).keys == 0
    assert view.values() == [1.0] * ENTITIES


def test_reclaiming_during_a_build_takes_nothing_of_it(view: Any, redis_client: Redis) -> None:
    def source() -> pl.DataFrame:
        view.push(view.rows(9.0, minute=5, entities=1))
        reclaim(redis_client, grace_s=0)
        return view.rows(2.0)

    view.build(source)
    reclaim(redis_client, grace_s=0)
    assert view.values() == [9.0] + [2.0] * (ENTITIES - 1)


def test_a_reader_that_remembers_a_reclaimed_generation_reads_the_new_one(view: Any, redis_client: Redis) -> None:
    view.build(lambda: view.rows(1.0))
    reader = SyncOnlineReader(redis_client, "p")
    assert reader.read([(LAYOUT, (0,))])[0] is not None
    for value in (2.0, 3.0):
        view.build(lambda value=value: view.rows(value))
    view.expire()
    assert reclaim_due(redis_client) == ENTITIES
    found = reader.read([(LAYOUT, (0,))])[0]
    assert found is not None
    assert found.values[0] == 3.0


def test_a_view_that_was_never_written_reads_as_missing_until_it_is(view: Any, redis_client: Redis) -> None:
    reader = SyncOnlineReader(redis_client, "p")
    assert reader.read([(LAYOUT, (0,))]) == [None]
    view.push(view.rows(1.0))
    assert reader.read([(LAYOUT, (0,))])[0] is not None


def test_a_removed_view_is_gone_at_once(view: Any, redis_client: Redis) -> None:
    view.build(lambda: view.rows(1.0))
    write_frame(redis_client, "p", "v2", ["who"], FEATURES, view.rows(1.0))
    remove_views(redis_client, "p", "v")
    assert list(pointers(redis_client)) == [("p", "v2")]
    assert sum(view.stored().values()) == ENTITIES
