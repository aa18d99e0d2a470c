"""Which variant an entity falls to: its place in [0, 1).

Belongs here: pure functions of (salt, entity). Does not belong here: which entity a request is of (`mlplatform.sticky`), loaded versions
(`router`), where rules come from.

The place is BLAKE2b (RFC 7693) keyed with the salt, its first 53 bits as a fraction: no state, so every replica and every restart
draws alike, and nobody who lacks the salt can pick an entity for a variant. A variant that takes [0, w) keeps, when w grows,
everything it had.
"""

from hashlib import blake2b


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
