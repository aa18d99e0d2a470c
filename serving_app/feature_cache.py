"""The feature values a process read last: a cache of a declared staleness, and what to fall back on while the store is away.

Belongs here: remembering and finding rows of blocks within a bound. Does not belong here: ages against a view's limit: a
remembered value has its event time still, and is judged by it like one that was just read.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlplatform.feature_store.codec import Block, empty_block
from mlplatform.feature_store.reader import Asked

# Project, view, and its features in the order in which a model wants them.
_Key = tuple[str, str, tuple[str, ...]]
_FIRST_SLOTS = 256


class _Shelf:
    """The values of one view: a row of a block for each entity, and when it was read (monotonic seconds)."""

    def __init__(self, features: int) -> None:
        self.slots: dict[bytes, int] = {}
        self._block = empty_block(_FIRST_SLOTS, features)
        self._read_at = np.zeros(_FIRST_SLOTS)

    def put(self, entities: Sequence[bytes], block: Block, now: float) -> None:
        known = list(map(self.slots.get, entities))
        if None in known:
            known = [self.slots.setdefault(entity, len(self.slots)) for entity in entities]
            while len(self.slots) > len(self._read_at):
                self._grow()
        slots = np.array(known, dtype=np.intp)
        for kept, new in zip(self._block, block, strict=True):
            kept[slots] = new
        self._read_at[slots] = now

    def take(self, slots: npt.NDArray[np.intp]) -> tuple[Block, npt.NDArray[np.float64]]:
        """The rows in these slots, and when each was read."""
        block = self._block
        return Block(block.held[slots], block.event_us[slots], block.created_us[slots], block.values[slots]), self._read_at[slots]

    def _grow(self) -> None:
        wider = empty_block(2 * len(self._read_at), self._block.values.shape[1])
        for new, kept in zip(wider, self._block, strict=True):
            new[: len(kept)] = kept
        self._block = wider
        self._read_at = np.concatenate([self._read_at, np.zeros(len(self._read_at))])


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
            if sum(len(shelf.slots) for shelf in self._young.values()) + len(entities) > self._half:
                self._old, self._young = self._young, {}
            key = (project, layout.name, layout.features)
            shelf = self._young.get(key)
            if shelf is None:
                shelf = self._young[key] = _Shelf(len(layout.features))
            shelf.put(entities, block, now)

    def fresh(self, project: str, asked: Sequence[Asked], now: float) -> list[Block] | None:
        """All of the values, where each was read within the declared staleness; None where one was not."""
        if not self._stale_s:
            return None
        blocks: list[Block] = []
        for layout, entities in asked:
            block, read_at = self._find((project, layout.name, layout.features), entities)
            if not (now - read_at <= self._stale_s).all():
                return None
            blocks.append(block)
        return blocks

    def last(self, project: str, asked: Sequence[Asked]) -> list[Block]:
        """What was read last, however long ago; nothing held where an entity was not read or had no value."""
        return [self._find((project, layout.name, layout.features), entities)[0] for layout, entities in asked]

    def _find(self, key: _Key, entities: Sequence[bytes]) -> tuple[Block, npt.NDArray[np.float64]]:
        """Each entity's value and when it was read: never (-inf) where it is not remembered."""
        found = empty_block(len(entities), len(key[2]))
        read_at = np.full(len(entities), -np.inf)
        for shelf in (self._old.get(key), self._young.get(key)):  # the younger value over the older one
            if shelf is None:
                continue
            slots = np.array([shelf.slots.get(entity, -1) for entity in entities], dtype=np.intp)
            known = slots >= 0
            block, when = shelf.take(slots[known])
            for whole, part in zip(found, block, strict=True):
                whole[known] = part
            read_at[known] = when
        return found, read_at
