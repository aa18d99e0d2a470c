"""The exact content hash of a frame: the same on every machine, whatever the row order or the library version.

Belongs here: the definition of the hash. Does not belong here: knowing what a frame is for.

Definition (version 1). Each row becomes a fixed-width byte string, column by column in the frame's order: one byte that is
1 where the value is null, then the value — little-endian int64 for integers, booleans, dates (days since 1970) and
timestamps (microseconds since 1970, UTC); IEEE 754 binary64 for floats, with -0.0 as 0.0 and every NaN as one NaN;
BLAKE2b-128 of the UTF-8 bytes for strings; zeros for null. A row's digest is the BLAKE2b-128 of that string. The hash is the
SHA-256 of the header (a JSON list of [column name, kind]), the row count, and the sorted row digests, so it does not depend
on row order but does on every cell, column name, column order, and on how often a row occurs. Widths (Int32 or Int64) are
not part of it: storage may change them.
"""

import hashlib
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

_VERSION: Final = "mlplatform-frame-1"
_CHUNK_ROWS: Final = 20_000  # bounds the memory of the row bytes: 20,000 rows of 65 columns take 12 MB
_NAN: Final = np.float64(np.nan)


def content_hash(frame: pl.DataFrame) -> str:
    """SHA-256 (64 hexadecimal digits) of `frame` as the module defines it.

    Raises TypeError for a column of a type the definition does not cover (lists, structs, decimals).
    """
    header = [[name, _kind(name, dtype)] for name, dtype in frame.schema.items()]
    digests: list[bytes] = []
    for start in range(0, frame.height, _CHUNK_ROWS):
        digests.extend(_row_digests(frame.slice(start, _CHUNK_ROWS)))
    digests.sort()
    whole = hashlib.sha256(f"{_VERSION}\n{json.dumps(header)}\n{frame.height}\n".encode())
    whole.update(b"".join(digests))
    return whole.hexdigest()


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
    raise TypeError(f"column '{name}' has type {dtype}, which the content hash does not cover")


def _row_digests(rows: pl.DataFrame) -> list[bytes]:
    cells: list[npt.NDArray[np.uint8]] = []
    for column in rows.iter_columns():
        nulls = column.is_null().to_numpy()
        values = _cells(column)
        values[nulls] = 0
        cells += [nulls.astype(np.uint8).reshape(-1, 1), values]
    if not cells:
        return [b""] * rows.height
    block = np.ascontiguousarray(np.hstack(cells))
    width = block.shape[1]
    data = memoryview(block.tobytes())
    return [hashlib.blake2b(data[i : i + width], digest_size=16).digest() for i in range(0, len(data), width)]


def _cells(column: pl.Series) -> npt.NDArray[np.uint8]:
    """The column's values as bytes, shape (rows, 8), or (rows, 16) for strings. Nulls hold anything."""
    kind = _kind(column.name, column.dtype)
    if kind == "string":
        return _string_cells(column.cast(pl.String))
    if kind == "float":
        floats = column.cast(pl.Float64).fill_null(0.0).to_numpy().astype("<f8")
        floats[floats == 0.0] = 0.0
        floats[np.isnan(floats)] = _NAN
        return _bytes(floats)
    if column.dtype == pl.UInt64:
        return _bytes(column.fill_null(0).to_numpy().astype("<u8"))
    if isinstance(column.dtype, pl.Datetime):
        column = column.dt.cast_time_unit("us")
    elif kind == "date":
        column = column.cast(pl.Int32)
    return _bytes(column.cast(pl.Int64).fill_null(0).to_numpy().astype("<i8"))


def _string_cells(column: pl.Series) -> npt.NDArray[np.uint8]:
    # Each distinct text is hashed once; ids lead the rows to their digest.
    ids = column.fill_null("").rank("dense").cast(pl.Int64).to_numpy() - 1
    texts = column.fill_null("").unique().sort().to_list()
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    table = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
    return np.array(table[ids])


def _bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8).copy()
