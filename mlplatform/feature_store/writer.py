"""Writing the online store: one server-side step per batch decides row by row what stays.

Belongs here: the compare-and-set script and the fast path from a Polars frame to Redis. Does not belong here: Feast (its
plug-in in `online.py` uses this module), reading.

A value replaces what is stored if its (event time, created) is greater; so a correction (same event time, created
later) wins, a late value never overwrites a newer one, and a replay changes nothing, whatever the number of writers and the
order in which they come. (Event time, created) is the key of a row: two rows of one entity that share both are taken
for the same row and the first one stays, except that a value of another schema gives way to the one being written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from redis import Redis

from mlplatform.feature_store.codec import encode_many, feature_order, join_order, key_prefix, schema_hash
from mlplatform.feature_store.join import as_utc, newest

BATCH = 1_000  # rows per script call: about 0.1 MB, a few milliseconds of the server's time

EXACT_INTEGERS = 2**53  # above this, float64 cannot tell neighbours apart

# Numbers are compared, not strings: Lua's `<` on strings follows the server's locale.
COMPARE_AND_SET = """
local written = 0
for i = 1, #KEYS do
  local old = redis.call('GETRANGE', KEYS[i], 0, 19)
  local new = ARGV[i]
  local write = #old < 20
  if not write then
    local head = string.sub(new, 1, 16)
    if string.sub(old, 1, 16) == head then
      write = string.sub(old, 17, 20) ~= string.sub(new, 17, 20)
    else
      local a, b, c, d = struct.unpack('>I4I4I4I4', head)
      local e, f, g, h = struct.unpack('>I4I4I4I4', old)
      if a ~= e then write = a > e
      elseif b ~= f then write = b > f
      elseif c ~= g then write = c > g
      else write = d > h end
    end
  end
  if write then
    redis.call('SET', KEYS[i], new)
    written = written + 1
  end
end
return written
"""


@dataclass(frozen=True)
class WriteCounts:
    """Rows stored, and rows left out because the same or a newer one was there (or came in the same frame)."""

    written: int
    skipped: int


def write_frame(
    client: Redis,
    project: str,
    view: str,
    join_keys: Sequence[str],
    features: Sequence[str],
    frame: pl.DataFrame,
    *,
    event: str = "event_timestamp",
    created: str | None = "created",
) -> WriteCounts:
    """Writes a view's rows, the newest of each entity, in batches of `BATCH`.

    `frame` has the join keys, `event` and `created` (timestamps; without a zone they are UTC) and the features (numbers or
    booleans, null or NaN = null). `created=None` takes the event time. Join keys and features in any order.
    Raises ValueError for null keys or times and integers float64 cannot hold, TypeError for other types.
    """
    order, packed_order = join_order(join_keys), feature_order(features)
    times = frame.select(as_utc(event, frame.schema).alias("__event"), as_utc(created or event, frame.schema).alias("__created"))
    rows = frame.select(*order, *(_number(view, name, frame) for name in packed_order)).hstack(times)
    holes = [name for name in (*order, "__event", "__created") if rows.get_column(name).has_nulls()]
    if holes:
        raise ValueError(f"view {view}: {', '.join(h.strip('_') for h in holes)} must not be null in rows to be served")
    rows = newest(rows, keys=order, event="__event", created="__created")
    written = write_packed(client, frame_keys(project, view, order, rows), _packed(view, packed_order, rows))
    return WriteCounts(written, frame.height - written)


def write_packed(client: Redis, keys: Sequence[str | bytes], packed: Sequence[bytes]) -> int:
    """Compare-and-set of packed values under their keys. Returns how many were stored."""
    script = client.register_script(COMPARE_AND_SET)
    return sum(int(script(keys=k, args=v)) for k, v in batches(keys, packed))


def batches(keys: Sequence[str | bytes], packed: Sequence[bytes]) -> Iterator[tuple[list[str | bytes], list[bytes]]]:
    """Keys and values of one script call each."""
    for start in range(0, len(keys), BATCH):
        yield list(keys[start : start + BATCH]), list(packed[start : start + BATCH])


def frame_keys(project: str, view: str, order: Sequence[str], rows: pl.DataFrame) -> list[str]:
    """`codec.entity_key` for a whole frame, as text (redis-py sends UTF-8). `order`: the join keys sorted by name."""
    parts: list[pl.Expr] = [pl.lit(key_prefix(project, view).decode())]
    for name in order:
        kind = rows.schema[name]
        if kind.is_integer():
            parts.append(pl.format("i{};", pl.col(name)))
        elif kind in (pl.String, pl.Categorical, pl.Enum):
            text = pl.col(name).cast(pl.String)
            parts.append(pl.format("s{}:{}", text.str.len_bytes(), text))
        else:
            raise TypeError(f"view {view}: join key {name} is {kind}; strings and integers can be keys")
    keys = rows.select(pl.concat_str(parts).alias("key")).get_column("key")
    return list(keys if order else keys.head(rows.height))


def _number(view: str, name: str, frame: pl.DataFrame) -> pl.Series:
    """A feature column as float64, null as NaN."""
    column = frame.get_column(name)
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise TypeError(f"view {view}: feature {name} is {column.dtype}; the online store packs numbers and booleans")
    if column.dtype.is_integer() and not column.cast(pl.Int128).is_between(-EXACT_INTEGERS, EXACT_INTEGERS).all():
        raise ValueError(f"view {view}: feature {name} has integers above 2**53, which float64 cannot hold exactly")
    return column.cast(pl.Float64).fill_null(float("nan"))


def _packed(view: str, features: Sequence[str], rows: pl.DataFrame) -> list[bytes]:
    values = rows.select(features).to_numpy() if features else np.empty((rows.height, 0))
    event, created = (rows.get_column(name).dt.epoch("us").to_numpy() for name in ("__event", "__created"))
    return encode_many(schema_hash(view, features), event, created, np.ascontiguousarray(values, np.float64))
