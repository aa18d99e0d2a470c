"""Dagster's SQLite event log in one file, with its connections kept warm.

Belongs here: how events reach the local SQLite file. Does not belong here: what an event says; production uses Postgres.

The stock storage keeps a file per run beside an index, and makes a new SQLAlchemy engine for every event: each insert
compiles its SQL again, opens the file again, and most events are written twice; each new run's file is set up by Alembic.
A year of daily partitions is tens of thousands of events. Dagster's own consolidated storage has one file; here its
engine lives as long as the storage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from dagster._core.storage.event_log.sqlite.consolidated_sqlite_event_log import ConsolidatedSqliteEventLogStorage
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection

BUSY_TIMEOUT_S = 60


class WarmSqliteEventLogStorage(ConsolidatedSqliteEventLogStorage):
    """Same file and schema as Dagster's consolidated storage; only the connections live longer than one event."""

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @cached_property
    def _engine(self) -> Engine:
        engine = create_engine(self._conn_string, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
        event.listen(engine, "connect", _relax_sync)
        return engine

    # The schema does not change under a running process, and the stock code looks it up for every event.
    def has_table(self, table_name: str) -> bool:
        if table_name not in self._tables:
            self._tables[table_name] = super().has_table(table_name)
        return self._tables[table_name]

    def _has_asset_key_index_cols_on_connection(self, conn: Connection) -> bool:
        if self._has_index_columns is None:
            self._has_index_columns = bool(super()._has_asset_key_index_cols_on_connection(conn))
        return self._has_index_columns

    _has_index_columns: bool | None = None

    @cached_property
    def _tables(self) -> dict[str, bool]:
        return {}

    def dispose(self) -> None:
        if "_engine" in self.__dict__:
            self._engine.dispose()
        super().dispose()


def _relax_sync(connection: Any, _record: Any) -> None:
    # With the write-ahead log NORMAL loses nothing on a killed process, only (never corrupting) on a power cut.
    connection.execute("PRAGMA synchronous=NORMAL")
