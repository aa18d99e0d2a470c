"""The join bench at a small size: the engines it times must agree, and its comparison must see a difference."""

import json
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from mlplatform.local import bench_join
from mlplatform.local.join_contenders import BARE, CORRECTED, DUCKDB, STORE, contenders, duckdb_reads_delta, entity_rows, write_lake


def test_bare_polars_agrees_under_its_own_rule_and_leaks_under_ours(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_join, "TABLE_ROWS", 100_000)
    monkeypatch.setattr(bench_join, "_stock_installed", lambda: False)
    assert bench_join.run_bench_join(3000, rounds=1, as_json=True) in (0, 1)  # the ratio is the bench's business, not a test's
    lines = {line["engine"]: line for line in json.loads(capsys.readouterr().out)["engines"]}
    assert all(line["rows_out"] == 3000 and line["in_order"] for line in lines.values())
    assert lines[BARE]["cells_different"] == lines[STORE]["cells_different"] == 0
    assert lines[CORRECTED]["cells_different"] > 0


@pytest.mark.skipif(find_spec("ibis") is None or find_spec("duckdb") is None, reason="the bench extra is not installed")
@pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
def test_feast_duckdb_agrees_with_this_store_cell_by_cell(tmp_path: Path) -> None:
    write_lake(tmp_path / "lake", 20_000)
    racing = {c.name: c for c in contenders(tmp_path, tmp_path / "lake", stock=True)}
    asked = entity_rows(2000)
    with duckdb_reads_delta():
        theirs, ours = (bench_join.plain(racing[name].answer(asked.copy())) for name in (DUCKDB, STORE))
    assert theirs.height == ours.height == 2000
    assert ours.select(pl.exclude("row")).null_count().sum_horizontal().item() < 2000 * 30
    assert bench_join.different_cells(ours, theirs) == 0


def test_a_different_cell_is_counted_and_a_missing_row_is_not_one() -> None:
    expected = pl.DataFrame({"row": [0, 1, 2], "f": [1.0, None, 3.0], "g": [None, 1.0, 1.0]})
    got = pl.DataFrame({"row": [2, 0], "f": [3.5, 1.0], "g": [None, None]})
    assert bench_join.different_cells(expected, got) == 2


def test_the_memory_of_a_join_is_that_of_its_own_process(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_join, "MEMORY_TABLE_ROWS", 10_000)
    assert bench_join.run_bench_join_memory(1000, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_out"] == 1000
    assert 0 < found["before_gb"] <= found["peak_gb"] < found["limit_gb"]
