"""The lake's open tables and kept frames against what lies on the disk: whoever wrote last is read."""

import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.clients import lake as module
from mlplatform.clients.lake import DAY, Key, Lake
from mlplatform.records import DayRange

KEY: Key = ("raw", "things")
FIRST, SECOND = date(2013, 9, 1), date(2013, 9, 2)
DAYS = DayRange(FIRST, SECOND)
Reader = Callable[[Lake], list[int]]


def _rows(*values: int, day: date = FIRST) -> pl.DataFrame:
    return pl.DataFrame({"value": list(values), DAY: [day] * len(values)}, schema={"value": pl.Int64, DAY: pl.Date})


def _by_days(lake: Lake) -> list[int]:
    return sorted(lake.read(KEY, DAYS)["value"].to_list())


def _whole(lake: Lake) -> list[int]:
    return sorted(lake.read(KEY)["value"].to_list())


def _scanned(lake: Lake) -> list[int]:
    return sorted(lake.scan(KEY).collect()["value"].to_list())


@pytest.mark.parametrize("read", [_by_days, _whole, _scanned])
def test_a_reader_sees_what_another_process_wrote(tmp_path: Path, read: Reader) -> None:
    writer, reader = Lake(str(tmp_path)), Lake(str(tmp_path))
    expected: list[int] = []
    for number in range(12):
        writer.append(KEY, _rows(number, day=SECOND if number % 2 else FIRST))
        expected.append(number)
        assert read(reader) == expected
        assert read(writer) == expected
        assert reader.version(KEY) == number
    reader.replace(KEY, _rows(99, day=SECOND), DayRange(SECOND, SECOND))
    assert read(writer) == read(reader) == [0, 2, 4, 6, 8, 10, 99]


def test_a_reader_sees_new_rows_after_the_log_was_cut(tmp_path: Path) -> None:
    writer, reader = Lake(str(tmp_path)), Lake(str(tmp_path))
    for number in range(3):
        writer.append(KEY, _rows(number))
    assert _by_days(reader) == [0, 1, 2]
    for number in range(3, 6):
        writer.append(KEY, _rows(number))
    writer.table(KEY).create_checkpoint()
    for commit in sorted((tmp_path / "raw" / "things" / "_delta_log").glob("*.json"))[:-1]:
        commit.unlink()  # the reader's own version and the one after it among them
    assert _by_days(reader) == [0, 1, 2, 3, 4, 5]


def test_what_was_read_is_kept_for_the_next_reader_and_dropped_once_outdated(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.append(KEY, _rows(1, 2))
    first = lake.read(KEY, DAYS)
    assert lake.read(KEY, DAYS) is first
    lake.append(KEY, _rows(3))
    assert lake.read(KEY, DAYS)["value"].sort().to_list() == [1, 2, 3]
    assert len(lake._kept) == 1
    assert lake.read(KEY, DAYS, version=0)["value"].sort().to_list() == [1, 2]


def test_the_frames_kept_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 8_000)
    monkeypatch.setattr(module, "_LARGEST_KEPT", 2_000)
    lake = Lake(str(tmp_path))
    for number in range(9):
        lake.append(("raw", f"small{number}"), _rows(*range(100)))
        assert lake.read(("raw", f"small{number}"), DAYS).height == 100
    lake.append(("raw", "large"), _rows(*range(1_000)))
    assert lake.read(("raw", "large"), DAYS).height == 1_000
    sizes = [frame.estimated_size() for frame in lake._kept.values()]
    assert sum(sizes) <= 8_000
    assert max(sizes) <= 2_000
    assert [place[0][1] for place in lake._kept] == [f"small{n}" for n in range(9 - len(sizes), 9)]


def test_a_frame_that_grows_may_drive_out_another_of_the_same_table_while_both_follow_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 4_000)
    monkeypatch.setattr(module, "_LARGEST_KEPT", 4_000)
    lake = Lake(str(tmp_path))
    lake.append(KEY, _rows(*range(100)))
    ranges = [DayRange(_DAYS_OF_TEST[0], last) for last in _DAYS_OF_TEST]
    for days in ranges:
        lake.read(KEY, days)
    assert len(lake._kept) > 1
    lake.append(KEY, _rows(*range(100, 200)))
    assert sum(frame.estimated_size() for frame in lake._kept.values()) <= 4_000
    assert [lake.read(KEY, days).height for days in ranges] == [200] * len(ranges)


_DAYS_OF_TEST = [date(2013, 9, n) for n in range(1, 5)]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "replace", "other appends", "other replaces", "read"]),
            st.integers(0, 3),
            st.integers(0, 3),
            st.lists(st.integers(0, 9), max_size=3),
        ),
        max_size=12,
    )
)
def test_kept_frames_follow_every_commit_exactly(steps: list[tuple[str, int, int, list[int]]]) -> None:
    """Whatever is written here and elsewhere, in whatever order: a read gives what a fresh reader finds on the disk."""
    with tempfile.TemporaryDirectory() as root:
        lake, other = Lake(root), Lake(root)
        lake.append(KEY, _rows(0))
        for action, first, last, values in steps:
            days = DayRange(_DAYS_OF_TEST[min(first, last)], _DAYS_OF_TEST[max(first, last)])
            writer = other if action.startswith("other") else lake
            if "append" in action:
                writer.append(KEY, _rows(*values, day=days.first))
            elif "replace" in action:
                writer.replace(KEY, _rows(*values, day=days.last), days)
            else:
                assert _sorted(lake.read(KEY, days)).equals(_sorted(Lake(root).read(KEY, days)))
            assert _sorted(lake.read(KEY)).equals(_sorted(Lake(root).read(KEY)))


def _sorted(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.sort(frame.columns)


def test_rows_of_another_type_are_read_back_from_the_table(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.append(KEY, _rows(1))
    assert _by_days(lake) == [1]
    lake.append(KEY, _rows(2).with_columns(pl.col("value").cast(pl.Int32)))
    assert lake.read(KEY, DAYS).schema["value"] == pl.Int64
    assert _by_days(lake) == [1, 2]
