"""Whole generations of a view: build one beside the one that is read, verify it, flip, restore, reclaim.

Belongs here: everything that moves a view from one generation to another. Does not belong here: single rows (`writer.py`),
where a view's rows come from: the caller hands in a function that reads them.

A build announces its generation in the view's pointer, reads its rows, writes them by compare-and-set (pushes go there too, see
`writer.py`), verifies, and flips the pointer by one atomic step on one key. Readers see the old generation or the
new one. A builder that dies leaves a generation that nobody reads; the next build takes its place in the pointer.

A generation that is no longer live keeps its manifest for `GRACE_S`, then the manifest expires. A value whose generation is in no
pointer and has no manifest is garbage. A manifest is there before its generation is announced, and the values come after that: so
reclaiming can never meet a build.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
from redis.exceptions import RedisError

from mlplatform.feature_store.codec import (
    COUNTER_KEY,
    RETIRED_KEY,
    decode_many,
    feature_order,
    generation_of,
    manifest_key,
    pointer_key,
    project_prefix,
    value_keys,
)
from mlplatform.feature_store.commands import KEYS_PER_COMMAND, Client, Steps, execute, is_cluster, run
from mlplatform.feature_store.manifest import Manifest
from mlplatform.feature_store.pointer import Generation, Pointer
from mlplatform.feature_store.writer import (
    CALLS_TOGETHER,
    GRACE_S,
    PUT,
    Rows,
    View,
    grouped,
    new_generation,
    newest_rows,
    put_rows,
    swap,
)

SAMPLE = 1_000  # values read back and compared bit by bit

# KEYS: a value of the current generation and its place in the new one, in turn.
CARRY_OVER = f"""{PUT}for i = 1, #KEYS, 2 do
  local value = redis.call('GET', KEYS[i])
  if value then written = written + put(KEYS[i + 1], value) end
end
return written"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TakenOverError(RuntimeError):
    """Another materialization of the view was started meanwhile; this one's generation is not read."""


class VerificationError(RuntimeError):
    """What lies in the new generation is not what was written; readers stay with the one they have."""


class NoPreviousGenerationError(LookupError):
    """The view has no generation to go back to."""


@dataclass(frozen=True)
class Built:
    """A generation that is read now. Counts of entities; `newest` is the newest event time written, None without rows."""

    generation: int
    entities: int
    carried_over: int
    sample: int
    overtaken: int
    newest: datetime | None


@dataclass(frozen=True)
class Reclaimed:
    """`retiring` generations are kept for readers and writers under way; `keys` values of others were removed."""

    retiring: int
    keys: int


def build_generation(
    client: Client,
    project: str,
    view: str,
    join_keys: Sequence[str],
    features: Sequence[str],
    rows: Callable[[], pl.DataFrame],
    *,
    at: datetime,
    by: str,
    event: str = "event_timestamp",
    created: str | None = "created",
    carry_over: bool = False,
) -> Built:
    """Makes the newest of `rows()` the view's values in one step; `write_frame` says what the frame holds.

    `rows` is called once the build is announced: a push that it misses is in the new generation by itself.
    `carry_over` keeps the current generation's other entities, and its newer values (if its features are the same).
    Raises TakenOverError, VerificationError, what `rows` raises and redis errors; readers then see what they saw before.
    """
    names = View(project, view, feature_order(features))
    reclaim_due(client)
    manifest = names.manifest("building", built_at=at.isoformat(), built_by=by)
    generation = run(client, _announce(names, manifest))
    try:
        written = newest_rows(names, join_keys, rows(), event=event, created=created)
        run(client, put_rows(generation.number, written.packed(names), is_cluster(client)))
        carried = _carry_over(client, names, generation) if carry_over else set()
        _count(client, generation, {*written.entities, *carried})
        sample, overtaken = _compare(client, names, generation, written)
        newest = _EPOCH + timedelta(microseconds=int(written.event_us.max())) if written.entities else None
        built = Built(generation.number, len(written.entities), len(carried - {*written.entities}), sample, overtaken, newest)
        _record(client, manifest, built)
        run(client, _flip(names, generation))
    except Exception:
        # Not needed for anybody's safety: it only spares the next build a generation to write pushes to.
        with contextlib.suppress(RedisError, OSError):
            run(client, _abandon(names, generation))
        raise
    return built


def restore(client: Client, project: str, view: str, *, at: datetime, by: str) -> Manifest:
    """Readers get the view's previous generation back; restoring again undoes that. Returns the manifest of what is read now.

    Pushes went into both all the while (where the features are the same), so nothing pushed is lost.
    """
    before = run(client, _restore(project, view))
    key = manifest_key(before.previous.number) if before.previous else b""
    (raw,) = execute(client, [("GET", key)])
    manifest = Manifest.parse(raw)
    since = None if before.current is None else before.current.number
    manifest = replace(manifest, restored=(*manifest.restored, (at.isoformat(), since, by)))
    execute(client, [("SET", key, manifest.json())])
    return manifest


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
            run(client, _retire(generation.number, 0))
    reclaim_due(client)


def pointers(client: Client, project: str | None = None) -> dict[tuple[str, str], Pointer]:
    """(project, view) → pointer, of every view that was ever written."""
    prefix = b"fs@" if project is None else project_prefix(project)
    found = {}
    for key in sorted(client.scan_iter(match=literal(prefix) + b"*", count=KEYS_PER_COMMAND)):
        owner, view = key[3:].decode().split(":")
        found[unquote(owner), unquote(view)] = Pointer.parse(execute(client, [("GET", key)])[0])
    return found


def manifest_of(client: Client, generation: int) -> Manifest | None:
    """What is known of a generation; None where its manifest is gone."""
    (raw,) = execute(client, [("GET", manifest_key(generation))])
    return None if raw is None else Manifest.parse(raw)


# --- moves of the pointer --------------------------------------------------------------------------------------------


def _announce(view: View, manifest: Manifest) -> Steps[Generation]:
    """From here on pushes go into the new generation too."""
    generation = yield from new_generation(view, manifest, GRACE_S)
    while True:
        (raw,) = yield [("GET", view.pointer_key)]
        before = Pointer.parse(raw)
        if before.building == generation or (yield from swap(view, raw, before.announced(generation))):
            break
    yield [("SET", manifest_key(generation.number), manifest.json())]
    if before.building not in (None, generation):
        yield from _retire(before.building.number)
    return generation


def _flip(view: View, generation: Generation) -> Steps[None]:
    while True:
        (raw,) = yield [("GET", view.pointer_key)]
        before = Pointer.parse(raw)
        if before.current == generation:  # done before, and the answer was lost
            return
        if before.building != generation:
            raise TakenOverError(
                f"view {view.name}: another materialization took over while generation {generation.number} was built; "
                "its values are not read, and the other one's will be"
            )
        if (yield from swap(view, raw, before.flipped())):
            break
    if before.previous is not None:
        yield from _retire(before.previous.number)


def _abandon(view: View, generation: Generation) -> Steps[None]:
    (raw,) = yield [("GET", view.pointer_key)]
    before = Pointer.parse(raw)
    if before.building == generation and (yield from swap(view, raw, before.abandoned())):
        yield from _retire(generation.number)


def _restore(project: str, name: str) -> Steps[Pointer]:
    view = View(project, name, ())
    while True:
        (raw,) = yield [("GET", view.pointer_key)]
        before = Pointer.parse(raw)
        if before.current is None:
            raise NoPreviousGenerationError(f"view {name} of project {project} was never written to the online store")
        if before.previous is None:
            raise NoPreviousGenerationError(f"view {name} has no generation before {before.current.number}: it was built once so far")
        if (yield from swap(view, raw, before.restored())):
            return before


# --- filling and verifying -------------------------------------------------------------------------------------------


def _carry_over(client: Client, view: View, generation: Generation) -> set[bytes]:
    """Copies the current generation's values, where they are newer, inside the server. Returns its entities.

    A key that comes into being during the scan comes by a push, which writes the new generation too.
    """
    (raw,) = execute(client, [("GET", view.pointer_key)])
    current = Pointer.parse(raw).current
    if current is None or current.schema != view.schema:
        return set()
    carried: set[bytes] = set()
    clustered = is_cluster(client)
    for entities in _entities(client, current.number):
        calls: list[tuple[Any, ...]] = []
        for group in grouped(entities, clustered):
            chosen = [entities[i] for i in group]
            pairs = zip(value_keys(current.number, chosen, clustered), value_keys(generation.number, chosen, clustered), strict=True)
            keys = [key for pair in pairs for key in pair]
            calls.append(("EVAL", CARRY_OVER, len(keys), *keys))
        execute(client, calls)
        carried.update(entities)
    return carried


def _entities(client: Client, generation: int) -> Iterator[list[bytes]]:
    """The entities of a generation, a page at a time."""
    pattern = (b"fs{*}:%d:*" if is_cluster(client) else b"fs:%d:*") % generation
    keys = client.scan_iter(match=pattern, count=KEYS_PER_COMMAND)
    while page := list(islice(keys, KEYS_PER_COMMAND)):
        yield [found[1] for key in page if (found := generation_of(key)) and found[0] == generation]


def _count(client: Client, generation: Generation, entities: set[bytes]) -> None:
    """Every entity written has a value. Raises VerificationError."""
    clustered = is_cluster(client)
    keys = value_keys(generation.number, ordered := list(entities), clustered)
    calls = iter([("EXISTS", *(keys[i] for i in group)) for group in grouped(ordered, clustered)])
    there = 0
    while together := list(islice(calls, CALLS_TOGETHER)):
        there += sum(execute(client, together))
    if there != len(keys):
        raise VerificationError(
            f"generation {generation.number} holds {there} of {len(keys)} entities written to it: is the server evicting?"
        )


def _compare(client: Client, view: View, generation: Generation, rows: Rows) -> tuple[int, int]:
    """(values compared, of which a newer push had replaced). Raises VerificationError."""
    n = len(rows.entities)
    chosen = np.sort(np.random.default_rng(generation.number).permutation(n)[:SAMPLE])
    keys = value_keys(generation.number, [rows.entities[i] for i in chosen], is_cluster(client))
    stored = decode_many(execute(client, [("GET", key) for key in keys]), view.schema, len(view.features))
    overtaken = 0
    for i, found in zip(chosen, stored, strict=True):
        time = (int(rows.event_us[i]), int(rows.created_us[i]))
        if found is not None and (found.event_us, found.created_us) > time:
            overtaken += 1
        elif found is None or (found.event_us, found.created_us) != time or not _same(found.values, rows.values[i]):
            raise VerificationError(f"generation {generation.number}: what is stored for {rows.entities[i]!r} is not what was written")
    return len(chosen), overtaken


def _same(one: np.ndarray[Any, np.dtype[np.float64]], other: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """To the last bit, but any NaN is null."""
    null = np.isnan(one)
    return bool(np.array_equal(null, np.isnan(other)) and np.array_equal(one[~null].view(np.int64), other[~null].view(np.int64)))


def _record(client: Client, manifest: Manifest, built: Built) -> None:
    verified = replace(
        manifest,
        state="verified",
        entities=built.entities,
        carried_over=built.carried_over,
        sample=built.sample,
        overtaken=built.overtaken,
        newest_event=None if built.newest is None else built.newest.isoformat(),
    )
    execute(client, [("SET", manifest_key(built.generation), verified.json())])


# --- reclaiming ------------------------------------------------------------------------------------------------------


def _retire(number: int, grace_s: int = GRACE_S) -> Steps[None]:
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
        yield from _retire(number, grace_s)
    else:  # it expires already: a build that ended between two steps of its announcement
        yield [("SADD", RETIRED_KEY, number)]
    return True


def _remove_garbage(client: Client) -> int:
    """Removes every value whose generation is in no pointer and has no manifest. Returns how many."""
    live = {g.number for pointer in pointers(client).values() for g in pointer.live()}
    (members,) = execute(client, [("SMEMBERS", RETIRED_KEY)])
    over = [int(m) for m in members]
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
        execute(client, [("SREM", RETIRED_KEY, *over)])
    return removed


def literal(prefix: bytes) -> bytes:
    """The prefix as a SCAN pattern that matches itself only."""
    return b"".join(b"\\" + bytes([c]) if bytes([c]) in b"\\*?[]^-" else bytes([c]) for c in prefix)
