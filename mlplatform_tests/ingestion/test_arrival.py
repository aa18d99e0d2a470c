"""Stamps, and exactly once: a run may die at any step, and each event is stored one time."""

import uuid
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.clients.lake import Lake
from mlplatform.clients.stream import StreamClient
from mlplatform.ingestion.arrival import check_days, stamp, stream_id_of, stream_order, transaction_number, unseen
from mlplatform.ingestion.errors import SourceNonsenseError
from mlplatform.ingestion.stream import parse
from mlplatform.records import DayRange
from mlplatform.specs import Column, Contract

CONTRACT = Contract(columns=(Column(name="id", dtype="string"), Column(name="at", dtype="timestamp", nullable=True)), key=("id",))
NOON = datetime(2013, 9, 1, 12, tzinfo=UTC)
ids = st.builds(lambda ms, seq: f"{ms}-{seq}", st.integers(0, 2**42 - 1), st.integers(0, 2**21 - 1))


def rows(*times: datetime | None) -> pl.DataFrame:
    schema = {"id": pl.String(), "at": pl.Datetime("us", "UTC")}
    return pl.DataFrame({"id": [str(k) for k in range(len(times))], "at": list(times)}, schema=schema)


def test_a_row_is_stamped_with_its_arrival_and_the_utc_day_of_its_time() -> None:
    late = datetime(2013, 8, 31, 23, 59, 59, 999_999, UTC)
    stamped = stamp(rows(late, late + timedelta(microseconds=1)), NOON, "at")
    assert stamped["event_date"].to_list() == [date(2013, 8, 31), date(2013, 9, 1)]
    assert stamped["received_at"].to_list() == [NOON, NOON]
    assert stamped["received_at"].dtype == pl.Datetime("us", "UTC")
    assert stamped["stream_id"].to_list() == ["", ""]


def test_a_table_without_a_time_has_no_day() -> None:
    assert stamp(rows(NOON), NOON).columns == ["id", "at", "received_at", "stream_id"]


def test_what_the_reader_knows_better_stays() -> None:
    earlier = NOON - timedelta(days=9)
    given_rows = rows(NOON, NOON).with_columns(
        received_at=pl.Series([earlier, None], dtype=pl.Datetime("us", "UTC")), stream_id=pl.Series(["5-1", None])
    )
    stamped = stamp(given_rows, NOON, "at")
    assert stamped["received_at"].to_list() == [earlier, NOON]
    assert stamped["stream_id"].to_list() == ["5-1", ""]


def test_a_row_without_its_time_lies_in_a_partition_that_is_written() -> None:
    days = DayRange(date(2013, 1, 1), date(2013, 1, 2))
    assert stamp(rows(None), NOON, "at")["event_date"].to_list() == [date(2013, 9, 1)]
    assert stamp(rows(None), NOON, "at", days)["event_date"].to_list() == [date(2013, 1, 2)]


def test_no_rows_are_stamped_with_the_right_types() -> None:
    assert stamp(rows(), NOON, "at").schema == stamp(rows(NOON), NOON, "at").schema


def test_rows_of_another_day_are_told_with_an_example() -> None:
    days = DayRange(date(2013, 9, 1), date(2013, 9, 1))
    check_days(stamp(rows(NOON), NOON, "at"), days, "at", "source")
    with pytest.raises(SourceNonsenseError, match="1 of 2 rows lie outside 2013-09-01"):
        check_days(stamp(rows(NOON, NOON + timedelta(days=1)), NOON, "at"), days, "at", "source")


@given(ids, ids)
def test_transaction_numbers_order_as_the_ids_do_and_lead_back_to_them(a: str, b: str) -> None:
    assert (transaction_number(a) < transaction_number(b)) == (stream_order(a) < stream_order(b))
    assert stream_id_of(transaction_number(a)) == a
    assert 0 <= transaction_number(a) < 2**63


def test_an_id_that_does_not_fit_is_an_error_and_no_commit_is_none() -> None:
    for stream_id in (f"1-{2**21}", f"{2**42}-0"):
        with pytest.raises(ValueError, match="does not fit"):
            transaction_number(stream_id)
    assert stream_id_of(-1) is None


def test_only_entries_above_the_committed_one_are_new_and_ids_compare_as_numbers() -> None:
    entries = [(i, {"event": orjson.dumps({"id": i})}) for i in ("9-0", "9-2", "9-10", "10-0")]
    entries += [("11-0", {"event": b"?"}), ("100-0", {"event": b"?"})]
    batch = parse(entries, CONTRACT, NOON)
    assert unseen(batch, None, None) == batch
    assert unseen(batch, "9-2", "11-0").rows["stream_id"].to_list() == ["9-10", "10-0"]
    assert unseen(batch, "9-2", "11-0").malformed["stream_id"].to_list() == ["100-0"]
    assert unseen(batch, "100-0", "100-0").rows.is_empty()


class CrashError(Exception):
    """The run dies here."""


class Ingestion:
    """The sequence of a stream's run over a real Valkey and real Delta tables, able to die before any of its steps."""

    raw, quarantine = ("raw", "events"), ("quarantine", "events")

    def __init__(self, client: StreamClient, folder: Path) -> None:
        self.client, self.stream = client, uuid.uuid4().hex
        self.lake = Lake(str(folder))

    def run(self, consumer: str, limit: int, die_before: str = "") -> int:
        def step(name: str) -> None:
            if name == die_before:
                raise CrashError(name)

        entries = self.client.read(self.stream, "g", consumer, limit)
        step("commit rows")
        if not entries:
            return 0
        rows_committed, malformed_committed = (stream_id_of(self.lake.transaction(key, "stream")) for key in (self.raw, self.quarantine))
        batch = unseen(parse(entries, CONTRACT, NOON), rows_committed, malformed_committed)
        assert batch.last_id is not None
        transaction = ("stream", transaction_number(batch.last_id))
        self.lake.append(self.raw, stamp(batch.rows, NOON, "at"), transaction=transaction)
        step("commit malformed")
        self.lake.append(self.quarantine, batch.malformed, partitioned=False, transaction=transaction)
        step("ack")
        self.client.ack(self.stream, "g", [entry_id for entry_id, _ in entries])
        return len(entries)


@pytest.mark.parametrize(
    "deaths",
    [
        ("commit rows",),
        ("commit malformed",),
        ("ack",),
        ("ack", "ack"),
        ("commit malformed", "commit malformed", "ack"),
        ("commit rows", "ack", "commit malformed", "commit rows", "ack"),
    ],
)
def test_every_event_is_stored_once_wherever_the_runs_die(valkey: str, tmp_path: Path, deaths: tuple[str, ...]) -> None:
    with StreamClient(valkey) as client:
        run = Ingestion(client, tmp_path)
        published = 0
        for attempt, death in enumerate([*deaths, "", ""]):
            events = [orjson.dumps({"id": str(published + k), "at": None}) if k % 3 else b"? %d" % (published + k) for k in range(7)]
            client.publish_many(run.stream, [{"event": event} for event in events])
            published += len(events)
            try:
                run.run(f"run-{attempt}", 5 + attempt, death)
            except CrashError:
                continue
        while run.run("last", 100):
            continue
    stored = run.lake.read(run.raw)["id"].to_list() + [text.removeprefix("? ") for text in run.lake.read(run.quarantine)["payload"]]
    assert sorted(stored, key=int) == [str(k) for k in range(published)]
