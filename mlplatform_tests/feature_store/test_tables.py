"""Feature tables read at versions named beforehand."""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from mlplatform.feature_store.tables import FeatureTable, UnpinnedError, pinned

AT = datetime(2013, 9, 1, tzinfo=UTC)


def table(folder: Path, name: str = "t") -> FeatureTable:
    made = FeatureTable(str(folder / name), delta=True, event="at", day="day")
    for value in (1, 2):
        made.append(pl.DataFrame({"at": [AT], "value": [value]}))
    return made


def values(of: FeatureTable) -> list[int]:
    return of.read(["value"])["value"].sort().to_list()


def test_within_pins_a_table_is_as_it_was_and_others_and_later_reads_are_as_they_are(tmp_path: Path) -> None:
    one, other = table(tmp_path), table(tmp_path, "other")
    with pinned({f"{tmp_path}/./t/": 0}):
        one.append(pl.DataFrame({"at": [AT], "value": [3]}))
        assert (values(one), values(other)) == ([1], [1, 2])
        with pinned({one.uri: 1}):
            assert values(one) == [1, 2]
        assert values(one) == [1]
    assert values(one) == [1, 2, 3]


def test_a_pin_that_no_read_used_is_told_and_hides_no_other_fault(tmp_path: Path) -> None:
    one = table(tmp_path)
    with pytest.raises(UnpinnedError, match="elsewhere"), pinned({one.uri: 0, "elsewhere": 3}):
        values(one)
    with pytest.raises(ZeroDivisionError), pinned({"elsewhere": 3}):
        _ = 1 / 0
    assert values(one) == [1, 2]
