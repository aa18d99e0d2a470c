"""What is known of a generation: the JSON under its manifest key.

Belongs here: its fields. Does not belong here: which generations are live: the pointer alone says that.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

# pushed: made by a view's first write; building: being filled, or its builder died; verified: counts and sample agreed.
State = Literal["pushed", "building", "verified"]


@dataclass(frozen=True)
class Manifest:
    """`features` in packed order (empty where a push made the generation), `schema` their hash, times ISO 8601 in UTC.

    `entities` were written by the builder, `carried_over` came from the generation before; `sample` values were read back and
    compared bit by bit, of which `overtaken` had been replaced by a newer push. `restored` tells every time it was
    brought back: (when, from which generation, by whom).
    """

    project: str
    view: str
    features: Sequence[str]
    schema: int
    state: State
    built_at: str | None = None
    built_by: str | None = None
    entities: int | None = None
    carried_over: int = 0
    sample: int | None = None
    overtaken: int | None = None
    newest_event: str | None = None
    restored: Sequence[Sequence[Any]] = ()

    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        return cls(**json.loads(raw))
