"""The feature values a process read last: a cache of a declared staleness, and what to fall back on while the store is away.

Belongs here: remembering and finding values within a bound. Does not belong here: ages against a view's limit: a remembered value has
its event time still, and is judged by it like one that was just read.

Values are kept as the store packs them, and decoding one waits until it is wanted. Most are what they were when they were read last: they
are compared and not put in again, for to hold on to each new copy would send the allocator to memory that no cache has.
"""

from collections.abc import Sequence
from itertools import repeat

from mlplatform.feature_store.codec import Block, decode_block
from mlplatform.feature_store.reader import Asked, ViewLayout

# Project, view, and the schema its values are packed under.
_Key = tuple[str, str, int]
_NEVER = float("-inf")
_UNREAD = b""  # no value is empty


class _Shelf:
    """The values of one view by entity, None where it had none; and when each was read (monotonic seconds)."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | None] = {}
        self.read_at: dict[bytes, float] = {}


_NOTHING = _Shelf()


class FeatureCache:
    """Holds at most `capacity` values: the younger half, and the half before it (so that nothing is sorted or counted by use).

    Values read within `stale_s` seconds are given without asking the store (0: always ask).
    """

    def __init__(self, capacity: int, stale_s: float) -> None:
        self._half = max(1, capacity // 2)
        self._stale_s = stale_s
        self._young: dict[_Key, _Shelf] = {}
        self._old: dict[_Key, _Shelf] = {}

    def keep(self, project: str, asked: Sequence[Asked], blocks: Sequence[Block | ValueError], now: float) -> None:
        """Remembers what was read, also that an entity had no value."""
        for (layout, entities), block in zip(asked, blocks, strict=True):
            if isinstance(block, ValueError) or not entities:
                continue
            if sum(len(shelf.values) for shelf in self._young.values()) + len(entities) > self._half:
                self._old, self._young = self._young, {}
            key = (project, layout.name, layout.schema)
            shelf = self._young.get(key)
            if shelf is None:
                shelf = self._young[key] = _Shelf()
            held = list(map(shelf.values.get, entities, repeat(_UNREAD)))
            if held != list(block.packed):
                shelf.values.update((e, new) for e, new, old in zip(entities, block.packed, held, strict=True) if new != old)
            if self._stale_s:
                shelf.read_at.update(dict.fromkeys(entities, now))

    def fresh(self, project: str, asked: Sequence[Asked], now: float) -> list[Block] | None:
        """All of the values, where each was read within the declared staleness; None where one was not."""
        if not self._stale_s:
            return None
        for layout, entities in asked:
            old, young = (shelf.read_at for shelf in self._shelves(project, layout))
            if not all(now - young.get(entity, old.get(entity, _NEVER)) <= self._stale_s for entity in entities):
                return None
        return self.last(project, asked)

    def last(self, project: str, asked: Sequence[Asked]) -> list[Block]:
        """What was read last, however long ago; nothing held where an entity was not read or had no value."""
        return [decode_block(*layout.packed(self._find(project, layout, entities))) for layout, entities in asked]

    def _find(self, project: str, layout: ViewLayout, entities: Sequence[bytes]) -> list[bytes | None]:
        old, young = (shelf.values for shelf in self._shelves(project, layout))
        return [young[entity] if entity in young else old.get(entity) for entity in entities]

    def _shelves(self, project: str, layout: ViewLayout) -> tuple[_Shelf, _Shelf]:
        """The older and the younger one of a view."""
        key = (project, layout.name, layout.schema)
        return self._old.get(key, _NOTHING), self._young.get(key, _NOTHING)
