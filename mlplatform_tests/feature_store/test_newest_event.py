"""The newest event time the store keeps of each generation, on a real Valkey: by builds, pushes, restores and reclaims."""

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from redis import Redis

from mlplatform.feature_store.codec import RETIRED_KEY, manifest_key
from mlplatform.feature_store.generations import Built, build_generation
from mlplatform.feature_store.reclaim import newest_events, pointer_of, reclaim
from mlplatform.feature_store.writer import write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)


def rows(*minutes: int, first: int = 0) -> pl.DataFrame:
    """An entity for each minute after T0 at which its value became known."""
    at = [T0 + timedelta(minutes=m) for m in minutes]
    return pl.DataFrame(
        {"who": range(first, first + len(at)), "a": [1.0] * len(at), "event_timestamp": at, "created": at},
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC")},
    )


def build(client: Redis, *minutes: int, **options: Any) -> Built:
    return build_generation(client, "p", "v", ["who"], ["a"], lambda: rows(*minutes), at=T0, by="a test", **options)


def push(client: Redis, frame: pl.DataFrame) -> None:
    write_frame(client, "p", "v", ["who"], ["a"], frame)


def newest(client: Redis) -> int | None:
    """Of the generation that is read, in minutes after T0."""
    current = pointer_of(client, "p", "v").current
    assert current is not None
    found = newest_events(client).get(current.number)
    return None if found is None else (found - T0) // timedelta(minutes=1)


def test_it_is_the_newest_of_the_build_and_of_every_push_since(redis_client: Redis) -> None:
    build(redis_client, 3, 7)
    assert newest(redis_client) == 7
    push(redis_client, rows(5))
    assert newest(redis_client) == 7
    push(redis_client, rows(6, 9))
    assert newest(redis_client) == 9


def test_the_first_push_of_a_view_is_noted_too_also_before_1970(redis_client: Redis) -> None:
    push(redis_client, rows(-60_000_000))
    assert newest(redis_client) == -60_000_000


def test_a_new_generation_has_its_own_unless_values_are_carried_over(redis_client: Redis) -> None:
    build(redis_client, 3, 7)
    build(redis_client, 1, carry_over=True)
    assert newest(redis_client) == 7
    build(redis_client, 1)
    assert newest(redis_client) == 1


def test_a_generation_without_rows_has_none_until_one_is_pushed(redis_client: Redis) -> None:
    build(redis_client)
    assert newest(redis_client) is None
    push(redis_client, rows(2))
    assert newest(redis_client) == 2


def test_it_goes_when_its_generation_is_reclaimed(redis_client: Redis) -> None:
    one, two, three = (build(redis_client, 1).generation for _ in range(3))
    assert set(newest_events(redis_client)) == {one, two, three}
    for member in redis_client.smembers(RETIRED_KEY):
        redis_client.delete(manifest_key(int(member)))
    reclaim(redis_client)
    assert set(newest_events(redis_client)) == {two, three}
