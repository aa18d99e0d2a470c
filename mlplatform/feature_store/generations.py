"""Whole generations of a view: build one beside the one that is read, verify it, flip, restore.

Belongs here: everything that moves a view from one generation to another. Does not belong here: single rows (`writer.py`),
what is left behind (`reclaim.py`), where a view's rows come from: the caller hands in a function that reads them.

A build announces its generation in the view's pointer, reads its rows, writes them by compare-and-set (pushes go there too, see
`writer.py`), verifies, and flips the pointer by one atomic step on one key. Readers see the old generation or the
new one. A builder that dies leaves a generation that nobody reads; the next build takes its place in the pointer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from redis.exceptions import RedisError

from mlplatform.feature_store.codec import (
    NEWEST_KEY,
    Floats,
    decode_many,
    feature_order,
    generation_of,
    manifest_key,
    value_keys,
)
from mlplatform.feature_store.commands import KEYS_PER_COMMAND, Client, Steps, execute, get_values, is_cluster, run
from mlplatform.feature_store.manifest import Manifest
from mlplatform.feature_store.pointer import Generation, Pointer
from mlplatform.feature_store.reclaim import reclaim_due, retire
from mlplatform.feature_store.writer import (
    CALLS_TOGETHER,
    GRACE_S,
    PUT,
    Rows,
    View,
    fill_rows,
    grouped,
    new_generation,
    newest_rows,
    note_newest,
    swap,
)

SAMPLE = 1_000  # values read back and compared bit by bit

# KEYS: a value of the current generation and its place in the new one, in turn.
CARRY_OVER = f"""{PUT}for i = 1, #KEYS, 2 do
  local value = call('GET', KEYS[i])
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
        run(client, fill_rows(generation.number, written.packed(names), is_cluster(client)))
        carried = _carry_over(client, names, generation) if carry_over else set()
        _count(client, generation, {*written.entities, *carried})
        sample, overtaken = _compare(client, names, generation, written)
        newest = _EPOCH + timedelta(microseconds=int(written.event_us.max())) if written.entities else None
        built = Built(generation.number, len(written.entities), len(carried - {*written.entities}), sample, overtaken, newest)
        _record(client, manifest, built)
        run(client, _flip(names, generation))
    except Exception:  # whatever it is, the caller gets it; the generation is given up first
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
        yield from retire(before.building.number)
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
        yield from retire(before.previous.number)


def _abandon(view: View, generation: Generation) -> Steps[None]:
    (raw,) = yield [("GET", view.pointer_key)]
    before = Pointer.parse(raw)
    if before.building == generation and (yield from swap(view, raw, before.abandoned())):
        yield from retire(generation.number)


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
    (newest,) = execute(client, [("ZSCORE", NEWEST_KEY, current.number)])
    if newest is not None:
        execute(client, [note_newest(generation.number, int(newest))])
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
    stored = decode_many(run(client, get_values(keys, is_cluster(client))), view.schema, len(view.features))
    overtaken = 0
    for i, wanted, found in zip(chosen, _bits(rows.values[chosen]), stored, strict=True):
        time = (int(rows.event_us[i]), int(rows.created_us[i]))
        if found is not None and (found.event_us, found.created_us) > time:
            overtaken += 1
        elif found is None or (found.event_us, found.created_us) != time or _bits(found.values) != wanted:
            raise VerificationError(f"generation {generation.number}: what is stored for {rows.entities[i]!r} is not what was written")
    return len(chosen), overtaken


def _bits(values: Floats) -> list[Any]:
    """What tells values apart to the last bit, but any NaN is null."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64).tolist()  # type: ignore[no-any-return]  # NumPy's stub


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
    newest = [] if built.newest is None else [note_newest(built.generation, (built.newest - _EPOCH) // timedelta(microseconds=1))]
    execute(client, [("SET", manifest_key(built.generation), verified.json()), *newest])
