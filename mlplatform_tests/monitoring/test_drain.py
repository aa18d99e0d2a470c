"""The prediction log becomes rows exactly once, however often the drain is killed and whatever stands in the log."""

import json
import math
import struct
from base64 import b64encode
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.clients.lake import Lake
from mlplatform.monitoring.drain import (
    PREDICTIONS,
    SET_ASIDE,
    Drained,
    Entry,
    drain,
    input_column,
    position,
    predictions_schema,
    stream_id_at,
    with_feature_columns,
)
from mlplatform.specs import RequestField

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
FIELDS = (
    RequestField(name="town", dtype="string", description="", example="Bergen"),
    RequestField(name="number", dtype="int", description="", example=1),
    RequestField(name="leaves_at", dtype="timestamp", description="", example="2024-05-01T10:00:00Z"),
    RequestField(name="version", dtype="float", description="named like a column of the log", example=1.5),
)


def record(**changes: Any) -> str:
    fields = {
        "request_id": "r1",
        "input_index": 0,
        "requested_at": "2024-04-30T23:30:00.000001-02:00",
        "model": "m",
        "version": 3,
        "variant": "champion",
        "inputs": {"town": "Bergen", "number": 4, "leaves_at": "2024-05-01T10:00:00+02:00", "version": 1},
        "features": [1.5, None, 0.0],
        "feature_ages_s": {"weather": 12.5, "traffic": None},
        "imputed": ["traffic"],
        "prediction": 0.25,
        "latency_ms": 1.25,
        "contract_digest": "c" * 64,
    }
    return json.dumps(fields | changes)


def request(*records: str) -> str:
    """Records of one request as the service writes them: a line."""
    told = [json.loads(one) for one in records]
    own = ("prediction", "feature_ages_s", "imputed", "shortfalls")
    numbers = [math.nan if value is None else value for one in told for value in one["features"]]
    return json.dumps(
        {"records": len(told)}
        | {name: value for name, value in told[0].items() if name not in (*own, "input_index", "inputs", "features")}
        | {"first": told[0]["input_index"], "rows": [{name: one[name] for name in own if name in one} for one in told]}
        | {"inputs": [one["inputs"] for one in told]}
        | {"features": b64encode(struct.pack(f"<{len(numbers)}d", *numbers)).decode()},
        separators=(",", ":"),
    )


def drained(*entries: Entry, **options: Any) -> Drained:
    return drain(entries, model="m", fields=FIELDS, received_at=NOW, **options)


def test_a_record_becomes_a_row_with_its_request_fields_as_typed_columns() -> None:
    found = drained(Entry("1714500000000-0", record()))
    assert found.predictions.schema == predictions_schema(FIELDS)
    row = found.predictions.row(0, named=True)
    assert row["requested_at"] == datetime(2024, 5, 1, 1, 30, 0, 1, tzinfo=UTC)
    assert row["event_date"] == date(2024, 5, 1)
    assert row["features"] == [1.5, None, 0.0]
    assert row["feature_ages_s"] == [{"view": "weather", "age_s": 12.5}, {"view": "traffic", "age_s": None}]
    assert row["imputed"] == ["traffic"]
    assert json.loads(row["inputs"])["leaves_at"] == "2024-05-01T10:00:00+02:00"
    assert (row["town"], row["number"], row["leaves_at"]) == ("Bergen", 4, datetime(2024, 5, 1, 8, tzinfo=UTC))
    assert (row["version"], row["input_version"]) == (3, 1.0)


def test_a_time_in_small_letters_is_one() -> None:
    found = drained(Entry("5-0", record(inputs={"leaves_at": "2024-05-01t10:00:00z"})))
    assert found.predictions["leaves_at"].to_list() == [datetime(2024, 5, 1, 10, tzinfo=UTC)]


def test_what_fell_short_what_was_given_and_which_code_answered_are_columns_and_unknown_in_older_records() -> None:
    told = {"shortfalls": {"traffic": "missing", "weather": "expired"}, "given": ["speed"], "code_version": "abc"}
    found = drained(Entry("5-0", record(**told)), Entry("6-0", record(request_id="older"))).predictions
    assert found["shortfalls"].to_list() == [[{"view": "traffic", "reason": "missing"}, {"view": "weather", "reason": "expired"}], []]
    assert found["given"].to_list() == [["speed"], []]
    assert found["code_version"].to_list() == ["abc", None]


def test_only_the_days_of_the_records_at_hand_are_looked_up() -> None:
    asked: list[set[date]] = []
    late = record(request_id="late", requested_at="2024-04-11T10:00:00Z")
    drained(Entry("5-0", record()), Entry("6-0", late), stored=lambda days: asked.append(set(days)) or {})
    assert asked == [{date(2024, 5, 1), date(2024, 4, 11)}]


def test_an_empty_log_gives_empty_tables_with_their_schemas() -> None:
    found = drained()
    assert found.predictions.schema == predictions_schema(FIELDS)
    assert found.set_aside.schema == SET_ASIDE
    assert (found.records, found.last_stream_id) == (0, None)


MALFORMED = {
    "no field": None,
    "no text": b"\xff\xfe\x00",
    "no JSON": "{",
    "no object": "[1, 2]",
    "a field missing": json.dumps({"request_id": "r"}),
    "a field too many": record(surprise=1),
    "another model": record(model="other"),
    "no number": record(prediction=None),
    "no probability": record(prediction=1.5),
    "not a number": record().replace("0.25", "NaN"),
    "no zone": record(requested_at="2024-05-01T00:00:00"),
    "no time": record(requested_at="yesterday"),
    "beyond time": record(requested_at="0001-01-01T00:00:00+10:00"),
    "wrong input type": record(inputs={"town": 5}),
    "a boolean for an integer": record(inputs={"number": True}),
    "a fraction for an integer": record(inputs={"number": 1.5}),
    "an endless integer": record(inputs={"number": 10**30}),
    "an infinite integer": record(inputs={"number": 1e400}).replace("Infinity", "1e400"),
    "an endless version": record(version=10**30),
    "half a character": record(inputs={"town": "x"}).replace('"x"', '"\\ud800"'),
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_an_unreadable_entry_is_set_aside_with_its_error_and_the_others_go_on(payload: str | bytes | None) -> None:
    found = drained(Entry("5-0", record(request_id="before")), Entry("6-0", payload), Entry("7-0", record(request_id="after")))
    assert found.predictions["request_id"].to_list() == ["before", "after"]
    (row,) = found.set_aside.iter_rows(named=True)
    assert row["stream_id"] == "6-0"
    assert row["error"]
    assert (row["payload"] is None) == (payload is None)
    assert found.last_stream_id == "7-0"


def test_a_field_the_request_did_not_carry_is_null() -> None:
    assert drained(Entry("5-0", record(inputs={"town": None}))).predictions.select("town", "number").row(0) == (None, None)


def test_a_record_the_service_wrote_twice_counts_once_within_and_across_drains() -> None:
    found = drained(
        Entry("5-0", record()), Entry("6-0", record()), Entry("7-0", record(input_index=1)), stored=lambda days: {("r1", 1, "champion")}
    )
    assert found.predictions["stream_id"].to_list() == ["5-0"]
    assert found.repeated == 2


def test_a_shadows_record_stands_beside_the_answers_under_the_same_request() -> None:
    found = drained(Entry("5-0", record()), Entry("6-0", record(variant="shadow")), Entry("7-0", record(variant="shadow")))
    assert found.predictions["variant"].to_list() == ["champion", "shadow"]
    assert found.repeated == 1


def test_an_entry_may_hold_many_records_and_one_that_cannot_be_read_does_not_take_the_others_with_it() -> None:
    lines = [record(request_id="a"), "nonsense", record(request_id="b"), record(request_id="a")]
    for entry in (Entry("5-0", "\n".join(lines)), Entry("5-0", "\n".join(lines).encode())):
        found = drained(entry)
        assert found.predictions.select("request_id", "stream_id").rows() == [("a", "5-0"), ("b", "5-0")]
        assert found.set_aside.select("payload", "stream_id").rows() == [("nonsense", "5-0")]
        assert (found.records, found.repeated, found.already) == (4, 1, 0)
        assert drained(entry, after=position("5-0"), set_aside_after=position("5-0")).already == 4


def test_a_line_with_all_records_of_a_request_gives_the_rows_that_a_line_for_each_gives() -> None:
    each = [record(input_index=4 + i, prediction=i / 8, features=[i / 3, None, -0.0], inputs={"town": f"t{i}"}) for i in range(5)]
    found, wanted = drained(Entry("5-0", request(*each))), drained(Entry("5-0", "\n".join(each)))
    assert found.predictions.equals(wanted.predictions)
    assert (found.records, found.set_aside.height) == (5, 0)
    assert math.copysign(1, found.predictions["features"][0][2]) == -1
    assert drained(Entry("5-0", request(*each)), after=position("5-0"), set_aside_after=position("5-0")).already == 5


def test_of_a_request_whose_records_cannot_all_be_read_the_others_are_stored() -> None:
    each = [
        record(input_index=i, prediction=p, inputs={"town": t}) for i, (p, t) in enumerate([(0.5, "a"), (7, "b"), (0.25, 5), (0.5, "c")])
    ]
    found = drained(Entry("5-0", request(*each)))
    assert found.predictions["town"].to_list() == ["a", "c"]
    assert [json.loads(payload)["input_index"] for payload in found.set_aside["payload"]] == [1, 2]
    assert "not between" in found.set_aside["error"][0]
    assert "'town' is no string" in found.set_aside["error"][1]
    assert found.records == 4


WHOLE = request(record(), record(input_index=1))
DAMAGED = {
    "fewer rows than it says": WHOLE.replace('"records":2', '"records":3'),
    "none": WHOLE.replace('"records":2', '"records":0'),
    "a count of another kind": WHOLE.replace('"records":2', '"records":"2"'),
    "a member too many": WHOLE.replace('"first":0', '"first":0,"surprise":1'),
    "torn": WHOLE[:-9],
    "numbers that are no base64": WHOLE.replace('"features":"', '"features":"*'),
    "numbers torn": WHOLE.replace('"features":"', '"features":"AAAA'),
    "an infinite number": request(record(features=[math.inf])),
    "another given": WHOLE[:-1] + ',"given":[["a"]]}',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_is_set_aside_as_it_came_and_the_others_go_on(line: str) -> None:
    found = drained(Entry("5-0", "\n".join([record(request_id="before"), line])), Entry("6-0", request(record(request_id="after"))))
    assert found.predictions["request_id"].to_list() == ["before", "after"]
    assert found.set_aside["payload"].to_list() == [line]
    assert found.set_aside["error"][0]
    assert found.records == 3


records = st.integers(0, 8).map(lambda k: record(request_id=f"r{k}"))
payloads = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.lists(records, min_size=1, max_size=3).map("\n".join),
    st.lists(st.integers(0, 5).map(lambda k: record(input_index=k, prediction=k / 4)), min_size=1, max_size=4).map(
        lambda each: request(*each)
    ),
    st.just(record(prediction=7)),
    st.binary(max_size=5),
)


@given(st.lists(st.tuples(st.integers(0, 30), payloads), max_size=30), st.integers(-1, 30), st.integers(-1, 30))
def test_every_entry_is_accounted_for_exactly_once(entries: list[tuple[int, Any]], after: int, set_aside_after: int) -> None:
    log = [Entry(f"{k}-0", payload) for k, payload in entries]
    found = drained(
        *log,
        after=position(f"{after}-0") if after >= 0 else -1,
        set_aside_after=position(f"{set_aside_after}-0") if set_aside_after >= 0 else -1,
    )
    assert (
        found.records
        == sum(entry.count() for entry in log)
        == found.predictions.height + found.set_aside.height + found.already + found.repeated
    )
    assert all(position(i) > position(f"{after}-0") for i in found.predictions["stream_id"] if after >= 0)
    assert all(position(i) > position(f"{set_aside_after}-0") for i in found.set_aside["stream_id"] if set_aside_after >= 0)


_TOLD = {"predictions": ["stream_id", "request_id", "input_index"], "set_aside": ["stream_id", "payload"]}


@given(st.lists(payloads, min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 2))
def test_a_drain_killed_between_its_two_commits_neither_loses_nor_repeats(log: list[Any], batch: int, killed_after: int) -> None:
    entries = [Entry(f"{10 + k}-{k}", payload) for k, payload in enumerate(log)]
    kept: dict[str, list[Any]] = {"predictions": [], "set_aside": []}
    positions = {"predictions": -1, "set_aside": -1}

    def step(commits: int) -> int:
        start = min(positions.values())
        found = drained(
            *[e for e in entries if position(e.stream_id) > start][:batch],
            after=positions["predictions"],
            set_aside_after=positions["set_aside"],
        )
        if found.last_stream_id is None:
            return 0
        for table in ("set_aside", "predictions")[:commits]:
            kept[table] += getattr(found, table).select(_TOLD[table]).rows()
            positions[table] = max(positions[table], position(found.last_stream_id))
        return found.records

    step(killed_after)
    while step(2):
        pass
    whole = drained(*entries)
    assert kept["set_aside"] == whole.set_aside.select(_TOLD["set_aside"]).rows()
    # A record written twice is known by its key across batches; here only ids are followed.
    assert set(whole.predictions.select(_TOLD["predictions"]).rows()) <= set(kept["predictions"])
    assert len(kept["predictions"]) == len(set(kept["predictions"]))


def test_the_committed_position_on_a_real_table_makes_a_repeated_drain_write_nothing(tmp_path: Path) -> None:
    lake, key = Lake(str(tmp_path)), ("predictions", "m")
    log = [Entry(f"171450000{k}000-{k}", record(request_id=f"r{k}")) for k in range(6)]
    for part in (log[:4], log[:4], log[2:]):
        found = drained(*part, after=lake.transaction(key, "drain"))
        assert found.last_stream_id is not None
        lake.append(key, found.predictions, transaction=("drain", position(found.last_stream_id)))
    assert sorted(lake.read(key)["request_id"]) == [f"r{k}" for k in range(6)]
    assert stream_id_at(lake.transaction(key, "drain")) == "1714500005000-5"
    assert lake.read(key).schema == predictions_schema(FIELDS)


@given(st.tuples(st.integers(0, 2**43 - 1), st.integers(0, 2**20 - 1)), st.tuples(st.integers(0, 2**43 - 1), st.integers(0, 2**20 - 1)))
def test_positions_grow_with_stream_ids_and_lead_back_to_them(a: tuple[int, int], b: tuple[int, int]) -> None:
    first, second = (f"{ms}-{n}" for ms, n in (a, b))
    assert (position(first) < position(second)) == (a < b)
    assert stream_id_at(position(first)) == first
    assert 0 <= position(first) < 2**63


@pytest.mark.parametrize("stream_id", ["", "5", "-", "a-1", "1-", "-1-0", "1-1048576", "²-0", f"{2**43}-0"])
def test_what_no_stream_would_call_an_entry_is_refused(stream_id: str) -> None:
    with pytest.raises(ValueError, match="stream id"):
        position(stream_id)


def test_features_are_spread_by_each_rows_own_contract() -> None:
    rows = pl.DataFrame({"request_id": ["x", "y"], "contract_digest": ["old", "new"], "features": [[1.0, 2.0], [3.0, None, 5.0]]})
    wide = with_feature_columns(rows, {"old": ("a", "b"), "new": ("c", "b", "a")})
    assert wide.drop("contract_digest").rows(named=True) == [
        {"request_id": "x", "a": 1.0, "b": 2.0, "c": None},
        {"request_id": "y", "a": 5.0, "b": None, "c": 3.0},
    ]


def test_features_that_do_not_fit_their_contract_are_refused() -> None:
    rows = pl.DataFrame({"contract_digest": ["k"], "features": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="no feature names"):
        with_feature_columns(rows, {})
    with pytest.raises(ValueError, match="has 1 features"):
        with_feature_columns(rows, {"k": ("a",)})
    with pytest.raises(ValueError, match="other columns"):
        with_feature_columns(rows, {"k": ("a", "contract_digest")})


def test_every_column_of_the_log_is_kept_clear_of_request_fields() -> None:
    assert {input_column(name) for name in PREDICTIONS}.isdisjoint(PREDICTIONS)
    assert input_column("town") == "town"
