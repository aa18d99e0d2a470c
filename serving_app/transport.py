"""HTTP on the socket, with an end to everything a stranger can make long: uvicorn's protocol bounds neither a request's head nor the
time it may take, nor how many connections there are.

Belongs here: what is decided before there is a request. Does not belong here: requests (`middleware`, `protection`), bodies.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving_app.problems import MEDIA_TYPE, problem_body

if TYPE_CHECKING:
    from serving_app.hot import HotRequest, HotRoute


@dataclass(frozen=True)
class HeadLimits:
    """`head_bytes`: request line and header fields together; `fields`: how many; `head_s`: seconds for them to arrive."""

    head_bytes: int = 16_384
    fields: int = 100
    head_s: float = 10.0
    connections: int = 16_384


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's httptools protocol within `limits`. Answers what it refuses itself as problem details, and closes the connection.

    Requests that `hot` takes never become an ASGI application's. Time limits are looked at by `close_if_late`, for all connections in one
    go: a timer for each request would cost more than reading it.
    """

    limits = HeadLimits()
    hot: "HotRoute | None" = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since = 0.0  # monotonic seconds; 0.0 while no head is awaited
        self._head_bytes = 0
        self._idle_since = 0.0  # monotonic seconds since the last answer; 0.0 while one is under way, and before the first
        self._plain: HotRequest | None = None  # whose body arrives
        self._asgi: Any = None  # the request that the application was given last
        self._upgrading = self._version = b""  # the method of a request that wishes to go on in another protocol, and its HTTP
        self._between = True  # the parser has no message begun
        self._begun: HotRequest | None = None  # whose head was read last, in this read
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
        self._idle_since = 0.0
        begins = self._between
        if begins and self._begun_before(data):
            return
        self._head_bytes += len(data)
        self._begun = None
        self._feed(data)
        if self._head_since and self._head_bytes > self.limits.head_bytes:
            self._refuse_head()
        if begins and self._between and self._begun is not None and self.hot is not None:
            self.hot.remember(data, self._begun)

    def _feed(self, data: bytes) -> None:
        for _ in range(_UPGRADES):
            try:
                self.parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                # There is nothing to change to, so the request means what it means without the wish (RFC 9110, 7.8). The parser takes what
                # stands behind such a head for another protocol's: a new one is given the head without the wish, and all of that.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
                continue
            except HttpParserError as error:
                if (self._status, self._kind, self._detail) == _BAD:
                    self._detail = f"{self._detail}: {error.__context__ or error}"  # the parser's own words, none of the caller's
                self.send_400_response("")
            return
        self._detail = "too many requests at once that ask for another protocol"
        self.send_400_response("")

    def _head_without_upgrade(self) -> bytes:
        kept = []
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token for token in value.split(b",") if token.strip().lower() not in _OF_UPGRADE]
                kept += [(name, b",".join(tokens))] if tokens else []
            elif name not in _OF_UPGRADE:
                kept.append((name, value))
        lines = b"".join(b"%b: %b\r\n" % field for field in kept)
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self._upgrading, self.url, self._version, lines)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._upgrading = b""
        self._between = False
        self._head_since = time.monotonic()

    def on_headers_complete(self) -> None:
        # A head within one read is known to be long only here. A read holds 256 KiB at most, and usually less than the limit.
        if len(self.headers) > self.limits.fields or (self._head_bytes > self.limits.head_bytes and self._size() > self.limits.head_bytes):
            self._name_long_head()
            raise ValueError("head too long")  # httptools turns it into the error that ends in `send_400_response`
        self._head_since = 0.0
        self._head_bytes = 0
        # RFC 9112, 3.2: two readers of one head must not take it to be for two hosts.
        if sum(name == b"host" for name, _ in self.headers) != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError("a request of HTTP/1.1 has one field Host")
        if self.parser.should_upgrade():
            self._upgrading, self._version = self.parser.get_method(), self.parser.get_http_version().encode()
            if self._upgrading == b"CONNECT":
                raise ValueError("this is no proxy")
            return  # it comes again, without
        self._plain = self._begun = None if self.hot is None else self._plain_request(self.hot)
        if self._plain is None:
            super().on_headers_complete()
        else:
            self.cycle = cast(Any, self._plain)

    def _begun_before(self, data: bytes) -> bool:
        """Whether `data` is one whole request behind a head that has been read before, byte for byte. It is begun; nobody reads its head
        again."""
        hot = self.hot
        head = None if hot is None else hot.known(data)
        if hot is None or head is None or not self._ready():
            return False
        scope = {
            "type": "http",
            "method": "POST",
            "path": head.path,
            "root_path": "",
            "headers": head.headers,
            "client": self.client,
            "state": self.app_state.copy(),
        }
        request = hot.again(self, head, scope)
        if request is None:
            return False
        self._head_since = 0.0
        self._plain = request
        self.cycle = cast(Any, request)
        request.more(data[-head.body_bytes :])
        request.whole()
        return True

    def _ready(self) -> bool:
        # Behind a request that is not answered yet one has to wait, and behind answers that nobody reads: uvicorn does both.
        return (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused and not self.root_path

    def _plain_request(self, hot: "HotRoute") -> "HotRequest | None":
        if not self._ready() or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        self.scope["method"] = "POST"
        self.scope["path"] = self.url.decode("latin-1")
        return hot.begin(self, self.url, cast(Any, self.scope), self.parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        if self._plain is None:
            super().on_body(body)
        else:
            self._plain.more(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._head_bytes = 0  # what came was a body
        self._between = True
        if self._plain is None:
            super().on_message_complete()
        else:
            self._plain.whole()

    def on_response_complete(self) -> None:
        """uvicorn's, without its timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = time.monotonic()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._asgi = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells the request that came last, which may stand behind the one that is worked on.
        if self._asgi is not None and not self._asgi.response_complete:
            self._asgi.disconnected = True
            self._asgi.message_event.set()
        if self._plain is not None:
            self._plain.lost()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way to refuse what is not HTTP; here for all that is refused before there is a request."""
        if self.transport.is_closing():
            return
        if self.hot is not None:
            self.hot.around.turned_away(self._status, self._kind, self.client)
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
        """Closes the connection where a head is awaited for too long, or the next request."""
        if self._idle_since and now - self._idle_since > self.timeout_keep_alive:
            self.transport.close()
            return
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
_UPGRADES = 16  # in one read; each costs as much as the read is long
_OF_UPGRADE = frozenset({b"upgrade", b"http2-settings"})


def bounded(limits: HeadLimits, hot: "HotRoute | None" = None) -> type[BoundedHttp]:
    """The protocol with limits and hot route of its own, as uvicorn takes it: as a class."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits, "hot": hot})


def close_late(connections: Iterable[Any], now: float) -> None:
    """To be called every second or so; one look at all connections stands for a timer in each."""
    for connection in tuple(connections):
        if isinstance(connection, BoundedHttp):
            connection.close_if_late(now)
