"""The feature values a process read last: a cache of a declared staleness, what to fall back on while the store is away, and what need
not be decoded again.

Belongs here: remembering and finding values within a bound. Does not belong here: ages against a view's limit: a remembered value has
its event time still, and is judged by it like one that was just read.

Most values are what they were when they were read last. So each stands here as the store packs it and decoded beside it: one that came
again byte for byte is taken from there, which costs less than decoding it, and less than holding on to each new copy, which would send
the allocator to memory that no cache has.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlplatform.feature_store.codec import Block, Packed, decode_block, decode_blocks, empty_block
from mlplatform.feature_store.reader import Asked, ViewLayout

# Project, view, and the schema its values are packed under.
_Key = tuple[str, str, int]
_NEVER = float("-inf")
_UNREAD = b""  # no value is empty
_FEW = 64  # rows of a shelf that has its first
_MOST = 0.5  # where a larger share of values is new, nothing is kept decoded


class _Shelf:
    """The values of one view. Each entity has a slot: there stand its value as packed, None where it had none; the same decoded, in packed
    order, where it came more than once; and when it was read (monotonic seconds)."""

    def __init__(self, features: int) -> None:
        self.slots: dict[bytes, int] = {}
        self.packed: list[bytes | None] = []
        # By slot, as far as they were wanted. A row is one only where `_decoded` says so.
        self._rows = empty_block(0, features)
        self._decoded = np.zeros(0, np.bool_)
        self._read_at = np.zeros(0)

    def find(self, entities: Sequence[bytes]) -> list[int | None]:
        """Their slots; None where there is none."""
        return list(map(self.slots.get, entities))

    def same(self, entities: Sequence[bytes], packed: Sequence[bytes | None]) -> tuple[list[int], Block] | None:
        """The slots and rows of values just read, where each is what it was and has its row."""
        try:
            slots = list(map(self.slots.__getitem__, entities))
        except KeyError:
            return None
        if list(map(self.packed.__getitem__, slots)) != packed:
            return None
        where = np.array(slots, np.intp)
        if len(self._decoded) < len(self.packed) or not self._decoded[where].all():
            return None
        return slots, self.rows(where)

    def changed(self, slots: Sequence[int], packed: Sequence[bytes | None]) -> list[int]:
        """Where, of values just read, one is not what it was."""
        held = list(map(self.packed.__getitem__, slots))
        if held == packed:
            return []
        return [i for i, (old, new) in enumerate(zip(held, packed, strict=True)) if old != new]

    def add(self, entities: Sequence[bytes], packed: Sequence[bytes | None]) -> None:
        """Gives slots to entities that have none."""
        first = len(self.slots)
        self.slots.update(zip(entities, range(first, first + len(entities)), strict=True))
        self.packed += packed

    def put(self, slots: Sequence[int], packed: Sequence[bytes | None]) -> None:
        for slot, value in zip(slots, packed, strict=True):
            self.packed[slot] = value
        self._decoded[[slot for slot in slots if slot < len(self._decoded)]] = False

    def undecoded(self, slots: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Of which no row is held; there is room for them from now on."""
        if len(self._decoded) < len(self.packed):
            self._widen()
        return ~self._decoded[slots]

    def write(self, slots: npt.NDArray[np.intp], rows: Block) -> None:
        self._decoded[slots] = True
        for mine, new in zip(self._rows, rows, strict=True):
            mine[slots] = new

    def rows(self, slots: npt.NDArray[np.intp]) -> Block:
        """A copy."""
        mine = self._rows
        return Block(mine.held[slots], mine.event_us[slots], mine.created_us[slots], mine.values.take(slots, axis=0))

    def read(self, slots: Sequence[int], now: float) -> None:
        more = len(self.packed) - len(self._read_at)
        if more > 0:
            self._read_at = np.append(self._read_at, np.full(max(more, len(self._read_at)), _NEVER))
        self._read_at[slots] = now

    def oldest(self, slots: Sequence[int]) -> float:
        """When the one of them was read that was read first."""
        return float(self._read_at[slots].min()) if max(slots) < len(self._read_at) else _NEVER

    def _widen(self) -> None:
        mine = self._rows
        more = max(_FEW, len(self.packed) - len(mine.held), len(mine.held))
        new = empty_block(more, mine.values.shape[1])
        self._rows = Block(
            np.concatenate([mine.held, new.held]),
            np.concatenate([mine.event_us, new.event_us]),
            np.concatenate([mine.created_us, new.created_us]),
            np.concatenate([mine.values, new.values]),
        )
        self._decoded = np.append(self._decoded, np.zeros(more, np.bool_))


class _Incoming:
    """Values of a view that were just read, on their way to its shelf. `packed` are those to be decoded: all of them, where most are not
    what they were (a row for what is asked for once only would cost more than it ever spares); or those that have no row."""

    def __init__(self, shelf: _Shelf, entities: Sequence[bytes], view: Packed) -> None:
        self._shelf, self._entities, self._view = shelf, entities, view
        self._slots = shelf.find(entities)
        self._at: npt.NDArray[np.intp] | None = None
        self._where = np.empty(0, np.intp)
        self._changed: list[int] = []
        # In packed order, whatever order the reader wants: models with other orders share the shelf.
        self.packed = view._replace(places=None)
        most = _MOST * len(entities)
        if self._slots.count(None) > most:
            return
        slots = self._whole()
        self._changed = shelf.changed(slots, view.values)
        if len(self._changed) > most:
            return
        self._where = np.fromiter(slots, np.intp, len(slots))
        wanted = shelf.undecoded(self._where)
        wanted[self._changed] = True
        self._at = np.flatnonzero(wanted)
        self.packed = Packed([view.values[i] for i in self._at.tolist()], view.schema, view.features)

    def _whole(self) -> list[int]:
        """A slot for each."""
        if None in self._slots:
            new = [entity for entity, slot in zip(self._entities, self._slots, strict=True) if slot is None]
            self._shelf.add(new, [_UNREAD] * len(new))
            self._slots = self._shelf.find(self._entities)
        return self._slots  # type: ignore[return-value]  # none is None any more

    def kept(self, decoded: Block) -> Block:
        """The whole view's values, and remembered."""
        shelf, values = self._shelf, self._view.values
        if self._at is None:
            new = [i for i, slot in enumerate(self._slots) if slot is None]
            if len(new) < len(values):
                known = [(slot, value) for slot, value in zip(self._slots, values, strict=True) if slot is not None]
                shelf.put(*zip(*known, strict=True))
            shelf.add([self._entities[i] for i in new], [values[i] for i in new])
            return decoded
        if self._changed:
            shelf.put([self._where[i] for i in self._changed], [values[i] for i in self._changed])
        if len(self._at):
            shelf.write(self._where[self._at], decoded)
        return shelf.rows(self._where)

    def read(self, now: float) -> None:
        self._shelf.read([self._shelf.slots[entity] for entity in self._entities], now)


class FeatureCache:
    """Holds at most `capacity` values: the younger half, and the half before it (so that nothing is sorted or counted by use).

    Values read within `stale_s` seconds are given without asking the store (0: always ask).
    """

    def __init__(self, capacity: int, stale_s: float) -> None:
        self._half = max(1, capacity // 2)
        self._stale_s = stale_s
        self._young: dict[_Key, _Shelf] = {}
        self._old: dict[_Key, _Shelf] = {}

    def decode(self, project: str, now: float, asked: Sequence[Asked], views: Sequence[Packed]) -> list[Block | ValueError]:
        """What was read, as `codec.decode_blocks` gives it, and remembered, also that an entity had no value."""
        blocks: dict[int, Block | ValueError] = {}
        others: dict[int, _Incoming] = {}
        for i, ((layout, entities), view) in enumerate(zip(asked, views, strict=True)):
            shelf = self._shelf(project, layout, len(entities))
            same = shelf.same(entities, view.values)
            if same is None:
                others[i] = _Incoming(shelf, entities, view)
                continue
            slots, blocks[i] = same
            if self._stale_s:
                shelf.read(slots, now)
        for (i, reading), decoded in zip(others.items(), _decoded([r.packed for r in others.values()]), strict=True):
            if isinstance(decoded, ValueError):
                blocks[i] = decoded
                continue
            blocks[i] = reading.kept(decoded)
            if self._stale_s:
                reading.read(now)
        return [_ordered(blocks[i], view) for i, view in enumerate(views)]

    def fresh(self, project: str, asked: Sequence[Asked], now: float) -> list[Block] | None:
        """All of the values, where each was read within the declared staleness; None where one was not."""
        if not self._stale_s:
            return None
        for layout, entities in asked:
            left = list(entities)
            for shelf in self._shelves(project, layout):
                here = [entity for entity in left if entity in shelf.slots]
                if here and now - shelf.oldest([shelf.slots[entity] for entity in here]) > self._stale_s:
                    return None
                left = [entity for entity in left if entity not in shelf.slots]
            if left:
                return None
        return self.last(project, asked)

    def last(self, project: str, asked: Sequence[Asked]) -> list[Block]:
        """What was read last, however long ago; nothing held where an entity was not read or had no value."""
        return [decode_block(*layout.packed(self._find(project, layout, entities))) for layout, entities in asked]

    def _find(self, project: str, layout: ViewLayout, entities: Sequence[bytes]) -> list[bytes | None]:
        found: dict[bytes, bytes | None] = dict.fromkeys(entities)
        for shelf in reversed(self._shelves(project, layout)):
            values = ((entity, shelf.packed[shelf.slots[entity]]) for entity in entities if entity in shelf.slots)
            found.update((entity, value) for entity, value in values if value != _UNREAD)
        return [found[entity] for entity in entities]

    def _shelf(self, project: str, layout: ViewLayout, more: int) -> _Shelf:
        """The view's younger shelf, once there is room for so many more entities."""
        if sum(len(shelf.slots) for shelf in self._young.values()) + more > self._half:
            self._old, self._young = self._young, {}
        key = (project, layout.name, layout.schema)
        shelf = self._young.get(key)
        if shelf is None:
            shelf = self._young[key] = _Shelf(len(layout.features))
        return shelf

    def _shelves(self, project: str, layout: ViewLayout) -> list[_Shelf]:
        """Those that a view has, the younger first."""
        key = (project, layout.name, layout.schema)
        return [shelves[key] for shelves in (self._young, self._old) if key in shelves]


def _decoded(views: list[Packed]) -> Sequence[Block | ValueError]:
    """As `codec.decode_blocks`, at once where there is nothing to decode."""
    if any(len(view.values) for view in views):
        return decode_blocks(views)
    return [empty_block(0, view.features) for view in views]


def _ordered(block: Block | ValueError, view: Packed) -> Block | ValueError:
    """In the reader's order of features."""
    return block if view.places is None or isinstance(block, ValueError) else block._replace(values=block.values[:, view.places])
