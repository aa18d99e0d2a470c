"""Reading tables: SQLite and Postgres, whole or not at all."""

import sqlite3
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa

from mlplatform.ingestion.cast import schema_of
from mlplatform.ingestion.errors import SourceDownError, SourceNonsenseError, SourceRefusedError
from mlplatform.ingestion.sql import read_table
from mlplatform.specs import Column, Contract, SqlReader

Make = Callable[[str], str]
READER = SqlReader(connection="reference", table="things")
ROWS = [
    ("a", 1, "2013-01-02 03:04:05.000006", 1.5, 1, "2013-01-02"),
    ("b", 2, "2013-01-02T03:04:05Z", None, 0, None),
]


@pytest.fixture
def sqlite(tmp_path: Path) -> Make:
    def make(statements: str, rows: list[tuple[object, ...]] = ROWS) -> str:
        with sqlite3.connect(tmp_path / "db.sqlite") as connection:
            connection.execute(statements)
            if rows:
                connection.executemany(f"insert into things values ({','.join('?' * len(rows[0]))})", rows)
        connection.close()
        return f"sqlite:///{tmp_path / 'db.sqlite'}"

    return make


TABLE = "create table things (id text, n integer, at timestamp, x real, ok boolean, day date)"


def test_a_sqlite_table_comes_with_the_contracts_types(sqlite: Make, contract: Contract) -> None:
    reading = read_table(READER, sqlite(TABLE), contract)
    assert reading.rows.schema == schema_of(contract)
    assert reading.rows.row(0) == ("a", 1, datetime(2013, 1, 2, 3, 4, 5, 6, UTC), 1.5, True, date(2013, 1, 2))
    assert reading.rows.row(1) == ("b", 2, datetime(2013, 1, 2, 3, 4, 5, tzinfo=UTC), None, False, None)


def test_a_view_is_read_like_a_table(sqlite: Make, contract: Contract) -> None:
    url = sqlite(TABLE)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("create view seen as select * from things where n = 1")
    connection.close()
    assert read_table(SqlReader(connection="reference", table="seen"), url, contract).rows.height == 1


def test_an_empty_table_keeps_the_contracts_types(sqlite: Make, contract: Contract) -> None:
    reading = read_table(READER, sqlite(TABLE, []), contract)
    assert reading.rows.schema == schema_of(contract)
    assert reading.rows.is_empty()


def test_a_column_that_is_null_throughout_stays(sqlite: Make, contract: Contract) -> None:
    rows = [("a", 1, "2013-01-02T00:00:00Z", None, None, None)]
    assert read_table(READER, sqlite(TABLE, rows), contract).rows.row(0)[3:] == (None, None, None)


def test_columns_beyond_the_contract_are_dropped_and_named(sqlite: Make) -> None:
    narrow = Contract(columns=(Column(name="id", dtype="string"),), key=("id",))
    reading = read_table(READER, sqlite(TABLE), narrow)
    assert reading.rows.columns == ["id"]
    assert reading.dropped == ("at", "day", "n", "ok", "x")


@pytest.mark.parametrize(
    ("column", "position", "value"),
    [
        ("n", 1, "twelve"),
        ("n", 1, 1.5),
        ("ok", 4, 0.5),
        ("n", 1, b"12"),
        ("at", 2, "yesterday"),
        ("x", 3, "much"),
        ("ok", 4, 7),
        ("day", 5, "2013-02-30"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_column(
    sqlite: Make, contract: Contract, column: str, position: int, value: object
) -> None:
    bad = list(ROWS[0])
    bad[position] = value
    with pytest.raises(SourceNonsenseError, match=f"'{column}'") as told:
        read_table(READER, sqlite(TABLE, [*ROWS, tuple(bad)]), contract)
    assert told.value.column == column
    assert str(value) in str(told.value)


def test_a_missing_column_is_named_even_in_an_empty_table(sqlite: Make, contract: Contract) -> None:
    with pytest.raises(SourceNonsenseError, match="'day' is missing") as told:
        read_table(READER, sqlite("create table things (id text, n integer, at timestamp, x real, ok boolean)", []), contract)
    assert told.value.column == "day"


def test_a_missing_table_is_a_refusal(sqlite: Make, contract: Contract) -> None:
    with pytest.raises(SourceRefusedError, match="no such table"):
        read_table(SqlReader(connection="reference", table="nothing"), sqlite(TABLE), contract)


def test_a_missing_file_is_down_and_is_not_created(tmp_path: Path, contract: Contract) -> None:
    with pytest.raises(SourceDownError, match="not there"):
        read_table(READER, f"sqlite:///{tmp_path / 'no.sqlite'}", contract)
    assert not (tmp_path / "no.sqlite").exists()


def test_a_file_that_is_no_database_fails_clearly(tmp_path: Path, contract: Contract) -> None:
    (tmp_path / "text.sqlite").write_text("this is not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(SourceNonsenseError, match="not a database"):
        read_table(READER, f"sqlite:///{tmp_path / 'text.sqlite'}", contract)


@pytest.mark.parametrize("url", ["nonsense", "unknown://host/db", ""])
def test_an_address_that_is_no_database_url_is_refused(url: str, contract: Contract) -> None:
    with pytest.raises(SourceRefusedError, match="no database URL"):
        read_table(READER, url, contract)


def test_a_server_that_does_not_listen_is_down_and_its_password_stays_secret(contract: Contract) -> None:
    with pytest.raises(SourceDownError) as told:
        read_table(READER, "postgresql://me:hush@127.0.0.1:1/db", contract)
    assert "hush" not in str(told.value)


@pytest.mark.postgres
def test_a_postgres_table_comes_with_the_contracts_types(postgres: str, contract: Contract) -> None:
    engine = sa.create_engine(postgres.replace("postgresql://", "postgresql+psycopg2://"))
    with engine.begin() as connection:
        connection.execute(sa.text("create schema shop"))
        connection.execute(
            sa.text(
                "create table shop.things (id varchar(9), n bigint, at timestamptz, x numeric, ok boolean, day date,"
                " extra jsonb, other uuid)"
            )
        )
        connection.execute(
            sa.text(
                "insert into shop.things values ('a', 1, '2013-01-02 03:04:05.000006-05', 1.123456789012, true, '2013-01-02', '{}', null),"
                " ('b', 2, '2013-01-02 03:04:05+00', null, null, null, null, null)"
            )
        )
        connection.execute(sa.text("create table naive (id text, n numeric(9,2), at timestamp, x real, ok boolean, day date)"))
        connection.execute(sa.text("insert into naive values ('a', 7, '2013-01-02 03:04:05', 2.5, true, null)"))
        connection.execute(sa.text("create table many as select g::text as id, g as n, now() as at, g::float8 as x, true as ok,"
                                   " current_date as day from generate_series(1, 120000) g"))  # fmt: skip
    engine.dispose()
    reading = read_table(SqlReader(connection="reference", table="shop.things"), postgres, contract)
    assert reading.rows.row(0) == ("a", 1, datetime(2013, 1, 2, 8, 4, 5, 6, UTC), 1.123456789012, True, date(2013, 1, 2))
    assert reading.rows.row(1) == ("b", 2, datetime(2013, 1, 2, 3, 4, 5, tzinfo=UTC), None, None, None)
    assert reading.dropped == ("extra", "other")
    naive = read_table(SqlReader(connection="reference", table="naive"), postgres, contract).rows
    assert naive.row(0) == ("a", 7, datetime(2013, 1, 2, 3, 4, 5, tzinfo=UTC), 2.5, True, None)
    many = read_table(SqlReader(connection="reference", table="many"), postgres, contract).rows
    assert many.height == many.select(pl.col("id").n_unique()).item() == 120_000


@pytest.mark.postgres
def test_postgres_says_what_is_wrong(postgres: str, contract: Contract) -> None:
    with pytest.raises(SourceRefusedError, match="does not exist"):
        read_table(READER, postgres.replace("/postgres?", "/absent?"), contract)
    with pytest.raises(SourceRefusedError, match="no such table"):
        read_table(SqlReader(connection="reference", table="nothing"), postgres, contract)


@pytest.mark.postgres
def test_a_query_that_takes_too_long_is_stopped(postgres: str, contract: Contract) -> None:
    engine = sa.create_engine(postgres.replace("postgresql://", "postgresql+psycopg2://"))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "create view slow as select 'a' as id, 1 as n, now() as at, 1.0 as x, true as ok, current_date as day from pg_sleep(30)"
            )
        )
    engine.dispose()
    with pytest.raises(SourceDownError, match="too slow"):
        read_table(SqlReader(connection="reference", table="slow"), postgres, contract, deadline_s=0.5)
