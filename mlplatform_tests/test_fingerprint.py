"""The fingerprint: order-free over rows and columns, sensitive to every bit, a sum of its parts, and fixed for ever."""

import hashlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from deltalake import write_deltalake
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlplatform import fingerprint as module
from mlplatform.fingerprint import Fingerprint, content_hash, definition_hash, fingerprint, total

SCHEMA = {"s": pl.String, "i": pl.Int64, "f": pl.Float64, "b": pl.Boolean, "t": pl.Datetime("us", "UTC"), "d": pl.Date}
INT64 = st.integers(-(2**63), 2**63 - 1)
# Texts around every border of the definition: a word of 8 bytes, and 256 bytes.
TEXT = st.one_of(st.text(max_size=9), st.text(alphabet="aé", min_size=14, max_size=17), st.sampled_from(["x" * n for n in (255, 256, 257)]))
FLOAT = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
MOMENT = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)).map(lambda t: t.replace(tzinfo=UTC))  # noqa: DTZ001  # Hypothesis takes none
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "s": TEXT,
    "i": INT64,
    "f": st.one_of(FLOAT, st.sampled_from([0.0, -0.0, 1.0])),
    "b": st.booleans(),
    "t": MOMENT,
    "d": st.dates(date(1900, 1, 1), date(2200, 1, 1)),
}
ROWS = st.lists(st.tuples(*(st.one_of(st.none(), cell) for cell in CELLS.values())), min_size=1, max_size=8)
Row = tuple[Any, ...]


def frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(
        {name: pl.Series([row[c] for row in rows], dtype=dtype) for c, (name, dtype) in enumerate(SCHEMA.items())},
    )


# --- the definition, a second time: plain integers, one cell at a time ----------------------------------------------------

WORD = 2**64
G = 0x9E3779B97F4A7C15


def mix(word: int, lane: int) -> int:
    a, m, b, n, c = ((30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31), (33, 0xFF51AFD7ED558CCD, 33, 0xC4CEB9FE1A85EC53, 33))[lane]
    word = (word ^ (word >> a)) * m % WORD
    word = (word ^ (word >> b)) * n % WORD
    return word ^ (word >> c)


def halves(data: bytes) -> tuple[int, int]:
    low, high = struct.unpack("<QQ", hashlib.blake2b(data, digest_size=16).digest())
    return low, high


def cell_words(kind: str, value: Any) -> tuple[int, int]:
    if kind == "string":
        data = value.encode()
        if len(data) > 256:
            return halves(data)
        padded = data + bytes(-len(data) % 8)
        state = [len(data) * G % WORD] * 2
        for (word,) in struct.iter_unpack("<Q", padded):
            state = [mix(s ^ word, lane) for lane, s in enumerate(state)]
        return state[0], state[1]
    if kind == "float":
        word = struct.unpack("<Q", struct.pack("<d", value))[0]
    elif kind == "date":
        word = (value - date(1970, 1, 1)).days % WORD
    elif kind == "timestamp":
        since = value - datetime(1970, 1, 1, tzinfo=UTC)
        word = ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) % WORD
    else:
        word = int(value) % WORD
    return word, word


KINDS = {"s": "string", "i": "int", "f": "float", "b": "bool", "t": "timestamp", "d": "date"}


def by_definition(rows: list[Row]) -> str:
    sums = [0, 0]
    for row in rows:
        for lane in (0, 1):
            inside = G
            for (name, kind), value in zip(KINDS.items(), row, strict=True):
                if value is not None:
                    key = halves(json.dumps([name, kind]).encode())[lane]
                    inside += mix(cell_words(kind, value)[lane] ^ key, lane)
            sums[lane] = (sums[lane] + mix(inside % WORD, lane)) % WORD
    header = json.dumps(sorted([name, kind] for name, kind in KINDS.items()))
    text = f"mlplatform-table-2\n{header}\n{len(rows)}\n{sums[0]:016x}{sums[1]:016x}"
    return hashlib.sha256(text.encode()).hexdigest()


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_the_fast_way_gives_what_the_definition_says(rows: list[Row]) -> None:
    assert content_hash(frame(rows)) == by_definition(rows)


def test_the_hash_of_a_known_frame_never_changes() -> None:
    known = pl.DataFrame(
        {
            "name": ["a", None, "ü" * 200],
            "n": [1, -2, None],
            "x": [0.5, None, float("inf")],
            "ok": [True, None, False],
            "day": [date(2013, 1, 1), None, date(1969, 12, 31)],
            "at": [datetime(2013, 1, 1, 5, tzinfo=UTC), None, datetime(1969, 12, 31, tzinfo=UTC)],
        }
    )
    assert content_hash(known) == "9d8fe3b81e62a7b419bbd340c96055ffb98118a8288e84d37de61bdd42addfae"
    assert content_hash(pl.DataFrame()) == "2fc55a7a0286ee44bc76ee623cbb28ece9daefbe932f734a6430bfffc4054805"


# --- every bit counts -----------------------------------------------------------------------------------------------------


def flipped(kind: str, value: Any, bit: int) -> Any:
    """`value` with one bit of what is stored for it turned over; for a text, one bit of one of its characters."""
    if kind == "string":
        place = bit % len(value)
        return value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
    if kind == "float":
        return struct.unpack("<d", struct.pack("<Q", struct.unpack("<Q", struct.pack("<d", value))[0] ^ (1 << bit % 64)))[0]
    if kind == "int":
        return struct.unpack("<q", struct.pack("<Q", (value % WORD) ^ (1 << bit % 64)))[0]
    if kind == "bool":
        return not value
    if kind == "date":
        return date.fromordinal(value.toordinal() ^ (1 << bit % 16))
    epoch, microsecond = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
    return epoch + (((value - epoch) // microsecond) ^ (1 << bit % 40)) * microsecond


@settings(max_examples=400, deadline=None)
@given(ROWS, st.data())
def test_flipping_any_bit_of_any_value_changes_both_sums(rows: list[Row], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(rows) - 1))
    column, name = data.draw(st.sampled_from(list(enumerate(SCHEMA))))
    assume(rows[row][column] not in (None, ""))
    value = flipped(KINDS[name], rows[row][column], data.draw(st.integers(0, 255)))
    changed = [tuple(value if (r, c) == (row, column) else cell for c, cell in enumerate(cells)) for r, cells in enumerate(rows)]
    before, after = fingerprint(frame(rows)), fingerprint(frame(changed))
    assert before.hash != after.hash
    assert all(a != b for a, b in zip(before.sums, after.sums, strict=True))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.data())
def test_a_value_that_becomes_null_changes_the_hash(rows: list[Row], data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(SCHEMA) - 1))
    assume(rows[row][column] is not None)
    changed = [tuple(None if (r, c) == (row, column) else cell for c, cell in enumerate(cells)) for r, cells in enumerate(rows)]
    assert content_hash(frame(changed)) != content_hash(frame(rows))


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_dropping_or_repeating_a_row_changes_the_hash(rows: list[Row]) -> None:
    whole = content_hash(frame(rows))
    assert content_hash(frame(rows[1:])) != whole
    assert content_hash(frame([*rows, rows[0]])) != whole


NULL_LIKE: list[Callable[[], pl.Series]] = [
    lambda: pl.Series("x", [None], dtype=pl.Float64),
    lambda: pl.Series("x", [float("nan")]),
    lambda: pl.Series("x", [-float("nan")]),
    lambda: pl.Series("x", [0.0]),
    lambda: pl.Series("x", [-0.0]),
    lambda: pl.Series("x", [0]),
    lambda: pl.Series("x", [False]),
    lambda: pl.Series("x", [""]),
    lambda: pl.Series("x", ["\0"]),
    lambda: pl.Series("x", [date(1970, 1, 1)]),
    lambda: pl.Series("x", [datetime(1970, 1, 1, tzinfo=UTC)]),
    lambda: pl.Series("x", [datetime(1970, 1, 1)]),  # noqa: DTZ001  # a local time is meant
    lambda: pl.Series("y", [0.0]),
]


def test_all_that_looks_like_nothing_is_told_apart_and_so_are_names_and_kinds() -> None:
    assert len({content_hash(make().to_frame()) for make in NULL_LIKE}) == len(NULL_LIKE)


def test_exchanging_values_changes_the_hash() -> None:
    table = pl.DataFrame({"a": [1, 2], "b": [3, 4]})
    between_rows = pl.DataFrame({"a": [2, 1], "b": [3, 4]})
    between_columns = table.rename({"a": "b", "b": "a"})
    assert len({content_hash(t) for t in (table, between_rows, between_columns)}) == 3


def test_rows_of_small_numbers_collide_no_more_often_than_chance() -> None:
    """A grid of rows as alike as rows can be: of the halves of their lanes, 32 bits each, about n²/2³³ pairs agree."""
    side = 512
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(side), np.arange(side)))
    for column in (pl.Series("b", b), pl.Series("b", b / 8), pl.Series("b", b.astype(str))):
        for lane in lanes(pl.DataFrame({"a": a, "b": column})):
            for bits in (lane & np.uint64(2**32 - 1), lane >> np.uint64(32)):
                # Poisson with mean 8: 26 and more has a probability below 1e-6.
                assert len(bits) - len(np.unique(bits)) < 26


def lanes(rows: pl.DataFrame) -> list[Any]:
    """The two lanes of each row: the sums of a table of that row alone, for all of them at once."""
    columns = {name: module._kind(name, dtype) for name, dtype in rows.schema.items()}
    found = module._lanes(rows, columns, {name: module._keys(name, kind) for name, kind in columns.items()})
    assert fingerprint(rows[:1]).sums == (found[0][0], found[1][0])
    return found


# --- what does not count --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms())
def test_the_order_of_rows_and_of_columns_does_not_matter(rows: list[Row], random: Any) -> None:
    shuffled, names = list(rows), list(SCHEMA)
    random.shuffle(shuffled)
    random.shuffle(names)
    assert content_hash(frame(shuffled).select(names)) == content_hash(frame(rows))


def test_the_storage_width_chunks_and_dictionaries_do_not_matter() -> None:
    table = pl.DataFrame({"n": [1, 2, None], "x": [0.5, None, 1.5], "s": ["a", None, "b"]})
    stored = table.with_columns(
        pl.col("n").cast(pl.Int16),
        pl.col("x").cast(pl.Float32),
        pl.col("s").cast(pl.Categorical),
    )
    assert content_hash(stored) == content_hash(table)
    assert content_hash(table.with_columns(pl.col("s").cast(pl.Enum(["a", "b"])), pl.col("n").cast(pl.UInt64))) == content_hash(table)
    assert content_hash(pl.concat([table[:1], table[1:]], rechunk=False)) == content_hash(table)


def test_a_zone_and_a_unit_are_only_ways_to_write_an_instant() -> None:
    at = pl.DataFrame({"t": [datetime(2013, 7, 1, 12, tzinfo=UTC)]})
    for same in (
        pl.col("t").dt.convert_time_zone("America/New_York"),
        pl.col("t").dt.cast_time_unit("ns"),
        pl.col("t").dt.cast_time_unit("ms"),
    ):
        assert content_hash(at.with_columns(same)) == content_hash(at)


def test_slices_in_the_middle_of_a_frame_hash_as_their_rows_do() -> None:
    table = pl.DataFrame({"s": [f"text number {i}" * (i % 40) if i % 7 else None for i in range(400)], "x": [i / 3 for i in range(400)]})
    assert content_hash(table[150:270]) == content_hash(pl.DataFrame(table[150:270].to_dict(as_series=False)))


def test_threads_change_nothing() -> None:
    table = pl.DataFrame({"i": range(60_000), "s": [f"f{i}" for i in range(60_000)]})
    assert fingerprint(table, threads=1) == fingerprint(table, threads=4)


def test_a_delta_table_keeps_every_bit_that_counts(tmp_path: Path) -> None:
    """Why -0.0 and the bits of a NaN may count: what is written is what is read, though dictionaries and statistics are made."""
    rng = np.random.default_rng(0)
    special = np.array([0, 1 << 63, 0x7FF8 << 48, 0xFFF8 << 48, (0x7FF8 << 48) + 7, (0x7FF0 << 48) + 1, 1, 0x3FF0 << 48], dtype=np.uint64)
    table = pl.DataFrame({"x": rng.choice(special, 5000).view(np.float64), "i": rng.integers(0, 9, 5000), "s": ["ü", None] * 2500})
    write_deltalake(str(tmp_path), table.to_arrow(), partition_by=["i"])
    assert content_hash(pl.read_delta(str(tmp_path))) == content_hash(table)


# --- sums of parts --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 8))
def test_the_parts_of_a_table_add_up_to_it(rows: list[Row], cut: int) -> None:
    table = frame(rows)
    assert fingerprint(table[:cut]) + fingerprint(table[cut:]) == fingerprint(table)
    assert total([fingerprint(table[i : i + 1]) for i in range(table.height)]) == fingerprint(table)


def test_a_column_that_old_rows_lack_leaves_their_sums_as_they_were() -> None:
    old, new = pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [3], "b": [0.5]})
    whole = pl.concat([old, new], how="diagonal")
    assert fingerprint(old) + fingerprint(new) == fingerprint(whole)
    assert content_hash(old.with_columns(pl.lit(None, pl.Float64).alias("b"))) != content_hash(old)


def test_parts_of_two_kinds_are_no_table() -> None:
    with pytest.raises(ValueError, match="'a'"):
        fingerprint(pl.DataFrame({"a": [1]})) + fingerprint(pl.DataFrame({"a": ["1"]}))


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_what_is_recorded_comes_back(rows: list[Row]) -> None:
    found = fingerprint(frame(rows))
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_record_of_another_definition_says_nothing() -> None:
    assert Fingerprint.from_json(fingerprint(pl.DataFrame({"a": [1]})).to_json() | {"version": "mlplatform-frame-1"}) is None


# --- what it does not cover -----------------------------------------------------------------------------------------------


def test_a_column_of_lists_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'parts'"):
        content_hash(pl.DataFrame({"parts": [[1, 2]]}))


def test_what_64_bits_do_not_hold_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'n' has integers beyond int64"):
        content_hash(pl.DataFrame({"n": pl.Series([2**64 - 1], dtype=pl.UInt64)}))
    with pytest.raises(ValueError, match="'t' has fractions of a microsecond"):
        content_hash(pl.DataFrame({"t": pl.Series([1, None], dtype=pl.Datetime("ns", "UTC"))}))


def test_the_definition_hash_ignores_order_but_not_content() -> None:
    assert definition_hash(("a", "b")) == definition_hash(("b", "a")) != definition_hash(("a", "c"))
    assert definition_hash(("ab",)) != definition_hash(("a", "b"))
