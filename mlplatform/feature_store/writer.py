"""Writing rows to the online store: one server-side step decides row by row what stays, in every live generation.

Belongs here: the compare-and-set script, the protocol of a push, and the fast path from a Polars frame to packed rows. Does not
belong here: Feast (its plug-in in `online.py` uses this module), whole generations (`generations.py`), reading.

A value replaces what is stored if its (event time, created) is greater; so a correction (same event time, created
later) wins, a late value never overwrites a newer one, and a replay changes nothing, whatever the number of writers and the
order in which they come. (Event time, created) is the key of a row: two rows of one entity that share both are taken
for the same row and the first one stays, except that a value of another schema gives way to the one being written.

**A push** goes into every live generation of the rows' schema: the current one, the one being built, and the previous one, so
that restoring it does not go back in time. No step spans two keys of different slots, so the order makes it whole: read the pointer,
write to the generations it names, read the pointer again, and write to those that are new, until none is. A builder announces
its generation in the pointer before it reads its source. So a push either sees the announcement and writes there too, or had
ended before the source was read.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl

from mlplatform.feature_store.codec import (
    BUCKETS,
    COUNTER_KEY,
    NEWEST_KEY,
    Floats,
    Micros,
    SchemaMismatchError,
    encode_many,
    event_of,
    feature_order,
    join_order,
    manifest_key,
    pointer_key,
    schema_hash,
    value_keys,
)
from mlplatform.feature_store.commands import Client, Command, Steps, is_cluster, run
from mlplatform.feature_store.join import as_utc, newest
from mlplatform.feature_store.manifest import Manifest, State
from mlplatform.feature_store.pointer import SWAP, Generation, Pointer

BATCH = 1_000  # rows per script call: about 0.1 MB, a few milliseconds of the server's time
PACKED_TOGETHER = 8_192  # rows whose intermediate arrays stay in the processor's cache
CALLS_TOGETHER = 8  # script calls per round trip

GRACE_S = 60  # for how long a generation that is not live is kept, for reads and writes that are under way

EXACT_INTEGERS = 2**53  # above this, float64 cannot tell neighbours apart

# Numbers are compared, not strings: Lua's `<` on strings follows the server's locale.
PUT = """
local call, sub, unpack = redis.call, string.sub, struct.unpack
local function put(key, new)
  local old = call('GETRANGE', key, 0, 19)
  local write = #old < 20
  if not write then
    local head = sub(new, 1, 16)
    if sub(old, 1, 16) == head then
      write = sub(old, 17, 20) ~= sub(new, 17, 20)
    else
      local a, b, c, d = unpack('>I4I4I4I4', head)
      local e, f, g, h = unpack('>I4I4I4I4', old)
      if a ~= e then write = a > e
      elseif b ~= f then write = b > f
      elseif c ~= g then write = c > g
      else write = d > h end
    end
  end
  if not write then return 0 end
  call('SET', key, new)
  return 1
end
local written = 0
"""

# ARGV: the length of each value as four bytes, and the values one after the other. Two arguments instead of a thousand: packing
# arguments is most of a client's work.
COMPARE_AND_SET = f"""{PUT}local at = 1
for i = 1, #KEYS do
  local size = unpack('>I4', ARGV[1], 4 * i - 3)
  written = written + put(KEYS[i], sub(ARGV[2], at, at + size - 1))
  at = at + size
end
return written"""


@dataclass(frozen=True)
class WriteCounts:
    """Rows stored, and rows left out because the same or a newer one was there (or came in the same frame)."""

    written: int
    skipped: int


@dataclass(frozen=True)
class View:
    """A view as its writer names it, with its features in packed order."""

    project: str
    name: str
    features: tuple[str, ...]

    @property
    def schema(self) -> int:
        return schema_hash(self.name, self.features)

    @property
    def pointer_key(self) -> bytes:
        return pointer_key(self.project, self.name)

    def manifest(self, state: State, **known: Any) -> Manifest:
        return Manifest(self.project, self.name, self.features, self.schema, state, **known)


@dataclass(frozen=True)
class Rows:
    """Rows to be written: an entity each (`codec.entity_part`), times int64 (n,), `values` float64 (n, features) in packed order."""

    entities: Sequence[bytes]
    event_us: Micros
    created_us: Micros
    values: Floats

    def packed(self, view: View) -> "Packed":
        values: list[bytes] = []
        for start in range(0, len(self.entities), PACKED_TOGETHER):
            part = slice(start, start + PACKED_TOGETHER)
            values += encode_many(view.schema, self.event_us[part], self.created_us[part], self.values[part])
        return Packed(self.entities, values)


@dataclass(frozen=True)
class Packed:
    """An entity and a packed value for each row."""

    entities: Sequence[bytes]
    values: Sequence[bytes]


def write_frame(
    client: Client,
    project: str,
    view: str,
    join_keys: Sequence[str],
    features: Sequence[str],
    frame: pl.DataFrame,
    *,
    event: str = "event_timestamp",
    created: str | None = "created",
) -> WriteCounts:
    """Writes a view's rows, the newest of each entity, into its live generations; the counts are the current one's.

    `frame` has the join keys, `event` and `created` (timestamps; without a zone they are UTC) and the features (numbers or
    booleans, null or NaN = null). `created=None` takes the event time. Join keys and features in any order.
    Raises ValueError for null keys or times and integers float64 cannot hold, TypeError for other types, SchemaMismatchError
    where the view's generation was built for other features.
    """
    names = View(project, view, feature_order(features))
    rows = newest_rows(names, join_keys, frame, event=event, created=created)
    written = run(client, push(names, rows.packed(names), is_cluster(client)))
    return WriteCounts(written, frame.height - written)


def push(view: View, rows: Packed, clustered: bool) -> Steps[int]:
    """The protocol of a push. Returns how many rows were stored in the generation that is read."""
    if not rows.entities:
        return 0
    written: int | None = None
    done: set[int] = set()
    (raw,) = yield [("GET", view.pointer_key)]
    while True:
        pointer = Pointer.parse(raw)
        if pointer.current is None:
            raw = yield from _first_generation(view, raw)
            continue
        _check(view, pointer)
        new = [g for g in pointer.live() if g.schema == view.schema and g.number not in done]
        if not new:
            return written or 0
        for generation in new:
            stored = yield from put_rows(generation.number, rows, clustered)
            written = stored if written is None else written
            done.add(generation.number)
        newest = event_of(max(rows.values))  # packed values compare in the order of their times
        raw, *_ = yield [("GET", view.pointer_key), *(note_newest(g.number, newest) for g in new)]


def put_rows(generation: int, rows: Packed, clustered: bool) -> Steps[int]:
    """Compare-and-set of rows in one generation. Returns how many were stored."""
    written = 0
    batches = batched(generation, rows, clustered)
    while together := list(islice(batches, CALLS_TOGETHER)):
        written += sum((yield [_compare_and_set(*batch) for batch in together]))
    return written


def fill_rows(generation: int, rows: Packed, clustered: bool) -> Steps[None]:
    """The outcome of `put_rows` for rows of different entities, made for a generation that is empty but for pushes: a batch none of
    whose keys is there yet goes in as it is, without a script."""
    batches = batched(generation, rows, clustered)
    while together := list(islice(batches, CALLS_TOGETHER)):
        whole = yield [("MSETNX", *chain.from_iterable(zip(*batch, strict=True))) for batch in together]
        if met := [_compare_and_set(*batch) for batch, done in zip(together, whole, strict=True) if not done]:
            yield met


def batched(generation: int, rows: Packed, clustered: bool) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """(keys, values) that one command may name, of at most `BATCH` rows each."""
    keys = value_keys(generation, rows.entities, clustered)
    for chosen in grouped(rows.entities, clustered):
        yield [keys[i] for i in chosen], [rows.values[i] for i in chosen]


def _compare_and_set(keys: Sequence[bytes], values: Sequence[bytes]) -> Command:
    sizes = struct.pack(f">{len(values)}I", *map(len, values))
    return ("EVAL", COMPARE_AND_SET, len(keys), *keys, sizes, b"".join(values))


def grouped(entities: Sequence[bytes], clustered: bool) -> Iterator[Sequence[int]]:
    """Positions of entities that one command may name: at most `BATCH`, and in a cluster of one slot."""
    slots: list[Sequence[int]] = [range(len(entities))]
    if clustered:
        buckets: dict[int, list[int]] = {}
        for i, entity in enumerate(entities):
            buckets.setdefault(crc32(entity) % BUCKETS, []).append(i)
        slots = list(buckets.values())
    for places in slots:
        for start in range(0, len(places), BATCH):
            yield places[start : start + BATCH]


def note_newest(generation: int, event_us: int) -> Command:
    """Keeps the newest event time of a generation. Sent after its rows: a writer that dies in between leaves one that is too old
    until the next write, never one that is too new."""
    return ("ZADD", NEWEST_KEY, "GT", event_us, generation)


def new_generation(view: View, manifest: Manifest, grace_s: int) -> Steps[Generation]:
    """A number nobody else has, with a manifest that expires by itself if the generation never becomes live.

    A replica that took over may give out numbers once more that it had not heard of: those whose manifest is there are passed over.
    """
    while True:
        (number,) = yield [("INCR", COUNTER_KEY)]
        if (yield [("SET", manifest_key(number), manifest.json(), "NX", "EX", grace_s)])[0]:
            return Generation(int(number), view.schema)


def swap(view: View, before: bytes | None, after: Pointer) -> Steps[bool]:
    """Moves the pointer if it still is what it was."""
    (moved,) = yield [("EVAL", SWAP, 1, view.pointer_key, before or b"", after.text())]
    return bool(moved)


def _first_generation(view: View, raw: bytes | None) -> Steps[Any]:
    """A view that was never written gets a generation to be read from. Returns the pointer as it is then."""
    manifest = view.manifest("pushed")
    generation = yield from new_generation(view, manifest, GRACE_S)
    if (yield from swap(view, raw, Pointer.parse(raw).created(generation))):
        yield [("SET", manifest_key(generation.number), manifest.json())]
    (raw,) = yield [("GET", view.pointer_key)]
    return raw


def _check(view: View, pointer: Pointer) -> None:
    taken = [g for g in (pointer.current, pointer.building) if g is not None]
    if all(g.schema != view.schema for g in taken):
        raise SchemaMismatchError(
            f"view {view.name}: its values online were built for other features (generation {taken[0].number}); rebuild the view "
            "before rows of the new features are written"
        )


def newest_rows(
    view: View, join_keys: Sequence[str], frame: pl.DataFrame, *, event: str = "event_timestamp", created: str | None = "created"
) -> Rows:
    """The newest row of each entity. Arguments and errors as `write_frame`."""
    order = join_order(join_keys)
    times = frame.select(as_utc(event, frame.schema).alias("__event"), as_utc(created or event, frame.schema).alias("__created"))
    rows = frame.select(*order, *(_number(view.name, name, frame) for name in view.features)).hstack(times)
    holes = [name for name in (*order, "__event", "__created") if rows.get_column(name).has_nulls()]
    if holes:
        raise ValueError(f"view {view.name}: {', '.join(h.strip('_') for h in holes)} must not be null in rows to be served")
    rows = newest(rows, keys=order, event="__event", created="__created")
    values = rows.select(view.features).to_numpy() if view.features else np.empty((rows.height, 0))
    event_us, created_us = (rows.get_column(name).dt.epoch("us").to_numpy() for name in ("__event", "__created"))
    return Rows(entity_parts(view.name, order, rows), event_us, created_us, np.ascontiguousarray(values, np.float64))


def entity_parts(view: str, order: Sequence[str], rows: pl.DataFrame) -> list[bytes]:
    """`codec.entity_part` for a whole frame. `order`: the join keys sorted by name."""
    parts: list[pl.Expr] = []
    for name in order:
        kind = rows.schema[name]
        if kind.is_integer():
            parts.append(pl.format("i{};", pl.col(name)))
        elif kind in (pl.String, pl.Categorical, pl.Enum):
            text = pl.col(name).cast(pl.String)
            parts.append(pl.format("s{}:{}", text.str.len_bytes(), text))
        else:
            raise TypeError(f"view {view}: join key {name} is {kind}; strings and integers can be keys")
    if not parts:
        return [b""] * rows.height
    return list(rows.select(pl.concat_str(parts).cast(pl.Binary).alias("entity")).get_column("entity"))


def _number(view: str, name: str, frame: pl.DataFrame) -> pl.Series:
    """A feature column as float64, null as NaN."""
    column = frame.get_column(name)
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise TypeError(f"view {view}: feature {name} is {column.dtype}; the online store packs numbers and booleans")
    if column.dtype.is_integer() and not column.cast(pl.Int128).is_between(-EXACT_INTEGERS, EXACT_INTEGERS).all():
        raise ValueError(f"view {view}: feature {name} has integers above 2**53, which float64 cannot hold exactly")
    return column.cast(pl.Float64).fill_null(float("nan"))
