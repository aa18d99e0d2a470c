"""What commits say of a table's content: equal to the table read whole, whoever wrote and in whatever order."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake

from mlplatform.clients import fingerprints
from mlplatform.clients.fingerprints import computed, mark_append, of_table, recorded
from mlplatform.clients.lake import Lake, MissingTableError, with_day
from mlplatform.fingerprint import COMMIT_KEY, Fingerprint, Mark, fingerprint

KEY = ("offline", "shop_totals")
START = datetime(2024, 5, 1, tzinfo=UTC)


def rows(first_hour: int, hours: int = 5) -> pl.DataFrame:
    moments = [START + timedelta(hours=7 * (first_hour + n)) for n in range(hours)]
    table = pl.DataFrame(
        {
            "shop": [f"s{n % 3}" for n in range(hours)],
            "event_timestamp": pl.Series(moments, dtype=pl.Datetime("us", "UTC")),
            "amount": [None if n % 4 == 0 else n / 3 for n in range(hours)],
        },
        schema_overrides={"amount": pl.Float64},
    )
    return with_day(table, "event_timestamp")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def append(lake: Lake, stored: pl.DataFrame) -> Mark:
    mark = mark_append(lake, KEY, stored)
    lake.append(KEY, stored, metadata=mark.metadata())
    return mark


def whole(lake: Lake, version: int | None = None) -> Fingerprint:
    return fingerprint(lake.read(KEY, version=version))


def test_the_running_sum_is_the_fingerprint_of_the_table_read_whole(lake: Lake) -> None:
    for n in range(6):
        mark = append(lake, rows(3 * n))
        assert mark.rows == fingerprint(rows(3 * n))
        assert mark.table == recorded(lake, KEY) == whole(lake) == computed(lake, KEY)
    for version in range(6):
        assert recorded(lake, KEY, version) == computed(lake, KEY, version) == whole(lake, version)


def test_the_sum_is_read_from_the_last_commit_and_no_row_is_read(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    append(lake, rows(0))
    append(lake, rows(9))
    expected = whole(lake)
    monkeypatch.setattr(Lake, "scan", None)
    assert of_table(lake, KEY) == expected


def test_an_empty_first_write_counts(lake: Lake) -> None:
    append(lake, rows(0).clear())
    assert recorded(lake, KEY) == computed(lake, KEY) == whole(lake)
    append(lake, rows(0))
    assert recorded(lake, KEY) == computed(lake, KEY) == whole(lake)


def test_racing_appends_are_all_counted(lake: Lake) -> None:
    append(lake, rows(0))
    marks = [mark_append(lake, KEY, rows(n)) for n in (10, 20, 30)]
    for n, mark in zip((10, 20, 30), marks, strict=True):
        lake.append(KEY, rows(n), metadata=mark.metadata())
        assert recorded(lake, KEY) == whole(lake)
    append(lake, rows(40))
    assert recorded(lake, KEY) == whole(lake)


def test_writers_in_threads_with_lakes_of_their_own_are_all_counted(lake: Lake) -> None:
    append(lake, rows(0))

    def write(n: int) -> None:
        append(Lake(lake.root), rows(10 * n))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(1, 13)))
    assert lake.version(KEY) == 12
    assert recorded(lake, KEY) == whole(lake)


def test_compaction_changes_nothing(lake: Lake) -> None:
    append(lake, rows(0))
    append(lake, rows(1))
    DeltaTable(lake.uri(KEY)).optimize.compact()
    assert DeltaTable(lake.uri(KEY)).history(1)[0]["operation"] == "OPTIMIZE"
    assert recorded(lake, KEY) == whole(lake)
    append(lake, rows(2))
    assert recorded(lake, KEY) == whole(lake)


def test_a_writer_that_records_nothing_breaks_the_sum_and_the_next_append_mends_it(lake: Lake) -> None:
    append(lake, rows(0))
    write_deltalake(lake.uri(KEY), rows(1).to_arrow(), mode="append")
    assert recorded(lake, KEY) is None
    assert of_table(lake, KEY) == whole(lake)
    append(lake, rows(2))
    assert recorded(lake, KEY) == whole(lake)


def test_a_deletion_is_no_longer_what_was_recorded(lake: Lake) -> None:
    append(lake, rows(0))
    DeltaTable(lake.uri(KEY)).delete("shop = 's1'")
    assert recorded(lake, KEY) is None
    assert of_table(lake, KEY) == whole(lake)


def test_a_writer_that_knows_its_own_rows_only_leaves_no_gap(lake: Lake) -> None:
    for n in range(3):
        lake.append(KEY, rows(3 * n), metadata=Mark(fingerprint(rows(3 * n))).metadata())
        assert recorded(lake, KEY) == computed(lake, KEY)
    mark = append(lake, rows(20))
    assert mark.table == recorded(lake, KEY) == computed(lake, KEY)
    lake.append(KEY, rows(40), metadata=Mark(fingerprint(rows(40))).metadata())
    assert [recorded(lake, KEY, version) for version in range(5)] == [computed(lake, KEY, version) for version in range(5)]


def test_a_record_of_an_older_definition_is_counted_anew(lake: Lake) -> None:
    old = {COMMIT_KEY: mark_append(lake, KEY, rows(0)).metadata()[COMMIT_KEY].replace("mlplatform-table-2", "mlplatform-table-1")}
    lake.append(KEY, rows(0), metadata=old)
    assert recorded(lake, KEY) is None
    append(lake, rows(1))
    assert recorded(lake, KEY) == whole(lake)


def test_reading_in_parts_gives_the_fingerprint_of_all(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pl.concat([rows(0, 90), rows(1).with_columns(pl.lit(None, pl.Date).alias("event_date"))])
    lake.append(KEY, stored)
    for at_once in (1, 7, 1000):
        monkeypatch.setattr(fingerprints, "_ROWS_AT_ONCE", at_once)
        assert computed(lake, KEY) == fingerprint(stored)


def test_a_table_without_partitions_is_read_whole(lake: Lake) -> None:
    lake.replace(KEY, rows(0))
    assert computed(lake, KEY) == fingerprint(rows(0))


def test_a_table_that_was_never_written_is_told_as_such(lake: Lake) -> None:
    with pytest.raises(MissingTableError):
        of_table(lake, KEY)
