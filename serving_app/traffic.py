"""Which variant an entity falls to: the sticky key of a request and its place in [0, 1).

Belongs here: pure functions of (salt, entity). Does not belong here: loaded versions (`router`), where rules come from.

The place is BLAKE2b (RFC 7693) keyed with the salt, its first 53 bits as a fraction: no state, so every replica and every restart
draws alike, and nobody who lacks the salt can pick an entity for a variant. A variant that takes [0, w) keeps, when w grows,
everything it had.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from mlplatform.contracts import ServingContract

_SEPARATOR = "\x1f"


class Draw:
    """One draw: entities (bytes) to [0, 1). `purpose` keeps the draws of canary, experiment and shadow apart under an equal salt."""

    def __init__(self, purpose: str, salt: str) -> None:
        # Keyed once: a copy of the keyed state costs a third of keying anew.
        self._keyed = blake2b(digest_size=8, key=salt.encode(), person=purpose.encode())

    def place(self, entity: bytes) -> float:
        state = self._keyed.copy()
        state.update(entity)
        # 53 bits are what a double holds: with all 64 the highest places would round to 1.0, outside every share.
        return (int.from_bytes(state.digest(), "big") >> 11) / 2**53


def sticky_fields(contract: ServingContract) -> tuple[str, ...]:
    """The request fields that are the entity: the views' join keys that are not constant; all fields where no view has one."""
    asked = {f.name for f in contract.fields if f.constant is None}
    keys = dict.fromkeys(key for view in contract.views for key in view.join_keys if key in asked)
    return tuple(sorted(keys or asked))


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
