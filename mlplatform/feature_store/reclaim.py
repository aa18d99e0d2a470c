"""Removing what no view is read from any more, and finding out which generations there are.

Belongs here: retiring generations, removing their values, listing pointers and manifests. Does not belong here: making or
switching generations (`generations.py`).

A generation that is no longer live keeps its manifest for `GRACE_S`, then the manifest expires. A value whose generation is in no
pointer and has no manifest is garbage. A manifest is there before its generation is announced, and the values come after that: so
reclaiming can never meet a build.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from urllib.parse import unquote

from mlplatform.feature_store.codec import (
    COUNTER_KEY,
    NEWEST_KEY,
    RETIRED_KEY,
    generation_of,
    manifest_key,
    pointer_key,
    project_prefix,
)
from mlplatform.feature_store.commands import KEYS_PER_COMMAND, Client, Steps, execute, run
from mlplatform.feature_store.manifest import Manifest
from mlplatform.feature_store.pointer import Pointer
from mlplatform.feature_store.writer import GRACE_S


@dataclass(frozen=True)
class Reclaimed:
    """`retiring` generations are kept for readers and writers under way; `keys` values of others were removed."""

    retiring: int
    keys: int


def reclaim(client: Client, grace_s: int = GRACE_S) -> Reclaimed:
    """Retires every generation that is not live, and removes the values of those whose time is over."""
    retiring = 0
    for key in list(client.scan_iter(match=COUNTER_KEY + b"*", count=KEYS_PER_COMMAND)):
        number = key[len(COUNTER_KEY) :]
        if number.isdigit():
            retiring += run(client, _retire_unless_live(int(number), grace_s))
    return Reclaimed(retiring, _remove_garbage(client))


def reclaim_due(client: Client) -> int:
    """Removes the values of retired generations whose time is over, without looking for others. Returns their number."""
    (members,) = execute(client, [("SMEMBERS", RETIRED_KEY)])
    numbers = [int(m) for m in members]
    if not numbers or all(execute(client, [("EXISTS", manifest_key(n)) for n in numbers])):
        return 0
    return _remove_garbage(client)


def remove_views(client: Client, project: str, view: str | None = None) -> None:
    """Removes a view's values, or a whole project's, with no time of grace."""
    pattern = project_prefix(project) if view is None else pointer_key(project, view)
    found = client.scan_iter(match=literal(pattern) + b"*", count=KEYS_PER_COMMAND) if view is None else [pattern]
    for key in list(found):
        raw, _ = execute(client, [("GET", key), ("UNLINK", key)])
        for generation in Pointer.parse(raw).live():
            run(client, retire(generation.number, 0))
    reclaim_due(client)


def pointers(client: Client, project: str | None = None) -> dict[tuple[str, str], Pointer]:
    """(project, view) → pointer, of every view that was ever written."""
    prefix = b"fs@" if project is None else project_prefix(project)
    found = {}
    for key in sorted(client.scan_iter(match=literal(prefix) + b"*", count=KEYS_PER_COMMAND)):
        owner, view = key[3:].decode().split(":")
        found[unquote(owner), unquote(view)] = Pointer.parse(execute(client, [("GET", key)])[0])
    return found


def pointer_of(client: Client, project: str, view: str) -> Pointer:
    """Which generations of a view are live; an empty pointer where it was never written."""
    return Pointer.parse(execute(client, [("GET", pointer_key(project, view))])[0])


def manifest_of(client: Client, generation: int) -> Manifest | None:
    """What is known of a generation; None where its manifest is gone."""
    (raw,) = execute(client, [("GET", manifest_key(generation))])
    return None if raw is None else Manifest.parse(raw)


def newest_events(client: Client) -> dict[int, datetime]:
    """Generation → the newest event time of its values by now: as built, as carried over and as pushed since."""
    found: Any = client.zrange(NEWEST_KEY, 0, -1, withscores=True)
    return {int(number): datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(us)) for number, us in found}


def retire(number: int, grace_s: int = GRACE_S) -> Steps[None]:
    """The generation is not live any more; its values go once `grace_s` has passed."""
    yield [("SADD", RETIRED_KEY, number)]
    yield [("EXPIRE", manifest_key(number), grace_s)]


def _retire_unless_live(number: int, grace_s: int) -> Steps[bool]:
    """Whether the generation is not live. The time to live is asked first: a manifest without one was in the pointer by then."""
    (ttl,) = yield [("PTTL", manifest_key(number))]
    (raw,) = yield [("GET", manifest_key(number))]
    if raw is None:
        return False
    manifest = Manifest.parse(raw)
    (pointer,) = yield [("GET", pointer_key(manifest.project, manifest.view))]
    if any(g.number == number for g in Pointer.parse(pointer).live()):
        return False
    if ttl == -1:
        yield from retire(number, grace_s)
    else:  # it expires already: a build that ended between two steps of its announcement
        yield [("SADD", RETIRED_KEY, number)]
    return True


def _remove_garbage(client: Client) -> int:
    """Removes every value whose generation is in no pointer and has no manifest. Returns how many."""
    live = {g.number for pointer in pointers(client).values() for g in pointer.live()}
    retired, noted = execute(client, [("SMEMBERS", RETIRED_KEY), ("ZRANGE", NEWEST_KEY, 0, -1)])
    over = sorted({int(number) for number in (*retired, *noted)} - live)
    over = [n for n, kept in zip(over, execute(client, [("EXISTS", manifest_key(n)) for n in over]), strict=True) if not kept]
    removed = 0
    keys = client.scan_iter(match=b"fs[:{]*", count=KEYS_PER_COMMAND)
    while page := list(islice(keys, KEYS_PER_COMMAND)):
        found = {key: place[0] for key in page if (place := generation_of(key)) and place[0] not in live}
        numbers = sorted(set(found.values()))
        kept = dict(zip(numbers, execute(client, [("EXISTS", manifest_key(n)) for n in numbers]), strict=True))
        garbage = [("UNLINK", key) for key, number in found.items() if not kept[number]]
        removed += sum(execute(client, garbage))
    if over:
        execute(client, [("SREM", RETIRED_KEY, *over), ("ZREM", NEWEST_KEY, *over)])
    return removed


def literal(prefix: bytes) -> bytes:
    """The prefix as a SCAN pattern that matches itself only."""
    return b"".join(b"\\" + bytes([c]) if bytes([c]) in b"\\*?[]^-" else bytes([c]) for c in prefix)
