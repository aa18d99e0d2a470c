"""The byte layout of the online store, shared by the Feast plug-in, the writers and the prediction service.

Belongs here: keys, packed values and their order, with NumPy and the standard library only. Does not belong here: any
client, Feast, Polars or pandas: the service imports this on its hot path.

**Keys.** All of the store's keys begin with `fs`, followed by one of four signs:

| key | content |
|---|---|
| `fs@<project>:<view>` | the view's pointer: which generations are live (`generations.Pointer`) |
| `fs:<generation>:<entity>` | one packed value; in a Redis Cluster `fs{<bucket>}:<generation>:<entity>` |
| `fs#<generation>` | the generation's manifest (JSON); a value without one is garbage |
| `fs#`, `fs#retired` | the last generation number given out; the generations whose values wait to be removed |
| `fs#newest` | sorted set: generation → its newest event time, microseconds since 1970 UTC (exact until the year 2255) |

Generation numbers are given out once in a database, over all projects and views: so a value's key needs neither name (they
would take a quarter of the memory), and no later generation can meet an earlier one's values. `<entity>` is each
join value, `s<bytes>:<utf-8>` for a string and `i<decimal>;` for an integer: each part says where it ends, and the
integer 1 is not the string "1". Join values stand in the order of the view's **join keys sorted by name**, whatever order
a view or a caller lists them in. A view without entities has none. `<bucket>` is CRC-32 of `<entity>` modulo 256, a hash tag: what
shares a bucket shares a slot, in every generation. In names `%`, `:`, `{` and `}` are percent-escaped.

**Value**, 20 bytes of header, ceil(n/4) of widths and 1 to 8 bytes for each of n features:

| bytes | content |
|---|---|
| 0-7 | event time, microseconds since 1970 UTC, as unsigned big-endian of (time + 2**63) |
| 8-15 | created time, likewise |
| 16-19 | schema hash, unsigned big-endian |
| 20- | two bits for each feature, the first in the lowest: 0 = uint8, 1 = float16, 2 = float32, 3 = float64 |
| then | the features sorted by name, little-endian, each in the narrowest of the four that holds its float64 to the last bit |

NaN is null (one NaN only). The shift by 2**63 makes the first 16 bytes compare, as bytes, in the order of (event time,
created), also before 1970. The narrowest width is the only one written, so equal rows are equal bytes whoever packed them.

Features are sorted by name because their declared order does not survive: Feast 0.67 writes the schema of a
StreamFeatureView to its registry from a `set`, in another order each time. `writer.write_frame` and `reader.ViewLayout`
see to the order; who calls `schema_hash`, `encode` and `decode` directly names features and values in `feature_order`.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Micros = npt.NDArray[np.int64]
JoinValue = str | int

PREFIX_BYTES = 16  # (event time, created): what decides which of two values stays
HEADER_BYTES = 20
BUCKETS = 256  # hash tags of a Redis Cluster: enough to spread over its nodes, few enough to fill a script call

COUNTER_KEY = b"fs#"
RETIRED_KEY = b"fs#retired"
NEWEST_KEY = b"fs#newest"
_VALUE_KEY = re.compile(rb"fs(?:\{\d+\})?:(\d+):", re.DOTALL)

_SHIFT = 1 << 63
_NAN = np.float64("nan")
_WIDTHS = np.array([1, 2, 4, 8])
_USED = (np.arange(8) < _WIDTHS[:, None]).view(np.uint64)[:, 0]  # by width code, a flag for each of eight bytes
_LETTERS = "Befd"  # of `struct`, by width code
_QUADS = np.array([[byte >> 2 * i & 3 for i in range(4)] for byte in range(256)], np.uint8)  # the four width codes in a byte
_MANY = 40


class SchemaMismatchError(ValueError):
    """A stored value was packed under another feature list than the reader's: it is refused, never misread."""


class Decoded(NamedTuple):
    """One stored value: times in microseconds since 1970 UTC, `values` float64 of shape (n_features,), NaN = null."""

    event_us: int
    created_us: int
    values: Floats


class Block(NamedTuple):
    """A view's values for n entities, a column each: `held` (n,) says where there is one, times are int64 (n,) microseconds
    since 1970 UTC (0 where nothing is held), `values` float64 (n, features), NaN = null or nothing held."""

    held: npt.NDArray[np.bool_]
    event_us: Micros
    created_us: Micros
    values: Floats


def join_order(join_keys: Sequence[str]) -> tuple[str, ...]:
    """A view's join keys in the order in which their values stand in a key: sorted by name."""
    return tuple(sorted(join_keys))


def feature_order(features: Sequence[str]) -> tuple[str, ...]:
    """A view's features in the order in which their values are packed: sorted by name."""
    return tuple(sorted(features))


def project_prefix(project: str) -> bytes:
    """What the pointers of a project begin with, and no other key does."""
    return f"fs@{_escape(project)}:".encode()


@lru_cache(maxsize=4096)
def pointer_key(project: str, view: str) -> bytes:
    """The key that says which generations of a view are live."""
    return project_prefix(project) + _escape(view).encode()


def manifest_key(generation: int) -> bytes:
    """The key of what is known of a generation."""
    return COUNTER_KEY + b"%d" % generation


def entity_part(view: str, join_values: Sequence[JoinValue]) -> bytes:
    """What tells entities of a view apart. `join_values` in the order of `join_order`. TypeError for anything but str and int."""
    if len(join_values) == 1 and isinstance(join_values[0], str):  # most are, and a read makes one for each value
        text = join_values[0].encode()
        return b"s%d:%b" % (len(text), text)
    parts = []
    for value in join_values:
        if isinstance(value, str):
            text = value.encode()
            parts.append(b"s%d:%b" % (len(text), text))
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            parts.append(b"i%d;" % value)
        else:
            raise TypeError(f"view {view}: a join value must be a string or an integer, not {type(value).__name__} ({value!r})")
    return b"".join(parts)


def entity_parts(view: str, values: Iterable[JoinValue]) -> list[bytes]:
    """`entity_part` of many entities of a view with one join key."""
    return [b"i%d;" % value if type(value) is int else entity_part(view, (value,)) for value in values]


def value_keys(generation: int, entities: Sequence[bytes], clustered: bool = False) -> list[bytes]:
    """The keys of entities' values in a generation."""
    if clustered:
        return [b"fs{%d}:%d:%b" % (crc32(e) % BUCKETS, generation, e) for e in entities]
    prefix = b"fs:%d:" % generation
    return [prefix + e for e in entities]


def event_of(packed: bytes) -> int:
    """A packed value's event time, microseconds since 1970 UTC."""
    return int.from_bytes(packed[:8], "big") - _SHIFT


def generation_of(key: bytes) -> tuple[int, bytes] | None:
    """(generation, entity) of a value's key; None for any other key."""
    found = _VALUE_KEY.match(key)
    return (int(found[1]), key[found.end() :]) if found else None


@lru_cache(maxsize=4096)
def _schema_hash(view: str, features: tuple[str, ...]) -> int:
    text = "\x00".join((view, *features))
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")


def schema_hash(view: str, features: Sequence[str]) -> int:
    """32 bits over the view's name and its feature names in the order given: give them in `feature_order`."""
    return _schema_hash(view, tuple(features))


def encode(schema: int, event_us: int, created_us: int, values: Floats) -> bytes:
    """One packed value. `values` float64 of shape (n_features,)."""
    return encode_many(schema, np.array([event_us], np.int64), np.array([created_us], np.int64), np.asarray(values, np.float64)[None, :])[0]


def encode_many(schema: int, event_us: Micros, created_us: Micros, values: Floats) -> list[bytes]:
    """Packs n rows at once: times int64 of shape (n,), `values` float64 of shape (n, n_features)."""
    rows = values.shape[0]
    if event_us.shape != (rows,) or created_us.shape != (rows,):
        raise ValueError(f"{rows} rows of values, but times of shape {event_us.shape} and {created_us.shape}")
    # One bit pattern for null, so that equal rows are equal bytes whoever packed them.
    clean = np.where(np.isnan(values), _NAN, values).astype(np.float64)
    numbers, codes = _narrowest(clean)
    heads = _heads(schema, event_us, created_us, codes)
    # Eight bytes a number, of which the narrow ones use the first few: what is left in row order is the packed rows.
    whole = np.concatenate([heads, numbers.view(np.uint8)], axis=1)
    kept = np.concatenate([np.ones_like(heads, bool), _USED[codes].view(bool)], axis=1)
    text = whole[kept].tobytes()
    ends = np.cumsum(_WIDTHS[codes].sum(axis=1) + heads.shape[1]).tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def decode(packed: bytes | None, schema: int, n_features: int) -> Decoded | None:
    """Unpacks one value; None where there is none. Errors as `decode_many`."""
    return decode_many([packed], schema, n_features)[0]


def decode_many(
    packed: Sequence[bytes | None], schema: int, n_features: int, places: npt.NDArray[np.intp] | None = None
) -> list[Decoded | None]:
    """Unpacks a view's values; None where there is none. As `decode_block`, one answer for each."""
    return unblock(decode_block(packed, schema, n_features, places))


def empty_block(n: int, features: int) -> Block:
    """A block of n entities of which none has a value."""
    return Block(np.zeros(n, np.bool_), np.zeros(n, np.int64), np.zeros(n, np.int64), np.full((n, features), np.nan))


def unblock(block: Block) -> list[Decoded | None]:
    """A block's values one by one; None where nothing is held."""
    times = zip(block.held.tolist(), block.event_us.tolist(), block.created_us.tolist(), block.values, strict=True)
    return [Decoded(event, created, values) if held else None for held, event, created, values in times]


class Packed(NamedTuple):
    """A view's values as the store holds them (None: nothing there), packed under `schema` with so many `features`. They stand in
    `feature_order`, or are picked by `places`."""

    values: Sequence[bytes | None]
    schema: int
    features: int
    places: npt.NDArray[np.intp] | None = None


def decode_block(packed: Sequence[bytes | None], schema: int, n_features: int, places: npt.NDArray[np.intp] | None = None) -> Block:
    """Unpacks a view's values all at once, as `Packed` describes them.

    Raises SchemaMismatchError where one was packed under another schema, ValueError where its length is not of this layout.
    """
    (block,) = decode_blocks([Packed(packed, schema, n_features, places)])
    if isinstance(block, ValueError):
        raise block
    return block


def decode_blocks(views: Sequence[Packed]) -> list[Block | ValueError]:
    """The same for several views, in one go; in place of a block stands the error of a view that cannot be read."""
    held = [_held(view.values) for view in views]
    # Below some forty values NumPy's fixed cost for each operation is more than that of a loop.
    unpack = _unpack_all if sum(map(len, held)) >= _MANY else _unpack_each
    try:
        event, created, numbers = unpack(views, held)
    except ValueError as error:
        return [error] if len(views) == 1 else [block for view in views for block in decode_blocks([view])]
    blocks: list[Block | ValueError] = []
    end = 0
    for view, kept, matrix in zip(views, held, numbers, strict=True):
        start, end = end, end + len(kept)
        values = matrix if view.places is None else matrix[:, view.places]
        if len(kept) == len(view.values):
            blocks.append(Block(np.ones(len(kept), np.bool_), event[start:end], created[start:end], values))
            continue
        block = empty_block(len(view.values), values.shape[1])
        mask = block.held
        mask[:] = [value is not None for value in view.values]
        block.event_us[mask], block.created_us[mask], block.values[mask] = event[start:end], created[start:end], values
        blocks.append(block)
    return blocks


def _held(values: Sequence[bytes | None]) -> Sequence[bytes]:
    return [value for value in values if value is not None]


def _unpack_each(views: Sequence[Packed], held: Sequence[Sequence[bytes]]) -> tuple[Micros, Micros, list[Floats]]:
    numbers: list[Floats] = []
    for view, packed in zip(views, held, strict=True):
        features, wanted = view.features, view.schema.to_bytes(4, "big")
        head = _head_bytes(features)
        rows: list[tuple[float, ...]] = []
        for value in packed:
            layout = _unpacker(value[HEADER_BYTES:head], features) if len(value) >= head else None
            if layout is None or value[PREFIX_BYTES:HEADER_BYTES] != wanted or len(value) != head + layout.size:
                raise _refusal(value, view.schema, features)
            rows.append(layout.unpack_from(value, head))
        numbers.append(np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * features).reshape(len(rows), features))
    times = np.frombuffer(b"".join([value[:PREFIX_BYTES] for value in chain.from_iterable(held)]), ">u8").astype(np.uint64)
    moments = (times ^ np.uint64(_SHIFT)).view(np.int64).reshape(-1, 2)
    return moments[:, 0], moments[:, 1], numbers


def _unpack_all(views: Sequence[Packed], held: Sequence[Sequence[bytes]]) -> tuple[Micros, Micros, list[Floats]]:
    """The same by columns: each number is read as the eight bytes from its first one on, of which its width says how many count."""
    packed = list(chain.from_iterable(held))
    counts = list(map(len, held))
    widest = max(view.features for view in views)
    # For each value what its view says of it.
    features = np.repeat([view.features for view in views], counts)
    schemas = np.repeat(np.array([view.schema for view in views], ">u4").view("<u4"), counts)
    heads = HEADER_BYTES + (features + 3) // 4
    lengths = np.fromiter(map(len, packed), np.int64, len(packed))
    starts = np.cumsum(lengths) - lengths
    quads = np.arange(HEADER_BYTES, _head_bytes(widest))
    # The last value may be read as if it were longer than it is.
    text = b"".join([*packed, bytes(_head_bytes(widest) + 8)])
    eights = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))  # at every byte
    codes = _QUADS.take(np.frombuffer(text, np.uint8)[starts[:, None] + quads], axis=0).reshape(len(packed), -1)[:, :widest]
    widths = _WIDTHS.take(codes)
    if any(view.features < widest for view in views):
        widths[np.arange(widest) >= features[:, None]] = 0
    ends = np.cumsum(widths, axis=1)
    known = (eights[starts + PREFIX_BYTES] & 0xFFFFFFFF) == schemas
    known &= lengths == heads + (ends[:, -1] if widest else 0)
    if not known.all():
        return _unpack_each(views, held)  # which names the value
    raw = eights.take((starts + heads)[:, None] + ends - widths)
    values = raw.view(np.float64)
    by_number = codes.reshape(-1)
    with np.errstate(invalid="ignore"):  # a float16 may be a signalling NaN
        for code, (bits, kind) in enumerate((("<u1", "<u1"), ("<u2", "<f2"), ("<u4", "<f4"))):
            places = np.flatnonzero(by_number == code)
            if len(places):
                np.put(values, places, raw.take(places).astype(bits).view(kind))
    event, created = [(eights[starts + at].byteswap() ^ np.uint64(_SHIFT)).view(np.int64) for at in (0, 8)]
    parts = np.split(values, np.cumsum(counts)[:-1])
    return event, created, [part[:, : view.features] for view, part in zip(views, parts, strict=True)]


def _refusal(packed: bytes, schema: int, n_features: int) -> ValueError:
    """Why a value cannot be read."""
    if len(packed) < HEADER_BYTES:
        return ValueError(f"an online value of {len(packed)} bytes is shorter than its header: something else wrote this key")
    stored = int.from_bytes(packed[PREFIX_BYTES:HEADER_BYTES], "big")
    if stored != schema:
        return SchemaMismatchError(
            f"the stored value has schema {stored:08x}, the reader expects {schema:08x}: the view's features changed; materialize it again"
        )
    return ValueError(f"an online value of {len(packed)} bytes does not hold {n_features} features")


def _head_bytes(features: int) -> int:
    return HEADER_BYTES + (features + 3) // 4


@lru_cache(maxsize=65_536)
def _unpacker(codes: bytes, features: int) -> struct.Struct:
    """How to read the numbers behind these width codes."""
    return struct.Struct("<" + "".join(_LETTERS[codes[i // 4] >> 2 * (i % 4) & 3] for i in range(features)))


def _narrowest(clean: Floats) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Each value in the narrowest of the four forms that keeps every bit, at the start of its eight bytes; and that form's code."""
    bits = clean.view(np.int64)
    codes = np.full(clean.shape, 3, np.uint8)
    numbers = clean.astype("<f8")
    for code, form in ((2, "<f4"), (1, "<f2"), (0, "u1")):
        # What does not fit shows in the comparison; the cast need not say so too.
        with np.errstate(all="ignore"):
            narrow = clean.astype(form)
        exact = narrow.astype(np.float64).view(np.int64) == bits
        np.copyto(codes, np.uint8(code), where=exact)
        np.copyto(numbers.view(form)[:, :: 8 // narrow.itemsize], narrow, where=exact)
    return numbers, codes


def _heads(schema: int, event_us: Micros, created_us: Micros, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Header and widths of each row, shape (n, head)."""
    rows, features = codes.shape
    head = _head_bytes(features)
    made = np.empty((rows, head), np.uint8)
    made[:, 0:8] = _ordered_bytes(event_us)
    made[:, 8:16] = _ordered_bytes(created_us)
    made[:, 16:20] = np.frombuffer(schema.to_bytes(4, "big"), np.uint8)
    quads = np.zeros((rows, (head - HEADER_BYTES) * 4), np.uint8)
    quads[:, :features] = codes
    made[:, HEADER_BYTES:] = quads[:, 0::4] | quads[:, 1::4] << 2 | quads[:, 2::4] << 4 | quads[:, 3::4] << 6
    return made


def _ordered_bytes(times: Micros) -> npt.NDArray[np.uint8]:
    """int64 of shape (n,) → bytes of shape (n, 8) that compare in the order of the numbers."""
    shifted = times.astype(np.int64).view(np.uint64) ^ np.uint64(_SHIFT)
    return shifted.astype(">u8").view(np.uint8).reshape(-1, 8)


def _escape(name: str) -> str:
    for sign in "%:{}":
        name = name.replace(sign, f"%{ord(sign):02X}")
    return name
