from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from mlplatform.specs import Column, Contract, Coverage, FileReader, SourceSpec
from mlplatform.validation.split import SplitResult, split
from mlplatform.validation.table import coverage, judge

DAY = datetime(2024, 3, 1, tzinfo=UTC)
MIDNIGHT = DAY + timedelta(days=1)
SCHEMA = {"at": pl.Datetime("us", "UTC"), "level": pl.Float64(), "received_at": pl.Datetime("us", "UTC")}


def spec(max_quarantine_share: float = 0.1, max_age: timedelta | None = timedelta(hours=6), time_column: str | None = "at") -> SourceSpec:
    columns = (
        Column(name="at", dtype="timestamp"),
        Column(name="level", dtype="float", nullable=True, minimum=0, max_null_share=0.25),
    )
    contract = Contract(columns=columns, key=("at",), max_quarantine_share=max_quarantine_share, max_age=max_age)
    return SourceSpec(
        name="gauge", description="", reader=FileReader(connection="files", path="x"), contract=contract, time_column=time_column
    )


def hours(*levels: float | None, declared: SourceSpec) -> SplitResult:
    rows = [{"at": DAY + timedelta(hours=h), "level": level, "received_at": DAY + timedelta(hours=h)} for h, level in enumerate(levels)]
    return split(pl.DataFrame(rows, schema=SCHEMA), declared, {})


def failures(*levels: float | None, declared: SourceSpec, now: datetime | None = None, rows_expected: bool = True) -> tuple[str, ...]:
    return judge(hours(*levels, declared=declared), declared, now, rows_expected).failures


def test_a_sound_day_has_no_failures() -> None:
    assert failures(*[1.0] * 24, declared=spec(), now=MIDNIGHT) == ()


def test_too_many_quarantined_rows_fail_and_the_reasons_are_told() -> None:
    (told,) = failures(*[1.0] * 18, *[-1.0] * 4, declared=spec())
    assert told.startswith("4 of 22 rows quarantined (18.2%), allowed 10.0%")
    assert "range:level 4" in told


def test_one_bad_row_among_few_does_not_stop_the_table() -> None:
    assert failures(1.0, -1.0, declared=spec(0.01)) == ()


def test_a_share_of_zero_allows_no_bad_row() -> None:
    assert len(failures(*[1.0] * 500, -1.0, declared=spec(0.0))) == 1


def test_redelivered_rows_do_not_dilute_the_share() -> None:
    declared = spec(0.1)
    rows = pl.DataFrame(
        [{"at": DAY + timedelta(hours=h), "level": -1.0 if h < 2 else 1.0, "received_at": DAY} for h in range(10)], schema=SCHEMA
    )
    repeated = pl.concat([rows, *[rows.tail(1)] * 50])
    assert len(judge(split(repeated, declared, {}), declared).failures) == 1


def test_too_many_nulls_fail_although_each_row_is_valid() -> None:
    assert failures(1.0, None, None, declared=spec()) == ("level is null in 66.7% of the rows, allowed 25.0%",)


def test_the_newest_row_may_be_as_old_as_declared_and_no_older() -> None:
    assert failures(1.0, declared=spec(), now=DAY + timedelta(hours=6)) == ()
    (told,) = failures(1.0, declared=spec(), now=DAY + timedelta(hours=6, microseconds=1))
    assert told.startswith("the newest at is 2024-03-01 00:00 UTC")


def test_age_is_not_judged_without_a_now_or_a_limit() -> None:
    assert failures(1.0, declared=spec()) == ()
    assert failures(1.0, declared=spec(max_age=None), now=MIDNIGHT) == ()


def test_a_source_without_a_time_column_is_as_old_as_its_last_arrival() -> None:
    (told,) = failures(1.0, declared=spec(time_column=None), now=MIDNIGHT)
    assert "received_at" in told


def test_now_must_carry_a_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        failures(1.0, declared=spec(), now=MIDNIGHT.replace(tzinfo=None))


def test_an_empty_table_fails_only_where_rows_are_expected() -> None:
    assert failures(declared=spec(), now=MIDNIGHT) == ("no rows where rows are expected",)
    assert failures(declared=spec(), now=MIDNIGHT, rows_expected=False) == ()


def test_a_table_of_bad_rows_only_fails_however_few_they_are() -> None:
    assert failures(-1.0, declared=spec()) == ("none of 1 rows is valid",)


# --- coverage -----------------------------------------------------------------------------------------------------

HOURLY = Coverage(source="trips", columns=(), at="leaves", every=timedelta(hours=1), values=("level",))


def trips(*minutes: int) -> pl.DataFrame:
    return pl.DataFrame({"leaves": [DAY + timedelta(minutes=m) for m in minutes]}, schema={"leaves": pl.Datetime("us", "UTC")})


def test_coverage_counts_rows_whose_hour_has_no_row_or_no_value() -> None:
    answering = hours(1.0, None, 1.0, declared=spec()).validated
    result = coverage(answering, spec(), HOURLY, trips(0, 59, 60, 119, 120, 180))
    assert (result.name, result.needed, result.missing) == ("coverage:trips", 6, 3)
    assert result.missing_share == 0.5


def test_coverage_of_nothing_is_complete() -> None:
    assert coverage(hours(declared=spec()).validated, spec(), HOURLY, trips()).missing_share == 0.0


def test_coverage_needs_a_time_to_be_covered_by() -> None:
    with pytest.raises(ValueError, match="no time column"):
        coverage(trips(), spec(time_column=None), HOURLY, trips())
