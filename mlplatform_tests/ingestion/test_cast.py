"""Casting to the contract: what counts as the right type, and what is told about what does not."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.addresses import without_password
from mlplatform.ingestion.cast import cast_frame, cast_records, schema_of
from mlplatform.ingestion.errors import SourceNonsenseError, missing_column, shown, wrong_value
from mlplatform.specs import Column, Contract, DType


def only(dtype: DType, nullable: bool = True) -> Contract:
    return Contract(columns=(Column(name="c", dtype=dtype, nullable=nullable),), key=("c",))


def typed(values: list[Any], dtype: DType, given_type: Any = None) -> list[Any]:
    return cast_frame(pl.DataFrame({"c": pl.Series(values, dtype=given_type)}), only(dtype), "source")["c"].to_list()


def text(values: list[str | None], dtype: DType) -> list[Any]:
    frame = pl.DataFrame({"c": pl.Series(values, dtype=pl.String)})
    return cast_frame(frame, only(dtype), "source", text=True)["c"].to_list()


START = datetime(2013, 9, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2013-09-01T00:00:00Z", START),
        ("2013-09-01T00:00:00.000001Z", START + timedelta(microseconds=1)),
        ("2013-09-01T00:00:00.1234567Z", START + timedelta(microseconds=123456)),
        ("2013-09-01 02:00:00+02:00", START),
        ("2013-08-31T20:00:00-0400", START),
        ("2013-09-01T00:00:00", START),
        ("2013-09-01 00:00:00.5", START + timedelta(seconds=0.5)),
        ("2013-09-01T00:00Z", START),
        ("2013-09-01", START),
        ("20130901T000000Z", START),
        ("1969-12-31T23:59:59.999999Z", datetime(1970, 1, 1, tzinfo=UTC) - timedelta(microseconds=1)),
    ],
)
def test_iso_8601_in_its_forms_is_read_as_utc(written: str, moment: datetime) -> None:
    assert typed([written], "timestamp") == [moment]
    assert typed([None, "2013-09-01T00:00:00Z", written], "timestamp") == [None, START, moment]


@pytest.mark.parametrize(
    "written",
    ["", "soon", "2013-13-01T00:00:00Z", "2013-09-01T25:00:00Z", "1378000000", "2013-09-01T00:00:00Zjunk", "0001-01-01T00:00:00+05:00"],
)
def test_what_is_no_time_is_named(written: str) -> None:
    with pytest.raises(SourceNonsenseError, match="'c' should be timestamp, but 1 of 2"):
        typed(["2013-09-01T00:00:00Z", written], "timestamp")


@settings(deadline=None)
@given(st.datetimes(), st.integers(-14 * 60, 14 * 60))
def test_every_time_python_can_write_is_read_back_exactly(naive: datetime, offset_min: int) -> None:
    moment = naive.replace(year=min(9000, max(2, naive.year)), tzinfo=timezone(timedelta(minutes=offset_min)))
    assert typed([moment.isoformat()], "timestamp") == [moment]


@pytest.mark.parametrize(
    ("values", "given_type", "dtype", "expected"),
    [
        ([1, None], pl.UInt8, "int", [1, None]),
        ([1.0, None, -3.0], pl.Float64, "int", [1, None, -3]),
        ([Decimal("4.00")], pl.Decimal(9, 2), "int", [4]),
        ([Decimal("4.25")], pl.Decimal(9, 2), "float", [4.25]),
        ([1, 2], pl.Int16, "float", [1.0, 2.0]),
        ([1.5, float("nan")], pl.Float32, "float", [1.5, None]),
        ([1, 0, None], pl.Int8, "bool", [True, False, None]),
        ([START.replace(tzinfo=None)], pl.Datetime("ns"), "date", [START.date()]),
        ([START.date()], pl.Date, "timestamp", [START]),
        ([START.replace(tzinfo=None)], pl.Datetime("ms"), "timestamp", [START]),
        ([START], pl.Datetime("us", "America/New_York"), "timestamp", [START]),
        (["a", None], pl.Categorical, "string", ["a", None]),
        ([None, None], pl.Null, "date", [None, None]),
    ],
)
def test_types_that_hold_the_same_value_fit(values: list[Any], given_type: Any, dtype: DType, expected: list[Any]) -> None:
    assert typed(values, dtype, given_type) == expected


@pytest.mark.parametrize(
    ("values", "given_type", "dtype"),
    [
        ([1.5], pl.Float64, "int"),
        ([2.0**63], pl.Float64, "int"),
        ([2**63], pl.UInt64, "int"),
        ([float("inf")], pl.Float64, "int"),
        ([True], pl.Boolean, "int"),
        (["1"], pl.String, "int"),
        (["1.5"], pl.String, "float"),
        ([True], pl.Boolean, "float"),
        ([2], pl.Int64, "bool"),
        (["true"], pl.String, "bool"),
        ([1], pl.Int64, "string"),
        ([b"a"], pl.Binary, "string"),
        ([START.replace(hour=1, tzinfo=None)], pl.Datetime("us"), "date"),
        (["2013-9-1x"], pl.String, "date"),
        ([20130901], pl.Int64, "date"),
        ([1378000000], pl.Int64, "timestamp"),
        ([[1]], pl.List(pl.Int64), "int"),
    ],
)
def test_types_that_do_not_are_nonsense(values: list[Any], given_type: Any, dtype: DType) -> None:
    with pytest.raises(SourceNonsenseError, match="1 of 1 values"):
        typed(values, dtype, given_type)


def test_text_is_read_for_what_the_contract_says() -> None:
    assert text([" 12", "12.0", "NA", None, "-7", "9223372036854775807"], "int") == [12, 12, None, None, -7, 2**63 - 1]
    assert text(["1.5", "1e3", "NaN", "", "inf"], "float") == [1.5, 1000.0, None, None, float("inf")]
    assert text(["true", "F", "1", "null"], "bool") == [True, False, True, None]
    assert text(["NA", "", None, " x "], "string") == ["NA", "", None, " x "]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("12.5", "int"), ("twelve", "int"), ("1,5", "float"), ("yes", "bool"), ("1 Sep", "date"), ("9223372036854775808", "int")],
)
def test_text_that_says_something_else_is_nonsense(value: str, dtype: DType) -> None:
    with pytest.raises(SourceNonsenseError, match=value):
        text([value], dtype)


def test_a_null_in_a_column_that_may_not_be_null_passes_for_validation_to_find() -> None:
    assert cast_frame(pl.DataFrame({"c": [None]}), only("int", nullable=False), "source")["c"].to_list() == [None]


def test_records_tell_a_fault_per_row_and_hide_no_other_row() -> None:
    contract = Contract(columns=(Column(name="a", dtype="int"), Column(name="b", dtype="date", nullable=True)), key=("a",))
    given_records = [
        {"a": 1, "b": "2013-09-01"},
        {"a": "x"},
        {"b": None},
        {"a": 2, "b": "never", "z": 0},
        {"a": None, "b": None},
        {"a": 3.0},
    ]
    records = cast_records(given_records, contract)
    assert records.rows.schema == schema_of(contract)
    assert records.rows["a"].to_list() == [1, None, None, 2, None, 3]
    assert records.rows["b"].to_list() == [date(2013, 9, 1), None, None, None, None, None]
    assert set(records.faults) == {1, 2, 3}
    assert records.faults[2] == "has no 'a'"
    assert "never" in records.faults[3]
    assert records.dropped == ("z",)
    assert records.absent == ()


def test_no_records_are_no_rows() -> None:
    assert cast_records([], only("float")).rows.schema == schema_of(only("float"))
    assert cast_records([], only("float")).absent == ()


def test_whole_and_broken_numbers_mix_in_a_column_of_floats() -> None:
    records = cast_records([{"c": 3}, {"c": 2.5}, {"c": None}, {"c": float("inf")}, {"c": -(2**63) - 1}], only("float"))
    assert records.rows.to_series().to_list() == [3.0, 2.5, None, float("inf"), float(-(2**63) - 1)]
    assert not records.faults


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["id", "n", "at", "x", "ok", "day", "z"]), json_value), max_size=6))
def test_whatever_json_may_hold_is_a_row_or_a_fault(given_records: list[dict[str, Any]]) -> None:
    columns = {"id": "string", "n": "int", "at": "timestamp", "x": "float", "ok": "bool", "day": "date"}
    contract = Contract(columns=tuple(Column(name=n, dtype=d, nullable=n != "id") for n, d in columns.items()), key=("id",))
    records = cast_records(given_records, contract)
    assert records.rows.height == len(given_records)
    for i, record in enumerate(given_records):
        for name in columns:
            kept = records.rows[name][i]
            nan = isinstance(record.get(name), float) and record[name] != record[name]
            # No value disappears without being told.
            assert kept is not None or record.get(name) is None or nan or i in records.faults


def test_messages_show_the_culprit_but_no_secret_and_no_novel() -> None:
    assert len(shown("x" * 10_000)) < 100
    assert without_password("postgresql://me:hush@host:5432/db?password=hush") == "postgresql://host:5432/db"
    assert without_password("redis://:hush@host:1/0") == "redis://host:1/0"
    assert without_password("/some/folder") == "/some/folder"
    assert "no columns at all" in str(missing_column("s", "c", []))
    assert wrong_value("s", "c", "int", "x", 1, 2).example == "'x'"
