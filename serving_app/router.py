"""Which loaded version answers a request.

Belongs here: the loaded versions of each model and the choice among them (traffic rules will stand here).
Does not belong here: loading, resolving aliases.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from serving_app.model_handle import ModelHandle, VersionRef

CHAMPION = "champion"


@dataclass(frozen=True)
class Slot:
    """A model's versions in memory: what serves, and what served before (kept warm, so that a rollback costs nothing)."""

    current: ModelHandle
    previous: ModelHandle | None = None


@dataclass(frozen=True)
class Choice:
    """The version for one request, and under which variant it answers."""

    handle: ModelHandle
    variant: str

    @property
    def labels(self) -> tuple[str, str, str]:
        """Model, version and variant, as the metrics name them."""
        return (self.handle.name, str(self.handle.version), self.variant)


class ModelRouter:
    """Swaps are one assignment: a request sees the old version or the new one, and keeps what it got."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self.generation = 0  # grows with every swap; what is derived from the loaded models is keyed by it

    def choose(self, model: str) -> Choice | None:
        slot = self._slots.get(model)
        return None if slot is None else Choice(slot.current, CHAMPION)

    def slot(self, model: str) -> Slot | None:
        return self._slots.get(model)

    def __iter__(self) -> Iterator[Slot]:
        return iter([self._slots[name] for name in sorted(self._slots)])

    def names(self) -> list[str]:
        return sorted(self._slots)

    def warm(self, ref: VersionRef) -> ModelHandle | None:
        """The version if it is in memory."""
        slot = self._slots.get(ref.model)
        held = () if slot is None else (slot.current, slot.previous)
        return next((h for h in held if h is not None and h.ref == ref), None)

    def swap(self, handle: ModelHandle) -> Slot:
        """Puts `handle` in front; what was in front stays warm. Returns the slot."""
        before = self._slots.get(handle.name)
        if before is not None and before.current is handle:
            return before
        slot = Slot(handle, before.current if before else None)
        self._slots[handle.name] = slot
        self.generation += 1
        return slot
