"""The lake's view of a table's past."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

from mlplatform.clients.lake import Lake

KEY = ("raw", "orders")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Three commits, each with its number in its metadata."""
    made = Lake(str(tmp_path))
    for n in range(3):
        made.append(KEY, pl.DataFrame({"n": [n]}), partitioned=False, metadata={"number": str(n)})
    return made


def test_commits_have_their_right_numbers_also_after_another_writer(lake: Lake) -> None:
    assert lake.version(KEY) == 2  # opened now, and kept open
    Lake(lake.root).append(KEY, pl.DataFrame({"n": [3]}), partitioned=False, metadata={"number": "3"})
    assert [(c["version"], c["number"]) for c in lake.commits(KEY)] == [(3, "3"), (2, "2"), (1, "1"), (0, "0")]
    assert [c["number"] for c in lake.commits(KEY, 1)] == ["3"]


def test_deltalake_itself_numbers_the_commits_of_an_older_version_wrongly(lake: Lake) -> None:
    """Why `commits` is there. Once this fails, deltalake is mended and `commits` may become one call."""
    older = DeltaTable(lake.uri(KEY), version=0).history(1)[0]
    assert (older["version"], older["number"]) == (0, "2")


def test_the_time_of_a_version_is_that_of_its_own_commit(lake: Lake) -> None:
    times = {c["number"]: datetime.fromtimestamp(c["timestamp"] / 1000, UTC) for c in lake.commits(KEY)}
    assert [lake.time_of(KEY, n) for n in range(3)] == [times["0"], times["1"], times["2"]]
    assert abs(lake.time_of(KEY, 0) - datetime.now(UTC)) < timedelta(minutes=10)
    with pytest.raises(LookupError, match="no commit 9"):
        lake.time_of(KEY, 9)
