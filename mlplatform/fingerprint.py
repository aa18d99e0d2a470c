"""The exact fingerprint of a table's content: the same on every machine, in any order of rows, and it can be added up.

Belongs here: the definition, its computing over frames, sums of fingerprints, and how a commit notes them. Does not belong here:
what follows from a table's commits (`clients.fingerprints`), what a table is for.

Definition (version 2). A table is a set of named columns and a multiset of rows. Numbers are unsigned and modulo 2^64.

- *Cell.* Two words w0, w1. For integers, booleans, dates (days since 1970) and timestamps (microseconds since 1970 UTC)
  both are the value in two's complement; for floats the bits of the IEEE 754 binary64, every one of them: -0.0 is not 0.0,
  and NaNs differ as their bits do, because Parquet, Arrow and the online codec keep those bits too. For texts they are two
  64-bit hashes of the UTF-8 bytes: s = length · G, then s = mix(s xor word) for each word of 8 bytes (little-endian, the
  last filled up with zeros); for more than 256 bytes the two halves of their BLAKE2b-128.
- *Row.* Each column has two keys, the halves of the BLAKE2b-128 of the JSON [name, kind]. Lane i of a row is
  mix_i(G + the sum over its columns of mix_i(w_i xor key_i)). A null adds nothing: it is the absence of a cell.
- *Table.* The lanes of all rows are added up, lane by lane: an incremental multiset hash, MSet-Add-Hash of Clarke, Devadas,
  van Dijk, Gassend and Suh, "Incremental Multiset Hash Functions and Their Application to Memory Integrity Checking"
  (ASIACRYPT 2003), over the group (Z/2^64)^2. So the sums of two tables give the sum of both together.
- *Hash.* The SHA-256 of the version, the sorted [name, kind] list, the number of rows and the two sums.

mix_0 is Stafford's variant 13 as in SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014), mix_1 the finalizer of MurmurHash3 (Appleby 2011). Both are bijections, G is their usual increment 2^64/φ.

What follows. One changed bit of one cell changes both lanes with certainty (every step is a bijection in it; in a text of at
most 256 bytes too), and a number that becomes null, or the reverse, at least one of them (the two keys differ). Whatever
else happens by accident goes unseen with a probability near 2^-128. Names, kinds and how often a row occurs count. The order
of rows does not; nor does the order of columns, which are addressed by name everywhere (where their order matters, as in a
model's matrix, the manifest records it); nor widths (Int32 or Int64, Float32 or Float64), dictionaries and time zones, which
are ways to write the same value. A column of nulls added to old rows leaves their sums as they were, so that a table whose
schema grows keeps its running sum.

What it is not: a protection against an adversary. The mixes have no secret key and can be inverted; who chooses rows to
collide can find them. For that, sign the files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

Words = npt.NDArray[np.uint64]

VERSION: Final = "mlplatform-table-2"
COMMIT_KEY: Final = "mlplatform.fingerprint"  # in the metadata of a commit
_CHUNK_ROWS: Final = 32_768  # a column's words take 256 kB: what is computed on them stays in the cache
_LONG_BYTES: Final = 256  # beyond, one call of BLAKE2b costs less than a step of NumPy for each 8 bytes
_WORD: Final = 2**64
_G: Final = 0x9E3779B97F4A7C15
# (shift, multiplier, shift, multiplier, shift) of the two mixes.
_MIXES: Final = (
    (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31),
    (33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33),
)
_LANES: Final = range(len(_MIXES))


@dataclass(frozen=True)
class Fingerprint:
    """Columns (name → kind), number of rows and the two sums of a table, or of a part of it. Parts add up: `a + b`."""

    columns: Mapping[str, str]
    rows: int
    sums: tuple[int, int]

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        """The fingerprint of the rows of both. Raises ValueError where a column has two kinds."""
        if clash := sorted(name for name, kind in self.columns.items() if other.columns.get(name, kind) != kind):
            raise ValueError(f"columns {clash} are of another kind in the other part: these are no parts of one table")
        low, high = ((a + b) % _WORD for a, b in zip(self.sums, other.sums, strict=True))
        return Fingerprint({**self.columns, **other.columns}, self.rows + other.rows, (low, high))

    @property
    def hash(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        header = json.dumps(sorted(self.columns.items()))
        return hashlib.sha256(f"{VERSION}\n{header}\n{self.rows}\n{self.sums[0]:016x}{self.sums[1]:016x}".encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        low, high = self.sums
        return {
            "version": VERSION,
            "columns": dict(sorted(self.columns.items())),
            "rows": self.rows,
            "sums": [f"{low:016x}", f"{high:016x}"],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Fingerprint | None":
        """What `to_json` gave; None for one of another version of the definition, which says nothing about this one."""
        if raw.get("version") != VERSION:
            return None
        low, high = (int(word, 16) for word in raw["sums"])
        return cls(dict(raw["columns"]), int(raw["rows"]), (low, high))


@dataclass(frozen=True)
class Mark:
    """What an appending commit notes of content: `rows` of its own rows, and where its writer knows it, `table` of the whole that
    had version `after` before it (-1: there was none)."""

    rows: Fingerprint
    table: Fingerprint | None = None
    after: int = -1

    def metadata(self) -> dict[str, str]:
        """For the commit."""
        whole = {} if self.table is None else {"table": self.table.to_json(), "after": self.after}
        return {COMMIT_KEY: json.dumps({"rows": self.rows.to_json(), **whole})}

    @classmethod
    def parse(cls, text: str) -> "Mark | None":
        """What `metadata` gave; None for one of another version of the definition."""
        raw = json.loads(text)
        rows = Fingerprint.from_json(raw["rows"])
        if rows is None or "table" not in raw:
            return None if rows is None else cls(rows)
        table = Fingerprint.from_json(raw["table"])
        return None if table is None else cls(rows, table, int(raw["after"]))


def fingerprint(frame: pl.DataFrame, threads: int | None = None) -> Fingerprint:
    """The fingerprint of `frame` as the module defines it, in chunks on `threads` threads (all cores unless said).

    Raises TypeError for a column of a type the definition does not cover (lists, structs, decimals, binary), ValueError for
    what 64 bits do not hold exactly: integers beyond int64, fractions of a microsecond.
    """
    columns = {name: _kind(name, dtype) for name, dtype in frame.schema.items()}
    keys = {name: _keys(name, kind) for name, kind in columns.items()}
    chunks = list(frame.iter_slices(_CHUNK_ROWS)) if frame.height else []
    workers = min(threads or os.cpu_count() or 1, len(chunks))
    if workers > 1:
        # NumPy and Polars compute outside the interpreter's lock.
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda chunk: _sums(chunk, columns, keys), chunks))
    else:
        parts = [_sums(chunk, columns, keys) for chunk in chunks]
    low, high = (sum(part[i] for part in parts) % _WORD for i in _LANES)
    return Fingerprint(columns, frame.height, (low, high))


def total(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of all parts together."""
    found = Fingerprint({}, 0, (0, 0))
    for part in parts:
        found += part
    return found


def content_hash(frame: pl.DataFrame) -> str:
    """SHA-256 (64 hexadecimal digits) of `frame`, see `fingerprint`."""
    return fingerprint(frame).hash


def definition_hash(sources: tuple[str, ...]) -> str:
    """SHA-256 over pieces of source code, in any order, each counted once per occurrence."""
    digests = sorted(hashlib.sha256(text.encode()).hexdigest() for text in sources)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _kind(name: str, dtype: pl.DataType) -> str:
    if dtype.is_integer():
        return "int"
    if dtype.is_float():
        return "float"
    if isinstance(dtype, pl.Datetime):
        return "timestamp" if dtype.time_zone else "local_timestamp"
    if isinstance(dtype, pl.String | pl.Categorical | pl.Enum):
        return "string"
    if isinstance(dtype, pl.Boolean):
        return "bool"
    if isinstance(dtype, pl.Date):
        return "date"
    raise TypeError(f"column '{name}' has type {dtype}, which the fingerprint does not cover")


def _keys(name: str, kind: str) -> tuple[int, int]:
    return _halves(json.dumps([name, kind]).encode())


def _halves(data: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _sums(rows: pl.DataFrame, columns: Mapping[str, str], keys: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    low, high = (int(lane.sum(dtype=np.uint64)) for lane in _lanes(rows, columns, keys))
    return low, high


def _lanes(rows: pl.DataFrame, columns: Mapping[str, str], keys: Mapping[str, tuple[int, int]]) -> list[Words]:
    """The two lanes of every row, shape (n,)."""
    lanes = [np.full(rows.height, _G, dtype=np.uint64) for _ in _LANES]
    scratch = np.empty(rows.height, dtype=np.uint64)
    for column in rows.iter_columns():
        nulls = column.is_null().to_numpy() if column.null_count() else None
        for i, words in enumerate(_words(column, columns[column.name])):
            cells = np.bitwise_xor(words, np.uint64(keys[column.name][i]))
            _mix(cells, i, scratch)
            if nulls is not None:
                cells[nulls] = 0
            lanes[i] += cells
    for i, lane in enumerate(lanes):
        _mix(lane, i, scratch)
    return lanes


def _mix(words: Words, lane: int, scratch: Words) -> None:
    """Mixes `words` in place; `scratch` is of the same length and holds nothing of worth."""
    first, multiply, second, again, last = _MIXES[lane]
    for shift, factor in ((first, multiply), (second, again)):
        np.right_shift(words, np.uint64(shift), out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        np.multiply(words, np.uint64(factor), out=words)
    np.right_shift(words, np.uint64(last), out=scratch)
    np.bitwise_xor(words, scratch, out=words)


def _words(column: pl.Series, kind: str) -> tuple[Words, Words]:
    """The column's values as two arrays of words, which must not be written to. Nulls hold anything."""
    if kind == "string":
        return _text_words(column.cast(pl.String))
    values = (column.cast(pl.Float64) if kind == "float" else _whole(column)).fill_null(0).to_numpy()
    # The same number on every machine: a view of eight bytes as an integer follows the machine's own order of bytes.
    words = np.ascontiguousarray(values).view(np.uint64)
    return words, words


def _whole(column: pl.Series) -> pl.Series:
    """Int64 of integers, booleans, dates and timestamps."""
    if isinstance(column.dtype, pl.Datetime):
        exact = column.dt.cast_time_unit("us")
        if column.dtype.time_unit == "ns" and not exact.dt.cast_time_unit("ns").equals(column, null_equal=True):
            raise ValueError(f"column '{column.name}' has fractions of a microsecond, which no table of the platform keeps")
        column = exact
    elif isinstance(column.dtype, pl.Date):
        column = column.cast(pl.Int32)
    try:
        return column.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError as beyond:
        raise ValueError(f"column '{column.name}' has integers beyond int64, which no table of the platform keeps") from beyond


def _text_words(column: pl.Series) -> tuple[Words, Words]:
    """Two 64-bit hashes of each text's UTF-8 bytes, eight bytes of all texts at a time."""
    array = column.to_arrow()  # large_string: 64-bit offsets into one run of bytes
    _, offsets_buffer, bytes_buffer = array.buffers()
    ends = np.frombuffer(offsets_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    first, size = int(ends[0]), int(ends[-1] - ends[0])
    # Two words more than the bytes fill: every word can be read from two aligned ones.
    run = np.zeros(size // 8 + 3, dtype="<u8")
    if size:
        run.view(np.uint8)[:size] = np.frombuffer(bytes_buffer, dtype=np.uint8)[first : first + size]
    starts, lengths = ends[:-1] - first, np.diff(ends)
    lanes = tuple(lengths.astype(np.uint64) * np.uint64(_G) for _ in _LANES)
    counts = np.where(lengths > _LONG_BYTES, 0, (lengths + 7) // 8)
    for k in range(int(counts.max(initial=0))):
        at = np.flatnonzero(counts > k)
        words = _read(run, starts[at] + 8 * k, lengths[at] - 8 * k)
        scratch = np.empty(len(at), dtype=np.uint64)
        for i in _LANES:
            state = lanes[i][at] ^ words
            _mix(state, i, scratch)
            lanes[i][at] = state
    if len(long := np.flatnonzero(lengths > _LONG_BYTES)):
        view = run.data.cast("B")
        spans = zip(starts[long].tolist(), (starts + lengths)[long].tolist(), strict=True)
        digests = b"".join(hashlib.blake2b(view[start:end], digest_size=16).digest() for start, end in spans)
        for lane, halves in zip(lanes, np.frombuffer(digests, dtype="<u8").reshape(-1, 2).T, strict=True):
            lane[long] = halves
    return lanes[0], lanes[1]


def _read(run: npt.NDArray[Any], at: npt.NDArray[np.int64], left: npt.NDArray[np.int64]) -> Words:
    """The little-endian word at byte `at` of `run`, its bytes beyond the `left` first ones zero. Shapes (n,)."""
    index, shift = at >> 3, ((at & 7) << 3).astype(np.uint64)
    # Shifting by 64 is not defined: by one, then by the rest.
    words = (run[index] >> shift) | ((run[index + 1] << np.uint64(1)) << (np.uint64(63) - shift))
    unused = np.uint64(8) * (np.uint64(8) - np.minimum(left, 8).astype(np.uint64))
    return np.asarray(words & (np.uint64(_WORD - 1) >> unused), dtype=np.uint64)
