"""What stays in the online store: order, corrections, replays and races, on a real Valkey."""

import multiprocessing
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from mlplatform.feature_store.codec import (
    PREFIX_BYTES,
    SchemaMismatchError,
    decode,
    encode,
    entity_part,
    pointer_key,
    schema_hash,
    value_keys,
)
from mlplatform.feature_store.commands import run
from mlplatform.feature_store.pointer import Pointer
from mlplatform.feature_store.writer import BATCH, Packed, WriteCounts, entity_parts, fill_rows, put_rows, write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
FEATURES = ("a", "b")
SCHEMA = schema_hash("v", FEATURES)


def packed(event: int, created: int, value: float = 0.0, schema: int = SCHEMA) -> bytes:
    return encode(schema, event, created, np.array([value, float(event)]))


GENERATION = 7


def write_packed(client: Redis, entities: list[bytes], values: list[bytes]) -> int:
    """Compare-and-set in a generation of the test's own."""
    return run(client, put_rows(GENERATION, Packed(entities, values), clustered=False))


def key(entity: bytes, generation: int = GENERATION) -> bytes:
    return value_keys(generation, [entity])[0]


def current(client: Redis, view: str = "v") -> int:
    generation = Pointer.parse(client.get(pointer_key("p", view))).current
    assert generation is not None
    return generation.number


def frame(rows: list[tuple[str, int, int, float | None]]) -> pl.DataFrame:
    """(entity, event minute, created minute, value) as rows of view `v`."""
    return pl.DataFrame(
        {
            "who": [r[0] for r in rows],
            "event_timestamp": [T0 + timedelta(minutes=r[1]) for r in rows],
            "created": [T0 + timedelta(minutes=r[2]) for r in rows],
            "b": [r[3] for r in rows],
            "a": [1.0] * len(rows),
        },
        schema={
            "who": pl.String,
            "event_timestamp": pl.Datetime("us", "UTC"),
            "created": pl.Datetime("us", "UTC"),
            "b": pl.Float64,
            "a": pl.Float64,
        },
    )


def put(client: Redis, rows: list[tuple[str, int, int, float | None]]) -> WriteCounts:
    return write_frame(client, "p", "v", ["who"], FEATURES, frame(rows))


def value_of(client: Redis, who: str) -> float:
    found = decode(client.get(key(entity_part("v", [who]), current(client))), SCHEMA, 2)
    assert found is not None
    return float(found.values[1])


def test_a_newer_value_replaces_and_a_late_one_does_not(redis_client: Redis) -> None:
    assert put(redis_client, [("x", 5, 5, 1.0)]) == WriteCounts(1, 0)
    assert put(redis_client, [("x", 4, 9, 2.0)]) == WriteCounts(0, 1)
    assert value_of(redis_client, "x") == 1.0
    assert put(redis_client, [("x", 6, 6, 3.0)]) == WriteCounts(1, 0)
    assert value_of(redis_client, "x") == 3.0


def test_a_correction_with_the_same_event_time_wins_and_a_replay_changes_nothing(redis_client: Redis) -> None:
    put(redis_client, [("x", 5, 5, 1.0)])
    assert put(redis_client, [("x", 5, 8, 2.0)]) == WriteCounts(1, 0)
    assert put(redis_client, [("x", 5, 5, 1.0)]) == WriteCounts(0, 1)
    assert put(redis_client, [("x", 5, 8, 2.0)]) == WriteCounts(0, 1)
    assert value_of(redis_client, "x") == 2.0


def test_of_several_rows_in_one_frame_the_newest_is_written(redis_client: Redis) -> None:
    assert put(redis_client, [("x", 5, 5, 1.0), ("x", 7, 7, 2.0), ("y", 1, 1, 3.0), ("x", 7, 6, 4.0)]) == WriteCounts(2, 2)
    assert (value_of(redis_client, "x"), value_of(redis_client, "y")) == (2.0, 3.0)


def test_a_changed_schema_is_written_over_a_value_of_the_same_time_but_not_over_a_newer_one(redis_client: Redis) -> None:
    other = schema_hash("v", ("a", "c"))
    assert write_packed(redis_client, [b"k"], [packed(5, 5)]) == 1
    assert write_packed(redis_client, [b"k"], [packed(5, 5, schema=other)]) == 1
    assert write_packed(redis_client, [b"k"], [packed(4, 5)]) == 0


def test_filling_compares_row_by_row_what_meets_a_value_that_is_there(redis_client: Redis) -> None:
    entities = [b"k%d" % i for i in range(BATCH + 2)]
    write_packed(redis_client, [b"k0", b"k1"], [packed(4, 4), packed(9, 9)])
    run(redis_client, fill_rows(GENERATION, Packed(entities, [packed(5, 5)] * len(entities)), clustered=False))
    values = redis_client.mget([key(e) for e in entities])
    assert values == [packed(5, 5), packed(9, 9)] + [packed(5, 5)] * BATCH


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**62), 2**62), st.integers(-(2**62), 2**62)), min_size=1, max_size=8), st.randoms())
def test_the_greatest_time_stays_whatever_the_order(valkey_url: str, times: list[tuple[int, int]], random: object) -> None:
    client = Redis.from_url(valkey_url)
    client.delete(key(b"k"))
    shuffled = sorted(times, key=lambda _: random.random())  # type: ignore[attr-defined]
    for event, created in shuffled:
        write = random.choice((put_rows, fill_rows))  # type: ignore[attr-defined]
        run(client, write(GENERATION, Packed([b"k"], [packed(event, created)]), clustered=False))
    assert client.get(key(b"k"))[:PREFIX_BYTES] == packed(*max(times))[:PREFIX_BYTES]
    client.close()


def _race(url: str, seed: int) -> None:
    """Every row of the race in an order of this writer's own."""
    client = Redis.from_url(url)
    order = np.random.default_rng(seed).permutation(4_000)
    for start in range(0, 4_000, 250):
        chosen = order[start : start + 250]
        write_packed(
            client, [entity_part("v", [int(i) % 100]) for i in chosen], [packed(int(i) // 200, int(i) % 7, float(i)) for i in chosen]
        )
    client.close()


def test_racing_writers_leave_what_one_writer_would(valkey_url: str, redis_client: Redis) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_race, args=(valkey_url, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0]
    for entity in range(100):
        best = max((i // 200, i % 7) for i in range(4_000) if i % 100 == entity)
        assert redis_client.get(key(entity_part("v", [entity])))[:PREFIX_BYTES] == packed(*best)[:PREFIX_BYTES]


def test_more_rows_than_a_batch_are_all_written(redis_client: Redis) -> None:
    rows = [(str(i), i % 50, i % 50, float(i)) for i in range(2 * BATCH + 17)]
    assert put(redis_client, rows) == WriteCounts(len(rows), 0)
    assert put(redis_client, rows) == WriteCounts(0, len(rows))
    assert len(redis_client.keys("fs:*")) == len(rows)


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1)), max_size=5))
def test_entities_of_a_frame_are_the_codecs(rows: list[tuple[str, int]]) -> None:
    made = pl.DataFrame(rows, schema={"a": pl.String, "b": pl.Int64}, orient="row")
    assert entity_parts("v", ("a", "b"), made) == [entity_part("v", row) for row in rows]


def test_a_view_without_entities_has_one_key(redis_client: Redis) -> None:
    write_frame(redis_client, "p", "state", [], FEATURES, frame([("x", 1, 1, 2.0), ("y", 2, 2, 3.0)]).drop("who"))
    assert redis_client.keys("fs:*") == [key(b"", current(redis_client, "state"))]


def test_rows_of_other_features_than_the_views_generation_are_refused(redis_client: Redis) -> None:
    put(redis_client, [("x", 1, 1, 1.0)])
    with pytest.raises(SchemaMismatchError, match="rebuild the view"):
        write_frame(redis_client, "p", "v", ["who"], ["a"], frame([("x", 2, 2, 1.0)]))
    assert value_of(redis_client, "x") == 1.0


def test_an_empty_frame_writes_nothing(redis_client: Redis) -> None:
    assert put(redis_client, []) == WriteCounts(0, 0)


def test_null_and_nan_are_one_and_the_same(redis_client: Redis) -> None:
    put(redis_client, [("x", 1, 1, None), ("y", 1, 1, float("nan"))])
    x, y = (redis_client.get(key(entity_part("v", [who]), current(redis_client))) for who in "xy")
    assert x == y
    assert x is not None


@pytest.mark.parametrize("hole", ["who", "event_timestamp", "created"])
def test_a_row_without_key_or_time_is_refused(redis_client: Redis, hole: str) -> None:
    with pytest.raises(ValueError, match="view v"):
        write_frame(
            redis_client,
            "p",
            "v",
            ["who"],
            FEATURES,
            frame([("x", 1, 1, 1.0)]).with_columns(pl.lit(None).cast(frame([]).schema[hole]).alias(hole)),
        )
    assert redis_client.dbsize() == 0


@pytest.mark.parametrize(
    ("column", "error"),
    [(pl.lit("text"), TypeError), (pl.lit(2**53 + 1, pl.Int64), ValueError)],
)
def test_features_that_float64_cannot_hold_are_refused(redis_client: Redis, column: pl.Expr, error: type[Exception]) -> None:
    with pytest.raises(error, match="feature b"):
        write_frame(redis_client, "p", "v", ["who"], FEATURES, frame([("x", 1, 1, 1.0)]).with_columns(column.alias("b")))
