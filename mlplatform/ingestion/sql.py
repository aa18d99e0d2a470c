"""A table of a SQL database as one frame, read through dlt's `sql_table` without a dlt pipeline.

Belongs here: connecting, reading and telling what went wrong, for SQLite and Postgres. Does not belong here: choosing the
database (the address comes in) or keeping what was read.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import sqlalchemy as sa
from dlt.common.exceptions import DltException
from dlt.common.libs.pyarrow import PyToArrowConversionException
from dlt.sources.sql_database import sql_table
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, NoSuchTableError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from mlplatform.addresses import without_password
from mlplatform.ingestion.cast import DTYPES, Reading, cast_frame, empty_rows
from mlplatform.ingestion.errors import (
    SourceDownError,
    SourceError,
    SourceNonsenseError,
    SourceRefusedError,
    missing_column,
)
from mlplatform.specs import Contract, SqlReader

CONNECT_TIMEOUT_S = 10
DEADLINE_S = 300.0
CHUNK_ROWS = 50_000

# SQLite keeps whatever was put into a column. Reading it raw leaves the judgement to our own cast, which names the
# culprit, where SQLAlchemy's converters would raise without a name or, for booleans, quietly accept anything.
# NullType: dlt infers the type from the values; told it is an integer, pyarrow would quietly cut 1.5 down to 1.
_SQLITE_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "string": sa.String(),
    "int": sa.types.NullType(),
    "float": sa.Numeric(asdecimal=False),
    "bool": sa.types.NullType(),
    "date": sa.String(),
    "timestamp": sa.String(),
}


def read_table(reader: SqlReader, url: str, contract: Contract, *, deadline_s: float = DEADLINE_S) -> Reading:
    """All rows of `reader.table` (`table` or `schema.table`), from one SELECT, so from one moment.

    Only the contract's columns are read; `Reading.dropped` names the others. Raises SourceDownError (unreachable, too
    slow), SourceRefusedError (credentials, no such table), SourceNonsenseError (a column missing or of another type).
    """
    source = f"table '{reader.table}' of sql source '{reader.connection}' ({without_password(url)})"
    engine = _engine(url, source, deadline_s)
    try:
        return _read(engine, reader.table, contract, source, deadline_s)
    except (SQLAlchemyError, DltException, OSError, ValueError) as error:
        raise _told(error, source) from error
    finally:
        engine.dispose()


def _read(engine: sa.Engine, table: str, contract: Contract, source: str, deadline_s: float) -> Reading:
    schema, _, name = table.rpartition(".")
    present = _columns(engine, name, schema or None)
    wanted = [column.name for column in contract.columns]
    for column in wanted:
        if column not in present:
            raise missing_column(source, column, present)

    def prepare(reflected: sa.Table) -> None:
        for column in reflected.columns:
            declared = contract.column(column.name)
            if engine.dialect.name == "sqlite":
                column.type = _SQLITE_TYPES[declared.dtype]
            elif isinstance(column.type, sa.Float) or (declared.dtype == "float" and isinstance(column.type, sa.Numeric)):
                column.type = sa.Numeric(asdecimal=False)

    resource = sql_table(
        credentials=engine,
        table=name,
        schema=schema or None,
        backend="pyarrow",
        chunk_size=CHUNK_ROWS,
        reflection_level="full",
        included_columns=wanted,
        table_adapter_callback=prepare,
        type_adapter_callback=lambda kind: None if isinstance(kind, sa.types.NullType) else kind,
    )
    until = time.monotonic() + deadline_s
    chunks = []
    for chunk in _tables(resource):
        if time.monotonic() > until:
            raise SourceDownError(source, f"did not finish within {deadline_s:g} s", "See what slows the database, then run again")
        frame = pl.DataFrame(pl.from_arrow(chunk))
        # dlt leaves a column out of a chunk in which it is all null.
        filled = frame.with_columns(pl.lit(None, DTYPES[c.dtype]).alias(c.name) for c in contract.columns if c.name not in frame.columns)
        chunks.append(cast_frame(filled, contract, source))
    dropped = tuple(sorted(set(present) - set(wanted)))
    return Reading(pl.concat(chunks) if chunks else empty_rows(contract), dropped)


def _tables(resource: Any) -> Iterator[pa.Table]:
    return (item for item in resource if isinstance(item, pa.Table))


def _columns(engine: sa.Engine, table: str, schema: str | None) -> list[str]:
    return [column["name"] for column in sa.inspect(engine).get_columns(table, schema)]


def _engine(url: str, source: str, deadline_s: float) -> sa.Engine:
    try:
        address = make_url(url)
        if address.drivername == "postgresql":
            # SQLAlchemy 2.1 would take psycopg 3, which is not what the `postgres` extra installs.
            address = address.set(drivername="postgresql+psycopg2")
        connect_args = _connect_args(address, deadline_s)
        engine = sa.create_engine(address, poolclass=NullPool, connect_args=connect_args, execution_options={"stream_results": True})
    except (ArgumentError, NoSuchModuleError) as error:
        raise SourceRefusedError(
            source, "its address is no database URL SQLAlchemy knows", "Write it as sqlite:///path or postgresql://user@host/database"
        ) from error
    except ModuleNotFoundError as error:
        raise SourceRefusedError(source, f"the driver '{error.name}' is not installed", "Install the extra of that database") from error
    file = address.database or ""
    # SQLite would create an empty database in the place of a missing one.
    if address.get_backend_name() == "sqlite" and file and file != ":memory:" and not Path(file).is_file():
        raise SourceDownError(source, "the database file is not there", "Check the path, or that its volume is mounted")
    return engine


def _connect_args(address: URL, deadline_s: float) -> dict[str, Any]:
    if address.get_backend_name() == "sqlite":
        return {"timeout": CONNECT_TIMEOUT_S}
    if address.get_backend_name() == "postgresql":
        return {
            "connect_timeout": CONNECT_TIMEOUT_S,
            # A server that vanished after it was connected is noticed by the kernel, a slow query by the server itself.
            "tcp_user_timeout": 30_000,
            "options": f"-c statement_timeout={int(deadline_s * 1000)} -c timezone=UTC -c default_transaction_read_only=on",
        }
    return {}


def _told(error: Exception, source: str) -> SourceError:
    """The error in the platform's words. dlt wraps the driver's exceptions: the first known one in the chain decides."""
    for cause in _chain(error):
        if isinstance(cause, SourceError):
            return cause
        if isinstance(cause, NoSuchTableError):
            return SourceRefusedError(source, "there is no such table or view", "Correct the table's name, or create it")
        if isinstance(cause, PyToArrowConversionException):
            return _mixed_types(cause, source)
        if isinstance(cause, DBAPIError):
            return _driver_error(cause, source)
    return SourceNonsenseError(source, f"could not be read ({_first_line(error)})", "Look at the table's types against the contract")


def _driver_error(error: DBAPIError, source: str) -> SourceError:
    text = _first_line(error.orig or error)
    if re.search(r"authentication|password|permission denied|role .* does not exist|database .* does not exist", text):
        return SourceRefusedError(source, f"refused the connection or the read ({text})", "Check user, password, database and rights")
    if isinstance(error, OperationalError):
        return SourceDownError(source, f"is down, locked or too slow ({text})", "Check that the database answers, then run again")
    return SourceNonsenseError(source, f"could not be read ({text})", "Look at the table and its types")


def _mixed_types(error: PyToArrowConversionException, source: str) -> SourceNonsenseError:
    found = re.search(r"Could not convert (.+?) with type", " ".join(str(cause) for cause in _chain(error)))
    example = found[1] if found else None
    return SourceNonsenseError(
        source,
        f"column '{error.field_name}' mixes types" + (f", such as {example}" if example else ""),
        "Mend the source, or declare the column as what it is in the contract",
        column=error.field_name,
        example=example,
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
