"""Reading the online store on the service's hot path: any number of views and entities in one round trip.

Belongs here: layouts of views and the two readers (async for the service, plain for checks and tests). Does not belong
here: Feast, pandas, Polars, and what to do about a value that is missing or too old: that is the caller's contract.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from mlplatform.feature_store.codec import (
    Block,
    Decoded,
    JoinValue,
    Packed,
    SchemaMismatchError,
    decode_blocks,
    entity_part,
    feature_order,
    join_order,
    pointer_key,
    schema_hash,
    unblock,
    value_keys,
)
from mlplatform.feature_store.commands import AsyncClient, Client, Steps, get_values, is_cluster, run, run_async
from mlplatform.feature_store.pointer import Generation, Pointer

State = Literal["fresh", "expired", "future", "missing"]

# Clocks of two hosts agree to a second where they are kept at all: what is ahead by more is no value of now.
CLOCK_TOLERANCE_US = 1_000_000


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

    def packed(self, values: Sequence[bytes | None]) -> Packed:
        """Stored values of the view, with what it takes to decode them."""
        return Packed(values, self.schema, len(self.features), self.places)

    def age_us(self, value: Decoded, now_us: int) -> int:
        """Microseconds since the value became known; negative where the clocks disagree."""
        return now_us - value.event_us

    def state(self, value: Decoded | None, now_us: int) -> State:
        """`expired` means older than the ttl, exactly as the history's join has it: age > ttl; `future`, that the value is
        known only after `now_us`, by more than clocks differ: history would not have it either."""
        if value is None:
            return "missing"
        if max(value.event_us, value.created_us) > now_us + CLOCK_TOLERANCE_US:
            return "future"
        return "expired" if self.ttl_us is not None and self.age_us(value, now_us) > self.ttl_us else "fresh"


# A view and the values of its join keys in the layout's order.
Request = tuple[ViewLayout, Sequence[JoinValue]]
# A view and the entities asked of it, each as `codec.entity_part` writes it.
Asked = tuple[ViewLayout, Sequence[bytes]]
# Blocks, or errors in their place, of what was read of each view asked for.
Decode = Callable[[Sequence[Asked], Sequence[Packed]], list[Block | ValueError]]


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

    def blocks(self, asked: Sequence[Asked], decode: Decode) -> Steps[list[Block | ValueError]]:
        answers: list[Block | ValueError] = [ValueError("not read")] * len(asked)
        open_places: Sequence[int] = range(len(asked))
        while open_places:
            views = list(dict.fromkeys(asked[i][0].name for i in open_places))
            used = {view: seen.current if (seen := self.seen.get(view)) else None for view in views}
            keys = [self._keys(asked[i], used) for i in open_places]
            flat = [key for view_keys in keys for key in view_keys]
            replies = yield from get_values([*flat, *(pointer_key(self.project, view) for view in views)], self.clustered)
            self._see(views, replies[len(flat) :])
            again = []
            read: dict[int, Packed] = {}
            at = 0
            for i, view_keys in zip(open_places, keys, strict=True):
                layout, entities = asked[i]
                stored = replies[at : (at := at + len(view_keys))]
                generation = used[layout.name]
                if self.seen[layout.name].current != generation:
                    again.append(i)
                elif generation is None:
                    read[i] = layout.packed([None] * len(entities))
                elif generation.schema != layout.schema:
                    answers[i] = _of_another_schema(layout, generation)
                else:
                    read[i] = layout.packed(stored)
            if read:
                for i, block in zip(read, decode([asked[i] for i in read], list(read.values())), strict=True):
                    answers[i] = _named(asked[i][0], block) if isinstance(block, ValueError) else block
            open_places = again
        return answers

    def read(self, requests: Sequence[Request]) -> Steps[list[Decoded | None]]:
        answers: list[Decoded | None] = [None] * len(requests)
        groups = _by_layout(requests)
        blocks = yield from self.blocks([(layout, entities) for layout, _, entities in groups], _decode)
        for (_, places, _), block in zip(groups, blocks, strict=True):
            if isinstance(block, ValueError):
                raise block
            for place, value in zip(places, unblock(block), strict=True):
                answers[place] = value
        return answers

    def _keys(self, asked: Asked, used: Mapping[str, Generation | None]) -> list[bytes]:
        layout, entities = asked
        generation = used[layout.name]
        return [] if generation is None else value_keys(generation.number, entities, self.clustered)

    def _see(self, views: Sequence[str], pointers: Sequence[bytes | None]) -> None:
        for view, raw in zip(views, pointers, strict=True):
            seen = self.seen.get(view)
            if seen is None or seen.raw != raw:
                self.seen[view] = _Seen(raw, Pointer.parse(raw).current)


def _decode(_: Sequence[Asked], views: Sequence[Packed]) -> list[Block | ValueError]:
    return decode_blocks(views)


def _by_layout(requests: Sequence[Request]) -> list[tuple[ViewLayout, list[int], list[bytes]]]:
    """The requests of each layout: their places among all, and their entities."""
    found: dict[int, tuple[ViewLayout, list[int], list[bytes]]] = {}
    for i, (layout, values) in enumerate(requests):
        if len(values) != len(layout.join_keys):
            raise ValueError(f"view {layout.name} has the join keys {layout.join_keys}, not {len(values)} values")
        _, places, entities = found.setdefault(id(layout), (layout, [], []))
        places.append(i)
        entities.append(entity_part(layout.name, values))
    return list(found.values())


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

    async def blocks(self, asked: Sequence[Asked], decode: Decode | None = None) -> list[Block | ValueError]:
        """The same in columns, for many entities of few views: a block for each view asked for, in order. `decode`: who knows
        another way than `codec.decode_blocks`.

        In place of a block stands the error of a view whose stored values cannot be read; redis errors are raised.
        """
        return await run_async(self._client, self._reads.blocks(asked, decode or _decode))


class SyncOnlineReader:
    """`OnlineReader` through a plain client, for checks, monitoring and tests."""

    def __init__(self, client: Client, project: str) -> None:
        self._client = client
        self._reads = _Reads(project, is_cluster(client))

    def read(self, requests: Sequence[Request]) -> list[Decoded | None]:
        return run(self._client, self._reads.read(requests))


def _of_another_schema(layout: ViewLayout, generation: Generation) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"view {layout.name}: generation {generation.number} has schema {generation.schema:08x}, the reader expects "
        f"{layout.schema:08x}: the view's features changed; rebuild it, or train on what it has now"
    )


def _named(layout: ViewLayout, error: ValueError) -> ValueError:
    return type(error)(f"view {layout.name}: {error}")
