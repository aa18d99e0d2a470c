"""Which generations of a view are live: the one key that is flipped.

Belongs here: the pointer's content and the moves of it. Does not belong here: filling a generation (`generations.py`),
writing into one (`writer.py`): both move the pointer by `SWAP` only.

A pointer is the text `<current> <previous> <building>`, each `<number>.<schema hash>` or `-`. Plain text, so that a reader
gets it in the same MGET as the values. A generation number belongs to one schema for ever.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

# Compare-and-set of one key; '' stands for a key that is not there.
SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class Generation(NamedTuple):
    """One full set of a view's values, and the schema hash all of them have."""

    number: int
    schema: int


@dataclass(frozen=True)
class Pointer:
    """`current` is read, `previous` can be restored, `building` is being filled; all three are written to."""

    current: Generation | None = None
    previous: Generation | None = None
    building: Generation | None = None

    @classmethod
    def parse(cls, raw: bytes | None) -> Self:
        """Raises ValueError for a text that is no pointer."""
        if not raw:
            return cls()
        parts = raw.split(b" ")
        if len(parts) != 3:
            raise ValueError(f"{raw!r} is not a pointer of the online store: something else wrote this key")
        return cls(*(_generation(part) for part in parts))

    def text(self) -> bytes:
        return b" ".join(b"-" if g is None else b"%d.%08x" % g for g in (self.current, self.previous, self.building))

    def live(self) -> list[Generation]:
        """Current first: its counts are the ones a writer tells."""
        return [g for g in (self.current, self.building, self.previous) if g is not None]

    def created(self, generation: Generation) -> "Pointer":
        """The first generation of a view, made by its first write."""
        return replace(self, current=generation)

    def announced(self, generation: Generation) -> "Pointer":
        """A new generation is being filled; whoever filled one before has lost."""
        return replace(self, building=generation)

    def flipped(self) -> "Pointer":
        """The generation that was filled is read from now on."""
        return Pointer(self.building, self.current, None)

    def abandoned(self) -> "Pointer":
        return replace(self, building=None)

    def restored(self) -> "Pointer":
        """Current and previous change places."""
        return replace(self, current=self.previous, previous=self.current)


def _generation(part: bytes) -> Generation | None:
    if part == b"-":
        return None
    number, schema = part.split(b".")
    return Generation(int(number), int(schema, 16))
