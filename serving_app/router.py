"""Which loaded version answers a request.

Belongs here: the loaded versions of each model and the choice among them. Does not belong here: loading, resolving aliases, and
where an entity falls (`traffic`).
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from mlplatform.contracts import CANARY_VARIANT, CHAMPION_VARIANT, NO_RULES, SHADOW_VARIANT, TrafficRules
from mlplatform.sticky import entity_fields, key_of
from serving_app.model_handle import ModelHandle, VersionRef
from serving_app.row_texts import members
from serving_app.traffic import Draw


@dataclass(frozen=True)
class Slot:
    """A model's versions in memory: what serves, what served before (kept warm, so that a rollback costs nothing), and what
    shares the traffic by `rules`. `arms` holds one version per arm of the rules' experiment, None for the champion."""

    current: ModelHandle
    previous: ModelHandle | None = None
    canary: ModelHandle | None = None
    shadow: ModelHandle | None = None
    arms: tuple[ModelHandle | None, ...] = ()
    rules: TrafficRules = NO_RULES

    def held(self) -> Iterator[tuple[str, ModelHandle]]:
        """Every version in memory with its role; a version with two roles comes twice."""
        for role, handle in (("current", self.current), ("previous", self.previous), ("canary", self.canary), ("shadow", self.shadow)):
            if handle is not None:
                yield role, handle
        if self.rules.experiment is not None:
            for arm, handle in zip(self.rules.experiment.arms, self.arms, strict=True):
                if handle is not None:
                    yield f"{self.rules.experiment.name}/{arm.name}", handle

    def holding(self, ref: VersionRef) -> ModelHandle | None:
        return next((handle for _, handle in self.held() if handle.ref == ref), None)


@dataclass(frozen=True)
class Choice:
    """The version for one request, and under which variant it answers. `labels`: model, version and variant, as the metrics name them;
    `answered`, `logged`: what every answer and every log record of it says, members of a JSON object."""

    handle: ModelHandle
    variant: str
    labels: tuple[str, str, str] = field(init=False)
    answered: bytes = field(init=False)
    logged: bytes = field(init=False)

    def __post_init__(self) -> None:
        name, version, variant = self.handle.name, self.handle.version, self.variant
        answered = {"model_version": version, "variant": variant}
        logged = {"model": name, "version": version, "variant": variant, "contract_digest": self.handle.digest}
        object.__setattr__(self, "labels", (name, str(version), variant))
        object.__setattr__(self, "answered", members(answered))
        object.__setattr__(self, "logged", members(logged))


@dataclass(frozen=True)
class Share:
    """A variant and its part of all entities, in percent."""

    choice: Choice
    percent: float


class _Table:
    """A slot compiled for choosing: every Choice is made here, none per request."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        rules = slot.rules
        self.champion = Choice(slot.current, CHAMPION_VARIANT)
        self.shadows = () if slot.shadow is None or not rules.shadow_share else (Choice(slot.shadow, SHADOW_VARIANT),)
        self.fields = entity_fields(rules, slot.current.contract)
        weighty = slot.canary is not None and rules.canary.weight > 0
        self._canary = Choice(slot.canary, CANARY_VARIANT) if slot.canary is not None and weighty else None
        self._canary_below = rules.canary.weight / 100 if weighty else 0.0
        self._canary_draw = Draw("canary", rules.canary.salt)
        self._arms: tuple[Choice, ...] = ()
        self._bounds: tuple[float, ...] = ()
        if experiment := rules.experiment:
            arms = zip(experiment.arms, slot.arms, strict=True)
            self._arms = tuple(Choice(handle or slot.current, f"{experiment.name}/{arm.name}") for arm, handle in arms)
            # The last arm has no upper bound, so that no rounding leaves a gap below 1.
            self._bounds = tuple(accumulate(arm.weight / 100 for arm in experiment.arms))[:-1]
            self._arms_draw = Draw("experiment", experiment.salt)
        layer = rules.experiment.layer if rules.experiment else None
        self._layer_draw = None if layer is None else Draw("layer", layer.name)
        self._layer = (0.0, 1.0) if layer is None else (layer.start / 100, layer.end / 100)
        self.sticky = self._canary is not None or bool(self._arms)

    def pick(self, entity: bytes) -> Choice:
        if self._canary is not None and self._canary_draw.place(entity) < self._canary_below:
            return self._canary
        if self._arms and self._in_layer(entity):
            return self._arms[bisect_right(self._bounds, self._arms_draw.place(entity))]
        return self.champion

    def _in_layer(self, entity: bytes) -> bool:
        return self._layer_draw is None or self._layer[0] <= self._layer_draw.place(entity) < self._layer[1]

    def shares(self) -> tuple[Share, ...]:
        rest = 100 * (1 - self._canary_below)
        canary = () if self._canary is None else (Share(self._canary, 100 * self._canary_below),)
        if not self._arms or self.slot.rules.experiment is None:
            return (Share(self.champion, rest), *canary)
        weights = [arm.weight for arm in self.slot.rules.experiment.arms]
        part = self._layer[1] - self._layer[0]
        outside = () if part == 1 else (Share(self.champion, rest * (1 - part)),)
        return (*outside, *(Share(c, rest * part * w / 100) for c, w in zip(self._arms, weights, strict=True)), *canary)


class ModelRouter:
    """Swaps are one assignment: a request sees the old versions and rules or the new ones, and keeps what it got."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}
        self.generation = 0  # grows with every swap; what is derived from the loaded models is keyed by it

    def choose(self, model: str, entity: bytes | None = None) -> Choice | None:
        """The version for a request; the champion where no entity is given (only right where `sticky(model)` is false)."""
        table = self._tables.get(model)
        if table is None:
            return None
        return table.champion if entity is None or not table.sticky else table.pick(entity)

    def sticky(self, model: str) -> bool:
        """Whether more than one variant takes traffic, so that `choose` wants the request's entity."""
        table = self._tables.get(model)
        return table is not None and table.sticky

    def entity(self, model: str, row: object) -> bytes | None:
        """The sticky key of a request's first input (as parsed from JSON); None where nothing has to be chosen."""
        table = self._tables.get(model)
        return key_of(table.fields, row) if table is not None and table.sticky else None

    def sticky_fields(self, model: str) -> tuple[str, ...]:
        """The request fields that are the entity."""
        table = self._tables.get(model)
        return () if table is None else table.fields

    def shadows(self, model: str) -> tuple[Choice, ...]:
        """The versions that are asked copies of the model's requests."""
        table = self._tables.get(model)
        return () if table is None else table.shadows

    def shares(self, model: str) -> tuple[Share, ...]:
        """The variants that answer, with their parts of the entities."""
        table = self._tables.get(model)
        return () if table is None else table.shares()

    def slot(self, model: str) -> Slot | None:
        table = self._tables.get(model)
        return None if table is None else table.slot

    def __iter__(self) -> Iterator[Slot]:
        return iter([self._tables[name].slot for name in sorted(self._tables)])

    def names(self) -> list[str]:
        return sorted(self._tables)

    def warm(self, ref: VersionRef) -> ModelHandle | None:
        """The version if it is in memory."""
        slot = self.slot(ref.model)
        return None if slot is None else slot.holding(ref)

    def put(self, slot: Slot) -> None:
        """Puts versions and rules in place at once. A version that no slot holds any more leaves memory with its last request."""
        self._tables[slot.current.name] = _Table(slot)
        self.generation += 1
