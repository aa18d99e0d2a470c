"""The hash chain of a deployment ledger: what an entry's hash is of, and what a broken chain tells.

Belongs here: canonical form, hashes, verifying lines that were read; pure. Does not belong here: where the lines are stored
(`clients.ledger`), what the entries mean (room `deployment`).

An entry's hash is the SHA-256 of its canonical form: one JSON object of all its fields with `sequence` and `previous_hash`, keys
sorted, no spaces, UTF-8, `at` in UTC with microseconds. The first `previous_hash` of a model is `foundation(model)`. Entries written
before there were hashes are hashed on reading, in order, so the first hash that was stored vouches for all of them.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC

from mlplatform.records import LedgerEntry


@dataclass(frozen=True)
class Line:
    """One stored entry. `hash` and `previous_hash` are None for one written before there were hashes."""

    sequence: int
    entry: LedgerEntry
    previous_hash: str | None = None
    hash: str | None = None


@dataclass(frozen=True)
class Head:
    """The last entry of a chain at some time, as it was noted elsewhere. `source` says where, for messages."""

    sequence: int
    hash: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"

    def signed(self, model: str, key: str) -> str:
        """For a place others can write to: with a key, who has not got it cannot make one that counts."""
        if not key:
            return str(self)
        return f"{self}:{hmac.new(key.encode(), f'{model}:{self}'.encode(), hashlib.sha256).hexdigest()}"

    @classmethod
    def parse(cls, text: str, source: str, model: str = "", key: str = "") -> "Head":
        """What `signed` wrote, or `str` where no key is given. Raises ValueError."""
        number, _, rest = text.partition(":")
        if not number.isascii() or not number.isdigit():
            raise ValueError(f"{source} holds no head of a ledger: '{text[:20]}'")
        head = cls(int(number), rest.partition(":")[0], source)
        if key and not hmac.compare_digest(text.encode(), head.signed(model, key).encode()):
            raise ValueError(f"the head in {source} was not signed with MLPLATFORM_SIGNING_KEY")
        return head


@dataclass(frozen=True)
class Verification:
    """`faults`: one text for each thing that is not as it was written; none where the chain holds. `hashed`: entries with a hash of
    their own; `anchored`: the newest of them that a head elsewhere vouches for (None: no head was given)."""

    model: str
    entries: int
    hashed: int
    head: Head | None
    anchored: int | None
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


def foundation(model: str) -> str:
    """What the first entry follows."""
    return hashlib.sha256(f"mlplatform ledger of {model}".encode()).hexdigest()


def canonical(sequence: int, entry: LedgerEntry, previous_hash: str) -> str:
    content = {
        "sequence": sequence,
        "previous_hash": previous_hash,
        "at": entry.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "model": entry.model,
        "action": entry.action,
        "alias": entry.alias,
        "version": entry.version,
        "previous_version": entry.previous_version,
        "actor": entry.actor,
        "reason": entry.reason,
        "run_id": entry.run_id,
        "evidence": dict(entry.evidence),
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def entry_hash(sequence: int, entry: LedgerEntry, previous_hash: str) -> str:
    # Surrogates, which JSON can carry and UTF-8 cannot, are hashed as they are.
    return hashlib.sha256(canonical(sequence, entry, previous_hash).encode("utf-8", "surrogatepass")).hexdigest()


def in_order(lines: Iterable[Line]) -> tuple[Line, ...]:
    """As written. Entries of before the chain may share a sequence: those go by their time, then by their content."""
    return tuple(sorted(lines, key=lambda line: (line.sequence, line.entry.at, canonical(line.sequence, line.entry, ""))))


def next_line(model: str, lines: Sequence[Line], entry: LedgerEntry) -> Line:
    """`entry` as the line after `lines` (in order)."""
    previous = foundation(model)
    for line in lines:
        previous = line.hash or entry_hash(line.sequence, line.entry, previous)
    sequence = lines[-1].sequence + 1 if lines else 0
    return Line(sequence, entry, previous, entry_hash(sequence, entry, previous))


def verify(model: str, lines: Sequence[Line], heads: Iterable[Head] = ()) -> Verification:
    """Compares every hash. `heads` are heads noted elsewhere: each must still be in the chain, which shows what was cut off its end.

    Not to be seen from the lines alone: entries cut off after the newest head, and a chain computed anew from the start. The second
    shows as soon as one head lies where the forger could not write.
    """
    faults: list[str] = []
    hashes: dict[int, str] = {}
    previous, before = foundation(model), None
    for line in lines:
        name = f"entry {line.sequence}"
        found = entry_hash(line.sequence, line.entry, previous if line.previous_hash is None else line.previous_hash)
        if line.hash is None:
            if hashes:
                faults.append(f"{name} has no hash although earlier ones have: inserted")
            previous = found
            continue
        if line.hash != found:
            faults.append(f"{name} is not what its hash says: edited")
        if line.previous_hash != previous:
            faults.append(f"{name} does not follow the entry before it: one was edited, dropped, inserted or moved there")
        elif before is not None and line.sequence != before + 1:
            faults.append(f"{name} follows entry {before}: renumbered")
        if line.entry.model != model:
            faults.append(f"{name} is of the model {line.entry.model}")
        hashes[line.sequence] = line.hash
        previous, before = line.hash, line.sequence
    anchored: int | None = None
    for head in heads:
        if hashes.get(head.sequence) == head.hash:
            anchored = max(head.sequence, -1 if anchored is None else anchored)
        else:
            faults.append(f"entry {head.sequence}, the last one according to {head.source}, is not there: cut off, or all written anew")
    last = Head(before, previous) if before is not None else None
    return Verification(model, len(lines), len(hashes), last, anchored, tuple(faults))
