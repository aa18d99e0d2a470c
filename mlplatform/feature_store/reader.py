"""Reading the online store on the service's hot path: any number of views and entities in one round trip.

Belongs here: layouts of views and the two readers (async for the service, plain for checks and tests). Does not belong
here: Feast, pandas, Polars, and what to do about a value that is missing or too old: that is the caller's contract.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from mlplatform.feature_store.codec import (
    Decoded,
    JoinValue,
    SchemaMismatchError,
    decode,
    entity_key,
    feature_order,
    join_order,
    schema_hash,
)

State = Literal["fresh", "expired", "missing"]

# One MGET blocks the server while it runs; more keys than this go as several in one pipeline.
KEYS_PER_COMMAND = 1_000


@dataclass(frozen=True)
class ViewLayout:
    """A view as its reader wants it: `features` in any order, in which its values are then given.

    `join_keys` are sorted by name: give the values of a request in that order. `schema` is the hash over the sorted
    features, `ttl_us` None means never expires. Build it with `declare`.
    """

    name: str
    join_keys: tuple[str, ...]
    features: tuple[str, ...]
    schema: int
    ttl_us: int | None

    @classmethod
    def declare(cls, name: str, join_keys: Sequence[str], features: Sequence[str], ttl: timedelta | None) -> Self:
        """`ttl` None or 0: never expires, as in Feast."""
        ttl_us = ttl // timedelta(microseconds=1) if ttl else None
        return cls(name, join_order(join_keys), tuple(features), schema_hash(name, feature_order(features)), ttl_us)

    def __post_init__(self) -> None:
        if self.join_keys != join_order(self.join_keys):
            raise ValueError(f"view {self.name}: join keys lie in the store sorted by name: {join_order(self.join_keys)}")

    @cached_property
    def places(self) -> npt.NDArray[np.intp] | None:
        """Where each of `features` lies among the packed values; None where they stand in packed order already."""
        packed = {name: place for place, name in enumerate(feature_order(self.features))}
        places = np.array([packed[name] for name in self.features], dtype=np.intp)
        return None if (places == np.arange(len(places))).all() else places

    def age_us(self, value: Decoded, now_us: int) -> int:
        """Microseconds since the value became known; negative where the clocks disagree."""
        return now_us - value.event_us

    def state(self, value: Decoded | None, now_us: int) -> State:
        """`expired` means older than the ttl, exactly as the history's join has it: age > ttl."""
        if value is None:
            return "missing"
        return "expired" if self.ttl_us is not None and self.age_us(value, now_us) > self.ttl_us else "fresh"


# A view and the values of its join keys in the layout's order.
Request = tuple[ViewLayout, Sequence[JoinValue]]


@dataclass(frozen=True)
class OnlineReader:
    """Reads values through an asyncio client (made with `decode_responses=False`)."""

    client: AsyncRedis
    project: str

    async def read(self, requests: Sequence[Request]) -> list[Decoded | None]:
        """One answer per request, in order; None where nothing is stored. Age is not judged: see `ViewLayout.state`.

        Raises SchemaMismatchError where a view's stored values have other features than the layout, and redis errors.
        """
        keys = request_keys(self.project, requests)
        distinct = list(dict.fromkeys(keys))
        if len(distinct) <= KEYS_PER_COMMAND:
            values: list[Any] = list(await self.client.mget(distinct)) if distinct else []
        else:
            pipe = self.client.pipeline(transaction=False)
            for start in range(0, len(distinct), KEYS_PER_COMMAND):
                pipe.mget(distinct[start : start + KEYS_PER_COMMAND])
            values = [value for chunk in await pipe.execute() for value in chunk]
        return _decoded(requests, keys, dict(zip(distinct, values, strict=True)))


@dataclass(frozen=True)
class SyncOnlineReader:
    """`OnlineReader` through a plain client, for checks, monitoring and tests."""

    client: Redis
    project: str

    def read(self, requests: Sequence[Request]) -> list[Decoded | None]:
        keys = request_keys(self.project, requests)
        distinct = list(dict.fromkeys(keys))
        pipe = self.client.pipeline(transaction=False)
        for start in range(0, len(distinct), KEYS_PER_COMMAND):
            pipe.mget(distinct[start : start + KEYS_PER_COMMAND])
        values = [value for chunk in pipe.execute() for value in chunk]
        return _decoded(requests, keys, dict(zip(distinct, values, strict=True)))


def request_keys(project: str, requests: Sequence[Request]) -> list[bytes]:
    """The key of each request. Raises ValueError where a request has more or fewer values than the view has join keys."""
    for layout, values in requests:
        if len(values) != len(layout.join_keys):
            raise ValueError(f"view {layout.name} has the join keys {layout.join_keys}, not {len(values)} values")
    return [entity_key(project, layout.name, values) for layout, values in requests]


def decode_packed(layout: ViewLayout, packed: bytes | None) -> Decoded | None:
    """A stored value with its features in the layout's order. Raises SchemaMismatchError naming the view."""
    try:
        value = decode(packed, layout.schema, len(layout.features))
    except SchemaMismatchError as mismatch:
        raise SchemaMismatchError(f"view {layout.name}: {mismatch}") from mismatch
    if value is None or layout.places is None:
        return value
    return Decoded(value.event_us, value.created_us, value.values[layout.places])


def _decoded(requests: Sequence[Request], keys: Sequence[bytes], stored: Mapping[bytes, bytes | None]) -> list[Decoded | None]:
    return [decode_packed(layout, stored[key]) for (layout, _), key in zip(requests, keys, strict=True)]
