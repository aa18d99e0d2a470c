"""Dagster's SQLite event log in one file, with its connections kept warm.

Belongs here: how events reach the local SQLite file. Does not belong here: what an event says; production uses Postgres.

The stock storage keeps a file per run beside an index, and makes a new SQLAlchemy engine for every event: each insert
compiles its SQL again, opens the file again, and most events are written twice; each new run's file is set up by Alembic.
A year of daily partitions is tens of thousands of events. Dagster's own consolidated storage has one file; here its
engine lives as long as the storage.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster._core.storage.event_log.sqlite.consolidated_sqlite_event_log import ConsolidatedSqliteEventLogStorage
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection
from watchdog.events import FileSystemEvent, PatternMatchingEventHandler
from watchdog.observers import Observer

BUSY_TIMEOUT_S = 60


class WarmSqliteEventLogStorage(ConsolidatedSqliteEventLogStorage):
    """Same file and schema as Dagster's consolidated storage; only the connections live longer than one event."""

    _obs: Any  # the observer of the folder, None until somebody watches

    def __init__(self, base_dir: str, inst_data: Any = None) -> None:
        # The UI and the daemon may open a new home at the same moment; the stock code looks for the file, then makes the
        # tables, and who comes between finds a file without tables.
        folder = Path(base_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "event_log.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().__init__(base_dir, inst_data)

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

    def watch(self, run_id: str, cursor: str | None, callback: Callable[..., Any]) -> None:
        """Calls back for every event of the run from now on, whichever process writes it.

        New events are in the write-ahead log, and reach the database's own file (the only one the stock storage watches)
        when the last connection closes; here none does while anybody looks.
        """
        if self._obs is None:
            self._obs = Observer()
            self._obs.start()
            self._obs.schedule(_Watchdog(self), self._base_dir)
        self._watchers[run_id][callback] = cursor

    def dispose(self) -> None:
        if "_engine" in self.__dict__:
            self._engine.dispose()
        super().dispose()  # type: ignore[no-untyped-call]  # Dagster's own storage is untyped


class _Watchdog(PatternMatchingEventHandler):
    def __init__(self, storage: WarmSqliteEventLogStorage) -> None:
        self._storage = storage
        path: str = storage.get_db_path()  # type: ignore[no-untyped-call]  # Dagster's
        super().__init__(patterns=[path, f"{path}-wal"])

    def on_modified(self, event: FileSystemEvent) -> None:
        self._storage.on_modified()  # type: ignore[no-untyped-call]  # Dagster's


def _relax_sync(connection: Any, _record: Any) -> None:
    # With the write-ahead log NORMAL loses nothing on a killed process, only (never corrupting) on a power cut.
    connection.execute("PRAGMA synchronous=NORMAL")
