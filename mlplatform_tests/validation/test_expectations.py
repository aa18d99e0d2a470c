import importlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from mlplatform.specs import Column, Contract, FileReader, Reference, RowRule, SourceSpec
from mlplatform.validation.split import split

# Great Expectations 1.24 imports two modules Python 3.11 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

START = datetime(2024, 3, 1, tzinfo=UTC)
SPEC = SourceSpec(
    name="gauges",
    description="Levels of the river",
    reader=FileReader(connection="files", path="x"),
    time_column="at",
    contract=Contract(
        columns=(
            Column(name="site", dtype="string", pattern="^[ab]$"),
            Column(name="at", dtype="timestamp"),
            Column(name="level", dtype="float", minimum=0, maximum=12, nullable=True, max_null_share=0.5),
            Column(name="state", dtype="string", allowed=("on", "off")),
        ),
        key=("site", "at"),
        references=(Reference(columns=("site",), source="sites", to=("id",)),),
        rules=(RowRule(name="flood", description="Above the dam", broken=lambda: pl.col("level") > 10),),
    ),
)
REFERENCES = {"sites": pl.DataFrame({"id": ["a"]})}


@pytest.fixture(scope="module")
def expectations() -> ModuleType:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "module 'sre_", DeprecationWarning)
        return importlib.import_module("mlplatform.validation.expectations")


def readings(*changes: dict[str, Any]) -> pl.DataFrame:
    sound = {"site": "a", "level": 5.0, "state": "on", "received_at": START}
    rows = [sound | {"at": START + timedelta(hours=h)} | change for h, change in enumerate(changes)]
    moment = pl.Datetime("us", "UTC")
    return pl.DataFrame(
        rows, schema={"site": pl.String(), "at": moment, "level": pl.Float64(), "state": pl.String(), "received_at": moment}
    )


def test_sound_rows_meet_every_expectation(expectations: ModuleType) -> None:
    result = expectations.run_suite(readings({}, {}, {}), SPEC, references=REFERENCES)
    assert result.success
    assert result.failed == ()
    assert result.statistics["evaluated_expectations"] == len(expectations.suite_of(SPEC).expectations)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"level": 99.0}, "level must be between: 1 of 3 rows do not (99.0)"),
        ({"level": 11.0}, "rule flood: broken by 1 of 3 rows"),
        ({"state": "odd"}, "state must be in set: 1 of 3 rows do not (odd)"),
        ({"state": None}, "state must not be null: 1 of 3 rows do not"),
        ({"site": "c"}, "site must match regex: 1 of 3 rows do not (c)"),
        ({"at": START}, "site, at must be unique: 2 of 3 rows do not"),
    ],
)
def test_what_the_split_sets_aside_the_suite_shows(expectations: ModuleType, change: dict[str, Any], told: str) -> None:
    rows = readings({}, {}, {"level": 4.0} | change)
    result = expectations.run_suite(rows, SPEC, references=REFERENCES)
    assert split(rows, SPEC, REFERENCES).summary.quarantined == 1
    assert not result.success
    assert any(text.startswith(told) for text in result.failed), result.failed


def test_a_warning_is_shown_but_does_not_fail_the_suite(expectations: ModuleType) -> None:
    result = expectations.run_suite(readings({}, {"site": "b"}), SPEC, references=REFERENCES)
    assert result.success
    assert result.failed == ("rule reference:sites: broken by 1 of 2 rows (warning)",)


def test_references_that_were_not_handed_in_are_not_expected(expectations: ModuleType) -> None:
    assert expectations.run_suite(readings({"site": "b"}), SPEC).failed == ()


def test_an_empty_table_can_be_expected_of_nothing(expectations: ModuleType) -> None:
    assert expectations.run_suite(readings(), SPEC, references=REFERENCES).success


def test_unreadable_entries_are_left_out(expectations: ModuleType) -> None:
    rows = readings({}, {"state": None, "site": None}).with_columns(payload=pl.Series([None, "{oops"]))
    assert expectations.run_suite(rows, SPEC, references=REFERENCES).success


def test_the_page_is_written_and_fetches_nothing(expectations: ModuleType, tmp_path: Path) -> None:
    result = expectations.run_suite(readings({"level": 99.0}), SPEC, tmp_path, REFERENCES, run="2024-03-01")
    assert result.docs_path == tmp_path / "gauges" / "2024-03-01.html"
    page = result.docs_path.read_text(encoding="utf-8")
    assert "https://" not in page
    assert "http://" not in page
    assert "<script" not in page
    assert not re.search(r"<(?:link|img|iframe)\b", page)
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "Unsuccessful Expectations 2" in shown
    assert "2024-03-01" in shown


def test_a_page_cannot_be_written_outside_its_folder(expectations: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a page"):
        expectations.run_suite(readings({}), SPEC, tmp_path, REFERENCES, run="../secret")
