"""The entity a request is of, by which it always falls to the same variant: its fields, and its key.

Belongs here: pure functions that the service draws by and the platform counts by, so that both mean the same entity. Does not belong here:
the draw (`serving_app.traffic`).
"""

from collections.abc import Mapping
from typing import Any

from mlplatform.contracts import ServingContract, TrafficRules

_SEPARATOR = "\x1f"


def sticky_fields(contract: ServingContract) -> tuple[str, ...]:
    """The request fields that are the entity: the views' join keys that are not constant; all fields where no view has one."""
    asked = {f.name for f in contract.fields if f.constant is None}
    keys = dict.fromkeys(key for view in contract.views for key in view.join_keys if key in asked)
    return tuple(sorted(keys or asked))


def entity_fields(rules: TrafficRules, champion: ServingContract) -> tuple[str, ...]:
    """The request fields that are the entity under these rules.

    Rules that are in place may have been made for another champion: where its fields are none of this one's, its own are the entity.
    """
    return rules.sticky_on if rules.sticky_on and not rules.unfit_for(champion) else sticky_fields(champion)


def key_of(fields: tuple[str, ...], row: object) -> bytes:
    """The sticky key of one input as it stood in the body, UTF-8. Never raises: what is no usable value counts as absent,
    since the version that is chosen refuses it."""
    given = row if isinstance(row, Mapping) else {}
    return _SEPARATOR.join([_text(given.get(name)) for name in fields]).encode("utf-8", "surrogatepass")


def sticky_key(contract: ServingContract, row: object) -> bytes:
    """The sticky key by the contract's own entity."""
    return key_of(sticky_fields(contract), row)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # JSON has one kind of number: 7 and 7.0 are the same customer
    return str(value) if isinstance(value, int | float) else ""
