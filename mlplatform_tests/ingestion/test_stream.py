"""Taking stream entries apart: every entry becomes a row or a malformed entry, and none stops the others."""

import time
from datetime import datetime
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.ingestion.stream import MALFORMED_SCHEMA, PAYLOAD_LENGTH, parse
from mlplatform.specs import Contract

GOOD = {"id": "a", "n": 1, "at": "2013-09-01T00:00:00Z", "x": 1, "ok": True, "day": "2013-09-01"}


def entry(number: int, event: Any) -> tuple[str, dict[str, bytes]]:
    return f"{number}-0", {"event": event if isinstance(event, bytes) else orjson.dumps(event)}


def test_good_entries_become_typed_stamped_rows(contract: Contract, noon: datetime) -> None:
    batch = parse([entry(9, GOOD), entry(10, {**GOOD, "id": "b", "x": None, "spare": 1})], contract, noon)
    assert batch.rows.columns == ["id", "n", "at", "x", "ok", "day", "received_at", "stream_id"]
    assert batch.rows["stream_id"].to_list() == ["9-0", "10-0"]
    assert batch.rows["received_at"].to_list() == [noon, noon]
    assert batch.rows["x"].to_list() == [1.0, None]
    assert batch.malformed.is_empty()
    assert batch.last_id == "10-0"
    assert batch.dropped == ("spare",)


def test_no_entries_are_an_empty_typed_batch(contract: Contract, noon: datetime) -> None:
    batch = parse([], contract, noon)
    assert batch.last_id is None
    assert batch.rows.schema == parse([entry(1, GOOD)], contract, noon).rows.schema
    assert batch.malformed.schema == MALFORMED_SCHEMA


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"event": b'{"id": "a", "n"'}, "not JSON"),
        ({"event": b"\xff\xfe\x00"}, "not JSON"),
        ({"event": b""}, "not JSON"),
        ({"event": b"[" * 5000}, "not JSON"),
        ({"event": b'{"id": "a", "x": NaN}'}, "not JSON"),
        ({"event": b"[1]"}, "not a JSON object but list"),
        ({"event": b"null"}, "not a JSON object but NoneType"),
        ({"Event": b"{}", "other": b"\xff"}, "has no field 'event'"),
        ({}, "trimmed"),
        ({"event": orjson.dumps({**GOOD, "n": "one"})}, "'n' should be int, is 'one'"),
        ({"event": orjson.dumps({**GOOD, "n": 1.5})}, "'n' should be int"),
        ({"event": orjson.dumps({**GOOD, "at": "soon"})}, "'at' should be timestamp"),
        ({"event": orjson.dumps({**GOOD, "id": {"a": 1}})}, "'id' should be string"),
        ({"event": b"{}"}, "has no 'id'"),
    ],
)
def test_an_unreadable_entry_is_set_aside_whole_and_stops_no_other(
    contract: Contract, noon: datetime, fields: dict[str, bytes], error: str
) -> None:
    batch = parse([entry(1, GOOD), ("2-0", fields), entry(3, {**GOOD, "id": "c"})], contract, noon)
    assert batch.rows["id"].to_list() == ["a", "c"]
    assert batch.malformed["stream_id"].to_list() == ["2-0"]
    assert error in batch.malformed["error"][0]
    assert batch.malformed["received_at"][0] == noon
    assert batch.last_id == "3-0"
    if fields.get("event", b"").isascii():
        assert batch.malformed["payload"][0].startswith(fields.get("event", b"").decode()[:100])


def test_a_null_where_none_is_allowed_is_left_to_validation(contract: Contract, noon: datetime) -> None:
    batch = parse([entry(1, {**GOOD, "id": None})], contract, noon)
    assert batch.rows["id"].to_list() == [None]
    assert batch.malformed.is_empty()


def test_a_huge_payload_is_cut_and_says_so(contract: Contract, noon: datetime) -> None:
    payload = parse([("1-0", {"event": b"x" * 100_000})], contract, noon).malformed["payload"][0]
    assert payload.endswith("… (100000 characters)")
    assert len(payload) < PAYLOAD_LENGTH + 50


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["event", "Event"]), st.binary(max_size=30), max_size=2), max_size=8))
def test_every_entry_is_accounted_for_exactly_once(fields: list[dict[str, bytes]]) -> None:
    from mlplatform.specs import Column

    contract = Contract(columns=(Column(name="id", dtype="string", nullable=True),), key=("id",))
    noon = datetime.fromisoformat("2013-09-01T12:00:00Z")
    entries = [(f"{k}-0", f) for k, f in enumerate(fields)]
    batch = parse(entries, contract, noon)
    told = batch.rows["stream_id"].to_list() + batch.malformed["stream_id"].to_list()
    assert sorted(told) == sorted(entry_id for entry_id, _ in entries)


def test_a_hundred_thousand_entries_take_seconds(contract: Contract, noon: datetime) -> None:
    entries = [entry(k, {**GOOD, "n": k}) for k in range(100_000)]
    entries[500] = ("500-0", {"event": b"oops"})
    started = time.monotonic()
    batch = parse(entries, contract, noon)
    assert time.monotonic() - started < 6  # measured: 0.4 s
    assert (batch.rows.height, batch.malformed.height) == (99_999, 1)
    assert batch.rows["n"].sum() == pl.int_range(100_000, eager=True).sum() - 500
