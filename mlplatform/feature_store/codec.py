"""The byte layout of the online store, shared by the Feast plug-in, the fast writer and the prediction service.

Belongs here: keys, packed values and their order, with NumPy and the standard library only. Does not belong here: any
client, Feast, Polars or pandas: the service imports this on its hot path.

**Key** of one entity of one view: `fs:<project>:<view>:` and then each join value, `s<bytes>:<utf-8>` for a string and
`i<decimal>;` for an integer. `%` and `:` in the two names are percent-escaped. Each part says where it ends, so no two
(project, view, values) share a key, and the integer 1 is not the string "1". Join values stand in the order of the
view's **join keys sorted by name**, whatever order a view or a caller lists them in. (Feast's own serialisation carries
the names in every key and is not used.) A view without entities has no values.

**Value**, 20 + 8·n bytes:

| bytes | content |
|---|---|
| 0-7 | event time, microseconds since 1970 UTC, as unsigned big-endian of (time + 2**63) |
| 8-15 | created time, likewise |
| 16-19 | schema hash, unsigned big-endian |
| 20- | n float64, little-endian, in the order of the feature names sorted; NaN is null (one NaN only: 0x7ff8000000000000) |

The shift by 2**63 makes the first 16 bytes compare, as bytes, in the order of (event time, created), also before 1970.

Features are sorted by name because their declared order does not survive: Feast 0.67 writes the schema of a
StreamFeatureView to its registry from a `set`, in another order each time. `writer.write_frame` and `reader.ViewLayout`
see to the order; who calls `schema_hash`, `encode` and `decode` directly names features and values in `feature_order`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Micros = npt.NDArray[np.int64]
JoinValue = str | int

PREFIX_BYTES = 16  # (event time, created): what decides which of two values stays
HEADER_BYTES = 20

_SHIFT = 1 << 63
_HEADER = struct.Struct(">QQI")
_NAN = np.float64("nan")


class SchemaMismatchError(ValueError):
    """A stored value was packed under another feature list than the reader's: it is refused, never misread."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """One stored value: times in microseconds since 1970 UTC, `values` float64 of shape (n_features,), NaN = null."""

    event_us: int
    created_us: int
    values: Floats


def join_order(join_keys: Sequence[str]) -> tuple[str, ...]:
    """A view's join keys in the order in which their values stand in a key: sorted by name."""
    return tuple(sorted(join_keys))


def feature_order(features: Sequence[str]) -> tuple[str, ...]:
    """A view's features in the order in which their values are packed: sorted by name."""
    return tuple(sorted(features))


def project_prefix(project: str) -> bytes:
    """What the keys of a project begin with, and no other key does."""
    return f"fs:{_escape(project)}:".encode()


@lru_cache(maxsize=4096)
def key_prefix(project: str, view: str) -> bytes:
    """What the keys of all entities of a view begin with, and no other key does."""
    return project_prefix(project) + f"{_escape(view)}:".encode()


def entity_key(project: str, view: str, join_values: Sequence[JoinValue]) -> bytes:
    """The key of one entity. `join_values` in the order of `join_order`. Raises TypeError for anything but str and int."""
    parts = [key_prefix(project, view)]
    for value in join_values:
        if isinstance(value, str):
            text = value.encode()
            parts.append(b"s%d:%b" % (len(text), text))
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            parts.append(b"i%d;" % value)
        else:
            raise TypeError(f"view {view}: a join value must be a string or an integer, not {type(value).__name__} ({value!r})")
    return b"".join(parts)


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
    rows, features = values.shape
    if event_us.shape != (rows,) or created_us.shape != (rows,):
        raise ValueError(f"{rows} rows of values, but times of shape {event_us.shape} and {created_us.shape}")
    width = HEADER_BYTES + 8 * features
    packed = np.empty((rows, width), np.uint8)
    packed[:, 0:8] = _ordered_bytes(event_us)
    packed[:, 8:16] = _ordered_bytes(created_us)
    packed[:, 16:20] = np.frombuffer(schema.to_bytes(4, "big"), np.uint8)
    # One bit pattern for null, so that equal rows are equal bytes whoever packed them.
    clean = np.where(np.isnan(values), _NAN, values).astype("<f8")
    packed[:, 20:] = np.ascontiguousarray(clean).view(np.uint8).reshape(rows, 8 * features)
    flat = packed.tobytes()
    return [flat[start : start + width] for start in range(0, rows * width, width)]


def decode(packed: bytes | None, schema: int, n_features: int) -> Decoded | None:
    """Unpacks one value; None where there is none.

    Raises SchemaMismatchError where it was packed under another schema, ValueError where its length is not of this layout.
    `values` stand in `feature_order` and are read-only: they look into `packed`.
    """
    if packed is None:
        return None
    if len(packed) < HEADER_BYTES:
        raise ValueError(f"an online value of {len(packed)} bytes is shorter than its header: something else wrote this key")
    event, created, stored = _HEADER.unpack_from(packed)
    if stored != schema:
        raise SchemaMismatchError(
            f"the stored value has schema {stored:08x}, the reader expects {schema:08x}: the view's features changed; materialize it again"
        )
    if len(packed) != HEADER_BYTES + 8 * n_features:
        raise ValueError(f"an online value of {len(packed)} bytes does not hold {n_features} features")
    return Decoded(event - _SHIFT, created - _SHIFT, np.frombuffer(packed, "<f8", offset=HEADER_BYTES))


def _ordered_bytes(times: Micros) -> npt.NDArray[np.uint8]:
    """int64 of shape (n,) → bytes of shape (n, 8) that compare in the order of the numbers."""
    shifted = times.astype(np.int64).view(np.uint64) ^ np.uint64(_SHIFT)
    return shifted.astype(">u8").view(np.uint8).reshape(-1, 8)


def _escape(name: str) -> str:
    return name.replace("%", "%25").replace(":", "%3A")
