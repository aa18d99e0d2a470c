"""Reading CSV and Parquet, by day, from a folder and from a real S3 server."""

import time
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
from pyarrow.fs import S3FileSystem

from mlplatform.ingestion.cast import schema_of
from mlplatform.ingestion.errors import SourceDownError, SourceError, SourceNonsenseError, SourceRefusedError, SourceTruncatedError
from mlplatform.ingestion.files import read_files
from mlplatform.records import DayRange
from mlplatform.specs import Contract, FileReader

Format = Literal["csv", "parquet"]
FIRST = date(2013, 9, 1)
WEEK = DayRange(FIRST, FIRST + timedelta(days=6))


def reader(path: str, kind: Format = "parquet") -> FileReader:
    return FileReader(connection="archive", path=path, format=kind)


def day_rows(day: date, count: int = 3) -> pl.DataFrame:
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return pl.DataFrame(
        {
            "id": [f"{day}-{k}" for k in range(count)],
            "n": list(range(count)),
            "at": [start + timedelta(minutes=k) for k in range(count)],
            "x": [None, *([1.5] * (count - 1))],
            "ok": [True] * count,
            "day": [day] * count,
        },
        schema_overrides={"at": pl.Datetime("us", "UTC")},
    )


def put(path: Path, rows: pl.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        rows.write_csv(path, datetime_format="%Y-%m-%dT%H:%M:%SZ")
    else:
        rows.write_parquet(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("path", ["events/{date}.{kind}", "{date}.{kind}", "events/day={date}/part.{kind}"])
def test_the_files_of_the_days_asked_for_come_in_order(tmp_path: Path, contract: Contract, kind: Format, path: str) -> None:
    path = path.replace("{kind}", kind)
    present = [FIRST - timedelta(days=1), FIRST, FIRST + timedelta(days=2)]
    for day in present:
        put(tmp_path / path.replace("{date}", str(day)), day_rows(day))
    reading = read_files(reader(path, kind), str(tmp_path), contract, WEEK)
    assert reading.days == tuple(present[1:])
    assert reading.rows.equals(pl.concat([day_rows(day) for day in present[1:]]))


def test_days_without_any_file_give_no_rows_and_no_error(tmp_path: Path, contract: Contract) -> None:
    reading = read_files(reader("events/{date}.parquet"), str(tmp_path), contract, WEEK)
    assert reading.days == ()
    assert reading.rows.schema == schema_of(contract)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_file_without_a_date(tmp_path: Path, contract: Contract, kind: Format) -> None:
    put(tmp_path / f"all.{kind}", day_rows(FIRST))
    reading = read_files(reader(f"all.{kind}", kind), str(tmp_path), contract)
    assert reading.rows.equals(day_rows(FIRST))
    assert reading.days == ()


def test_the_time_of_arrival_is_kept_where_a_file_has_it(tmp_path: Path, contract: Contract, noon: datetime) -> None:
    put(tmp_path / f"{FIRST}.parquet", day_rows(FIRST).with_columns(received_at=pl.lit(noon), spare=1))
    put(tmp_path / f"{FIRST + timedelta(days=1)}.parquet", day_rows(FIRST + timedelta(days=1)))
    reading = read_files(reader("{date}.parquet"), str(tmp_path), contract, WEEK)
    assert reading.rows["received_at"].to_list() == [noon] * 3 + [None] * 3
    assert reading.dropped == ("spare",)


def test_files_of_other_types_and_column_orders_fit_if_their_values_do(tmp_path: Path, contract: Contract) -> None:
    odd = day_rows(FIRST).select(
        pl.col("day").cast(pl.Datetime("ms")),
        pl.col("at").dt.replace_time_zone(None).dt.cast_time_unit("ns"),
        pl.col("n").cast(pl.Float32),
        pl.col("id").cast(pl.Categorical),
        pl.lit(None).alias("x"),
        pl.col("ok").cast(pl.Int8),
    )
    put(tmp_path / "odd.parquet", odd)
    expected = day_rows(FIRST).with_columns(x=pl.lit(None, pl.Float64))
    assert read_files(reader("odd.parquet"), str(tmp_path), contract).rows.equals(expected)


def test_a_csv_may_have_quotes_line_breaks_null_words_and_no_final_line_break(tmp_path: Path, contract: Contract) -> None:
    (tmp_path / "f.csv").write_text(
        'id,n,at,x,ok,day\n"a,\n""b""",1,2013-09-01 00:00:00,NaN,TRUE,\n"",2.0,2013-09-01,NA,,NA\n'
        "NA,3,2013-09-01T00:00+02:00,1e3,0,2013-09-01"
    )
    rows = read_files(reader("f.csv", "csv"), str(tmp_path), contract).rows
    start = datetime(2013, 9, 1, tzinfo=UTC)
    assert rows.rows() == [
        ('a,\n"b"', 1, start, None, True, None),
        ("", 2, start, None, None, None),
        ("NA", 3, start - timedelta(hours=2), 1000.0, False, FIRST),
    ]


def test_a_csv_with_only_a_header_is_empty(tmp_path: Path, contract: Contract) -> None:
    (tmp_path / "f.csv").write_text("id,n,at,x,ok,day\n")
    assert read_files(reader("f.csv", "csv"), str(tmp_path), contract).rows.schema == schema_of(contract)


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ("a,one,2013-09-01,,,", "n"),
        ("a,1.5,2013-09-01,,,", "n"),
        ("a,1,soon,,,", "at"),
        ("a,1,2013-09-01,,maybe,", "ok"),
        ("a,1,2013-09-01,x,,", "x"),
    ],
)
def test_a_csv_value_of_another_type_is_named_with_file_and_column(tmp_path: Path, contract: Contract, line: str, column: str) -> None:
    (tmp_path / "f.csv").write_text(f"id,n,at,x,ok,day\n{line}\n")
    with pytest.raises(SourceNonsenseError, match=rf"f\.csv.*'{column}'") as told:
        read_files(reader("f.csv", "csv"), str(tmp_path), contract)
    assert told.value.column == column


def test_a_number_written_as_text_in_parquet_is_nonsense(tmp_path: Path, contract: Contract) -> None:
    put(tmp_path / "f.parquet", day_rows(FIRST).with_columns(pl.col("n").cast(pl.String)))
    with pytest.raises(SourceNonsenseError, match="'n' should be int, but 3 of 3"):
        read_files(reader("f.parquet"), str(tmp_path), contract)


def test_a_missing_column_is_named_with_the_file(tmp_path: Path, contract: Contract) -> None:
    put(tmp_path / f"{FIRST}.parquet", day_rows(FIRST).drop("ok"))
    with pytest.raises(SourceNonsenseError, match=rf"{FIRST}\.parquet.*'ok' is missing"):
        read_files(reader("{date}.parquet"), str(tmp_path), contract, WEEK)


def test_half_a_file_among_good_ones_gives_no_rows_at_all(tmp_path: Path, contract: Contract) -> None:
    for k in range(3):
        put(tmp_path / f"{FIRST + timedelta(days=k)}.parquet", day_rows(FIRST + timedelta(days=k), 50))
    cut = tmp_path / f"{FIRST + timedelta(days=1)}.parquet"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(SourceTruncatedError, match="footer"):
        read_files(reader("{date}.parquet"), str(tmp_path), contract, WEEK)


@pytest.mark.parametrize("keep", [0, 1, 60])
def test_a_csv_cut_in_the_middle_of_a_row_is_truncated(tmp_path: Path, contract: Contract, keep: int) -> None:
    put(tmp_path / "f.csv", day_rows(FIRST, 5))
    content = (tmp_path / "f.csv").read_bytes()
    (tmp_path / "f.csv").write_bytes(content[:keep])
    with pytest.raises((SourceTruncatedError, SourceNonsenseError)):
        read_files(reader("f.csv", "csv"), str(tmp_path), contract)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_damage_is_always_a_source_error(tmp_path: Path, contract: Contract, kind: Format) -> None:
    put(tmp_path / f"f.{kind}", day_rows(FIRST, 200))
    content = bytearray((tmp_path / f"f.{kind}").read_bytes())
    for position in range(10, len(content) - 10, max(1, len(content) // 25)):
        damaged = bytearray(content)
        damaged[position : position + 6] = b"\xff\x00\xfe,\n\x01"
        (tmp_path / f"f.{kind}").write_bytes(damaged)
        try:
            read_files(reader(f"f.{kind}", kind), str(tmp_path), contract)
        except SourceError:
            continue


@pytest.mark.parametrize("content", [b"<html>moved</html>", b'{"id": 1}'])
def test_another_kind_of_file_is_nonsense(tmp_path: Path, contract: Contract, content: bytes) -> None:
    (tmp_path / "f.parquet").write_bytes(content)
    with pytest.raises(SourceNonsenseError, match="not a Parquet file"):
        read_files(reader("f.parquet"), str(tmp_path), contract)


def test_a_missing_file_and_a_missing_folder_are_down(tmp_path: Path, contract: Contract) -> None:
    with pytest.raises(SourceDownError, match="file is not there"):
        read_files(reader("f.parquet"), str(tmp_path), contract)
    with pytest.raises(SourceDownError, match="folder is not there"):
        read_files(reader("{date}.parquet"), str(tmp_path / "unmounted"), contract, WEEK)


def test_another_kind_of_address_is_refused(contract: Contract) -> None:
    with pytest.raises(SourceRefusedError, match="neither"):
        read_files(reader("f.parquet"), "gs://bucket", contract)


def test_days_belong_to_paths_with_a_date(tmp_path: Path, contract: Contract) -> None:
    with pytest.raises(ValueError, match="days"):
        read_files(reader("{date}.parquet"), str(tmp_path), contract)
    with pytest.raises(ValueError, match="days"):
        read_files(reader("f.parquet"), str(tmp_path), contract, WEEK)


def test_six_hundred_thousand_rows_are_read_in_seconds(tmp_path: Path, contract: Contract) -> None:
    days = [date(2013, 1, 1) + timedelta(days=k) for k in range(60)]
    for day in days:
        put(tmp_path / f"{day}.parquet", day_rows(day, 11_000))
    started = time.monotonic()
    reading = read_files(reader("{date}.parquet"), str(tmp_path), contract, DayRange(days[0], days[-1]))
    assert reading.rows.height == 660_000
    assert time.monotonic() - started < 30  # measured: 1 s on two idle cores


@pytest.mark.s3
def test_files_of_an_s3_prefix(s3: tuple[str, dict[str, str]], contract: Contract) -> None:
    root, options = s3
    files = S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=options["AWS_ENDPOINT_URL"][7:], scheme="http", region="us-east-1"
    )

    def upload(path: str, rows: pl.DataFrame) -> None:
        content = BytesIO()
        rows.write_parquet(content) if path.endswith("parquet") else rows.write_csv(content)
        with files.open_output_stream(f"bucket/archive/{path}") as stream:
            stream.write(content.getvalue())

    days = [FIRST, FIRST + timedelta(days=3)]
    for day in days:
        upload(f"events/{day}.parquet", day_rows(day))
    upload("all.csv", day_rows(FIRST))
    reading = read_files(reader("events/{date}.parquet"), root, contract, WEEK, options)
    assert reading.days == tuple(days)
    assert reading.rows.equals(pl.concat([day_rows(day) for day in days]))
    assert read_files(reader("all.csv", "csv"), root, contract, storage_options=options).rows.equals(day_rows(FIRST))
    assert read_files(reader("none/{date}.parquet"), root, contract, WEEK, options).days == ()
    with pytest.raises(SourceDownError, match="not there"):
        read_files(reader("none.csv", "csv"), root, contract, storage_options=options)
    with pytest.raises(SourceRefusedError, match="credentials"):
        read_files(reader("events/{date}.parquet"), root, contract, WEEK, {**options, "AWS_SECRET_ACCESS_KEY": "wrong"})


def test_an_s3_server_that_does_not_listen_is_down(contract: Contract) -> None:
    options: dict[str, Any] = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.raises(SourceDownError, match="storage answers"):
        read_files(reader("events/{date}.parquet"), "s3://bucket/archive", contract, WEEK, options)
