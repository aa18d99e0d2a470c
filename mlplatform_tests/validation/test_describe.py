import re

import polars as pl

from mlplatform.specs import Column, Contract, FileReader, Reference, RowRule, SourceSpec
from mlplatform.validation.describe import check_name, checks, markdown, quarantine_columns, validated_columns
from mlplatform.validation.split import split

SPEC = SourceSpec(
    name="gauges",
    description="Levels of the river",
    reader=FileReader(connection="files", path="x"),
    time_column="at",
    contract=Contract(
        columns=(
            Column(name="site", dtype="string", description="Where", pattern="^(a|b)$"),
            Column(name="at", dtype="timestamp", description="When"),
            Column(name="level", dtype="float", description="Level", unit="m", minimum=0, maximum=12, nullable=True, max_null_share=0.1),
        ),
        key=("site", "at"),
        references=(Reference(columns=("site",), source="sites", to=("id",)),),
        rules=(RowRule(name="flood", description="Above the dam", broken=lambda: pl.col("level") > 10, on_broken="warn"),),
    ),
)


def test_columns_tell_their_unit_key_and_limits() -> None:
    site, _, level, *_ = validated_columns(SPEC)
    assert level.description == "Level [m]"
    assert level.constraints == ("from 0 to 12 m", "null in at most 10.0%")
    assert site.constraints == ("not null", "part of the key (site, at)", "matches ^(a|b)$", "found in sites (id)")


def test_columns_are_those_of_the_tables_the_split_leaves() -> None:
    moment = pl.Datetime("us", "UTC")
    rows = pl.DataFrame(schema={"site": pl.String(), "at": moment, "level": pl.Float64(), "received_at": moment})
    result = split(rows, SPEC, {"sites": pl.DataFrame({"id": ["a"]})})
    assert [c.name for c in validated_columns(SPEC)] == result.validated.columns
    assert [c.name for c in quarantine_columns(SPEC)] == result.quarantined.columns


def test_one_blocking_check_and_one_for_each_warning() -> None:
    found = checks(SPEC)
    assert [(c.name, c.blocking) for c in found] == [("contract", True), ("reference_sites", False), ("flood", False)]
    assert "at most 2.0% of the rows quarantined" in found[0].description


def test_check_names_are_plain_words() -> None:
    assert re.fullmatch(r"\w+", check_name("reference:codes:a,b"))


def test_the_page_has_a_line_for_each_column_and_rule() -> None:
    page = markdown(SPEC)
    assert "| `level` | float | m |" in page
    assert "| `flood` | counted | Above the dam |" in page
    assert "^(a\\|b)$" in page  # a bar would end the cell
