"""HTTP on the socket, with an end to everything a stranger can make long: uvicorn's protocol bounds neither a request's head nor the
time it may take, nor how many connections there are.

Belongs here: what is decided before there is a request. Does not belong here: requests (`middleware`, `protection`), bodies.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving_app.problems import MEDIA_TYPE, problem_body


@dataclass(frozen=True)
class HeadLimits:
    """`head_bytes`: request line and header fields together; `fields`: how many; `head_s`: seconds for them to arrive."""

    head_bytes: int = 16_384
    fields: int = 100
    head_s: float = 10.0
    connections: int = 16_384


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's httptools protocol within `limits`. Answers what it refuses itself as problem details, and closes the connection."""

    limits = HeadLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since = 0.0  # monotonic seconds; 0.0 while no head is awaited
        self._head_bytes = 0
        self._status, self._kind, self._detail = _BAD

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_since = time.monotonic()  # who connects is expected to ask
        if len(self.connections) > self.limits.connections:
            self._status, self._kind, self._detail = 503, "overloaded", "too many connections are open: come again later"
            self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused already; what is still on its way counts no more
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_since and self._head_bytes > self.limits.head_bytes:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_since = time.monotonic()

    def on_headers_complete(self) -> None:
        # A head within one read is known to be long only here. A read holds 256 KiB at most, and usually less than the limit.
        if len(self.headers) > self.limits.fields or (self._head_bytes > self.limits.head_bytes and self._size() > self.limits.head_bytes):
            self._name_long_head()
            raise ValueError("head too long")  # httptools turns it into the error that ends in `send_400_response`
        self._head_since = 0.0
        self._head_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way to refuse what is not HTTP; here for all that is refused before there is a request."""
        if self.transport.is_closing():
            return
        body = problem_body(self._status, self._kind, self._detail)
        fields = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"connection", b"close"),
            *([(b"retry-after", b"1")] if self._status == 503 else ()),
        ]
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        self.transport.write(STATUS_LINE[self._status] + head + b"\r\n" + body)
        self.transport.close()

    def close_if_late(self, now: float) -> None:
        """Closes the connection where a head is awaited for too long."""
        late = self._head_since and now - self._head_since > self.limits.head_s
        if late and (self.cycle is None or self.cycle.response_complete):  # else its turn has not come: the one before is answered
            self._status, self._kind, self._detail = 408, "head-too-slow", "the request did not arrive in time"
            self.send_400_response("")

    def _size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _name_long_head(self) -> None:
        if len(self.url) > self.limits.head_bytes // 2:
            self._status, self._kind, self._detail = 414, "address-too-long", "the address is too long"
        else:
            most = f"{self.limits.fields} header fields and {self.limits.head_bytes} bytes"
            self._status, self._kind, self._detail = 431, "header-too-large", f"a request's head may have {most}"

    def _refuse_head(self) -> None:
        self._name_long_head()
        self.send_400_response("")


_BAD = (400, "not-http", "this is no HTTP request")


def bounded(limits: HeadLimits) -> type[BoundedHttp]:
    """The protocol with other limits, as uvicorn takes it: as a class."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits})


def close_late(connections: Iterable[Any], now: float) -> None:
    """To be called every second or so; one look at all connections stands for a timer in each."""
    for connection in tuple(connections):
        if isinstance(connection, BoundedHttp):
            connection.close_if_late(now)
