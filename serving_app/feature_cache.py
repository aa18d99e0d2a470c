"""The feature values a process read last: a cache of a declared staleness, and what to fall back on while the store is away.

Belongs here: remembering and finding rows of blocks within a bound. Does not belong here: ages against a view's limit: a
remembered value has its event time still, and is judged by it like one that was just read.
"""

from collections.abc import Sequence
from itertools import repeat

from mlplatform.feature_store.codec import Block, empty_block
from mlplatform.feature_store.reader import Asked

# (project, view, its features in order), entity -> the block it was read in, its row there, and when (monotonic seconds)
_Held = tuple[Block, int, float]
_Shelf = dict[tuple[str, str, tuple[str, ...]], dict[bytes, _Held]]


class FeatureCache:
    """Holds at most `capacity` values: the younger half, and the half before it (so that nothing is sorted or counted by use).

    Values read within `stale_s` seconds are given without asking the store (0: always ask).
    """

    def __init__(self, capacity: int, stale_s: float) -> None:
        self._half = max(1, capacity // 2)
        self._stale_s = stale_s
        self._young: _Shelf = {}
        self._old: _Shelf = {}
        self._count = 0

    def keep(self, project: str, asked: Sequence[Asked], blocks: Sequence[Block | ValueError], now: float) -> None:
        """Remembers what was read, also that an entity had no value."""
        for (layout, entities), block in zip(asked, blocks, strict=True):
            if isinstance(block, ValueError):
                continue
            if self._count + len(entities) > self._half:
                self._old, self._young, self._count = self._young, {}, 0
            shelf = self._young.setdefault((project, layout.name, layout.features), {})
            before = len(shelf)
            shelf.update(zip(entities, zip(repeat(block), range(len(entities)), repeat(now), strict=False), strict=True))
            self._count += len(shelf) - before

    def fresh(self, project: str, asked: Sequence[Asked], now: float) -> list[Block] | None:
        """All of the values, where each was read within the declared staleness; None where one was not."""
        if not self._stale_s:
            return None
        blocks: list[Block] = []
        for layout, entities in asked:
            held = self._find(project, (layout, entities))
            if any(one is None or now - one[2] > self._stale_s for one in held):
                return None
            blocks.append(_gather(held, len(layout.features)))
        return blocks

    def last(self, project: str, asked: Sequence[Asked]) -> list[Block]:
        """What was read last, however long ago; nothing held where an entity was not read or had no value."""
        return [_gather(self._find(project, one), len(one[0].features)) for one in asked]

    def _find(self, project: str, asked: Asked) -> list[_Held | None]:
        layout, entities = asked
        key = (project, layout.name, layout.features)
        young, old = self._young.get(key, {}), self._old.get(key, {})
        return [young.get(entity) or old.get(entity) for entity in entities]


def _gather(held: Sequence[_Held | None], features: int) -> Block:
    out = empty_block(len(held), features)
    for i, one in enumerate(held):
        if one is not None:
            block, row, _ = one
            out.held[i] = block.held[row]
            out.event_us[i] = block.event_us[row]
            out.created_us[i] = block.created_us[row]
            out.values[i] = block.values[row]
    return out
