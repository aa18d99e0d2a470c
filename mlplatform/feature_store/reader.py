"""Reading the online store on the service's hot path: any number of views and entities in one round trip.

Belongs here: layouts of views and the two readers (async for the service, plain for checks and tests). Does not belong
here: Feast, pandas, Polars, and what to do about a value that is missing or too old: that is the caller's contract.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from mlplatform.feature_store.codec import (
    Decoded,
    JoinValue,
    SchemaMismatchError,
    decode_many,
    entity_part,
    feature_order,
    join_order,
    pointer_key,
    schema_hash,
    value_keys,
)
from mlplatform.feature_store.commands import AsyncClient, Client, Steps, get_values, is_cluster, run, run_async
from mlplatform.feature_store.pointer import Generation, Pointer

State = Literal["fresh", "expired", "missing"]


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


@dataclass
class _Seen:
    """A view's pointer as it was read last: while its bytes stay the same, nothing of it is parsed again."""

    raw: bytes | None
    current: Generation | None


@dataclass(frozen=True)
class _Reads:
    """The protocol of a read, whatever the client. Keeps the pointers between reads, so that one round trip is enough.

    Pointers and values of the generations they named last go out together, pointers last. If a view's current generation
    turns out to be another one, its values are read again from that. So all values of a view come from one
    generation, which was live when its pointer was read, after the values.
    """

    project: str
    clustered: bool
    seen: dict[str, _Seen] = field(default_factory=dict)

    def read(self, requests: Sequence[Request]) -> Steps[list[Decoded | None]]:
        answers: list[Decoded | None] = [None] * len(requests)
        asked = _by_layout(requests)
        while asked:
            views = list({group.layout.name: None for group in asked})
            used = {view: seen.current if (seen := self.seen.get(view)) else None for view in views}
            keys = [self._keys(group, used[group.layout.name]) for group in asked]
            flat = [key for group_keys in keys for key in group_keys]
            replies = yield from get_values([*flat, *(pointer_key(self.project, view) for view in views)], self.clustered)
            self._see(views, replies[len(flat) :])
            again = []
            at = 0
            for group, group_keys in zip(asked, keys, strict=True):
                stored = replies[at : (at := at + len(group_keys))]
                generation = used[group.layout.name]
                if self.seen[group.layout.name].current != generation:
                    again.append(group)
                elif generation is not None:
                    for place, value in zip(group.places, decode_packed(group.layout, generation, stored), strict=True):
                        answers[place] = value
            asked = again
        return answers

    def _keys(self, group: "_Group", generation: Generation | None) -> list[bytes]:
        return [] if generation is None else value_keys(generation.number, group.entities, self.clustered)

    def _see(self, views: Sequence[str], pointers: Sequence[bytes | None]) -> None:
        for view, raw in zip(views, pointers, strict=True):
            seen = self.seen.get(view)
            if seen is None or seen.raw != raw:
                self.seen[view] = _Seen(raw, Pointer.parse(raw).current)


@dataclass(frozen=True)
class _Group:
    """The requests of one layout: their places among all, and their entities."""

    layout: ViewLayout
    places: Sequence[int]
    entities: Sequence[bytes]


def _by_layout(requests: Sequence[Request]) -> list[_Group]:
    found: dict[int, tuple[ViewLayout, list[int]]] = {}
    for i, (layout, values) in enumerate(requests):
        if len(values) != len(layout.join_keys):
            raise ValueError(f"view {layout.name} has the join keys {layout.join_keys}, not {len(values)} values")
        if (group := found.get(id(layout))) is None:
            found[id(layout)] = (layout, [i])
        else:
            group[1].append(i)
    return [_Group(layout, places, [entity_part(layout.name, requests[i][1]) for i in places]) for layout, places in found.values()]


class OnlineReader:
    """Reads values through an asyncio client (made with `decode_responses=False`). Keep it: it remembers pointers."""

    def __init__(self, client: AsyncClient, project: str) -> None:
        self._client = client
        self._reads = _Reads(project, is_cluster(client))

    async def read(self, requests: Sequence[Request]) -> list[Decoded | None]:
        """One answer per request, in order; None where nothing is stored. Age is not judged: see `ViewLayout.state`.

        Raises SchemaMismatchError where a view's stored values have other features than the layout, and redis errors.
        """
        return await run_async(self._client, self._reads.read(requests))


class SyncOnlineReader:
    """`OnlineReader` through a plain client, for checks, monitoring and tests."""

    def __init__(self, client: Client, project: str) -> None:
        self._client = client
        self._reads = _Reads(project, is_cluster(client))

    def read(self, requests: Sequence[Request]) -> list[Decoded | None]:
        return run(self._client, self._reads.read(requests))


def decode_packed(layout: ViewLayout, generation: Generation, packed: Sequence[bytes | None]) -> list[Decoded | None]:
    """A generation's values with their features in the layout's order. Raises SchemaMismatchError naming the view."""
    if generation.schema != layout.schema:
        raise SchemaMismatchError(
            f"view {layout.name}: generation {generation.number} has schema {generation.schema:08x}, the reader expects "
            f"{layout.schema:08x}: the view's features changed; rebuild it, or train on what it has now"
        )
    try:
        return decode_many(packed, layout.schema, len(layout.features), layout.places)
    except SchemaMismatchError as mismatch:
        raise SchemaMismatchError(f"view {layout.name}: {mismatch}") from mismatch
