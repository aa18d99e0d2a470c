"""Dagster's SQLite event log with its engines kept warm.

Belongs here: how events reach the local SQLite files. Does not belong here: what an event says; production uses Postgres.

The stock storage makes a new SQLAlchemy engine for every event, so each insert compiles its SQL again and opens the
file again: 10 ms an event. A year of daily partitions is tens of thousands of events.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.pool import StaticPool

# One engine for the index and one each for the runs being written; more would only hold files open.
MAX_ENGINES = 8
BUSY_TIMEOUT_S = 60


class WarmSqliteEventLogStorage(SqliteEventLogStorage):
    """Same files and schema as the stock storage; only the connections live longer than one event."""

    def __init__(self, base_dir: str, inst_data: Any = None) -> None:
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        super().__init__(base_dir=base_dir, inst_data=inst_data)

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Any) -> "WarmSqliteEventLogStorage":  # type: ignore[override]  # the stock one names its own class
        return cls(inst_data=inst_data, **config_value)

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            engine = self._engine(shard)
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.connect() as connection, connection.begin():
                yield connection

    def _engine(self, shard: str) -> Engine:
        engine = self._engines.get(shard)
        if engine is None:
            # One connection an engine, guarded by the storage's own lock, which every use of it holds.
            engine = create_engine(
                self.conn_string_for_shard(shard),
                poolclass=StaticPool,
                connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
            )
            event.listen(engine, "connect", _relax_sync)
            self._engines[shard] = engine
            while len(self._engines) > MAX_ENGINES:
                self._engines.popitem(last=False)[1].dispose()
        self._engines.move_to_end(shard)
        return engine

    def dispose(self) -> None:
        for engine in self._engines.values():
            engine.dispose()
        self._engines.clear()
        super().dispose()


def _relax_sync(connection: Any, _record: Any) -> None:
    # With the write-ahead log NORMAL loses nothing on a killed process, only (never corrupting) on a power cut.
    connection.execute("PRAGMA synchronous=NORMAL")
