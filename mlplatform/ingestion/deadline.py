"""A time limit over a whole HTTP conversation, that holds however slowly its bytes come.

Belongs here: cutting the connections of a session. Does not belong here: what is asked over them.
"""

import socket
import threading
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class DeadlineError(Exception):
    """The time for the whole window is up. Not an OSError: dlt's retries must not take it for one more try."""


class Deadline:
    """Cuts every connection of a session when its time is up.

    A read time-out alone does not do: it starts anew with each byte, and a source may drip for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._passed = threading.Event()
        self._watched: list[tuple[HTTPConnection, socket.socket]] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    @property
    def passed(self) -> bool:
        return self._passed.is_set()

    def watch(self, connection: HTTPConnection, sock: socket.socket) -> None:
        # A second handle on the same connection: TLS takes the first one's over, and hides it.
        self._watched.append((connection, sock.dup()))
        if self.passed:  # asked after it was noted down: a cut that comes in between finds it
            sock.close()
            raise DeadlineError

    def end(self) -> None:
        """Stops waiting, and closes what a failed answer may have left open."""
        self._timer.cancel()
        for connection, handle in self._watched:
            connection.close()
            handle.close()

    def _cut(self) -> None:
        self._passed.set()
        for _, handle in list(self._watched):
            try:
                handle.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already, which is what is wanted
                continue


class WatchedAdapter(HTTPAdapter):
    """Requests' adapter, with each new socket shown to the deadline, through a proxy too."""

    def __init__(self, deadline: Deadline) -> None:
        self._pools = _watched_pools(deadline)
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _watched_pools(deadline: Deadline) -> dict[str, type[HTTPConnectionPool]]:
    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            deadline.watch(self, sock)
            return sock

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            deadline.watch(self, sock)
            return sock

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
