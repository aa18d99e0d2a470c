"""One pipelined connection to a Redis server, for the service's hot path.

Belongs here: connecting, writing commands as they come, handing out replies in order. Does not belong here: which commands.

Against redis-py's pool and pipelines it saves a task switch, a lock and a Python encoder for each batch: hiredis parses, and a batch is
one write and one future. Commands of several callers share the connection; Redis answers in order.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from ssl import SSLContext
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

# Its words, or the bytes they are packed to.
Command = tuple[Any, ...] | bytes
_MANY = 16


class Pipe:
    """Used from one event loop. Connects at the first command and again after a loss; a loss never reorders replies.

    `url` as redis-py takes it: redis://, rediss:// (TLS, with its ssl_* parameters) or unix://, user, password and database in it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        options: dict[str, Any] = dict(parse_url(url))
        kind = options.pop("connection_class", None)
        self._host: str = options.get("host") or "localhost"
        self._port: int = options.get("port") or 6379
        self._path: str | None = options.get("path") if kind is UnixDomainSocketConnection else None
        self._ssl: SSLContext | None = SSLConnection(**options).ssl_context.get() if kind is SSLConnection else None
        self._hello = _greeting(options)
        self._timeout_s = timeout_s
        self._wire: _Wire | None = None
        self._connecting: asyncio.Lock | None = None
        self._closed = False

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands sent in one write, in order: bytes, int, None or lists of them.

        Raises redis' ResponseError where the server refused one of them, ConnectionError and TimeoutError (both after one
        more try on a new connection where the old one was found dead): then it is unknown which of the commands ran.
        """
        if not commands:
            return []
        packed = b"".join(map(_packed, commands))
        wire = await self._ready()
        try:
            replies = await self._exchange(wire, packed, len(commands))
        except RedisConnectionError:
            replies = await self._exchange(await self._ready(), packed, len(commands))
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def ping(self) -> bool:
        return (await self.execute([("PING",)])) == [b"PONG"]

    async def aclose(self) -> None:
        self._closed = True
        if self._wire is not None:
            self._wire.drop()
            await self._wire.gone.wait()

    async def _exchange(self, wire: "_Wire", packed: bytes, replies: int) -> list[Any]:
        answer = wire.send(packed, replies)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError as error:
            # Its replies may still come, or never: a new connection knows nothing of them.
            wire.drop()
            raise RedisTimeoutError(f"Redis did not answer within {self._timeout_s:g} s") from error

    async def _ready(self) -> "_Wire":
        if self._wire is not None and self._wire.alive:
            return self._wire
        if self._closed:
            raise RedisConnectionError("the connection was closed")
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:  # who comes second uses what the first has opened
            if self._wire is None or not self._wire.alive:
                self._wire = await self._connect()
        return self._wire

    async def _connect(self) -> "_Wire":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._path is not None:
                    _, wire = await loop.create_unix_connection(_Wire, self._path)
                else:
                    _, wire = await loop.create_connection(_Wire, self._host, self._port, ssl=self._ssl)
        except TimeoutError as error:
            raise RedisTimeoutError(f"Redis took no connection within {self._timeout_s:g} s") from error
        except OSError as error:
            raise RedisConnectionError(f"Redis takes no connection: {error}") from error
        if self._hello:
            refused = await self._exchange(wire, b"".join(map(_packed, self._hello)), len(self._hello))
            for reply in refused:
                if isinstance(reply, Exception):
                    wire.drop()
                    raise RedisConnectionError(f"Redis refused the connection: {reply}")
        return wire


def pack_each(words: tuple[str | bytes, ...], last: Sequence[bytes]) -> list[bytes]:
    """Commands that differ in their last word only: the others are packed once, and that one is not copied through hiredis."""
    head = _packed((*words, b"")).removesuffix(b"$0\r\n\r\n")
    return [b"%b$%d\r\n%b\r\n" % (head, len(word), word) for word in last]


def _packed(command: Command) -> bytes:
    if isinstance(command, bytes):
        return command
    if len(command) > _MANY and set(map(type, command[1:])) == {bytes}:
        return _pack_many(command)
    packed: bytes = hiredis.pack_command(command)
    return packed


def _pack_many(command: tuple[Any, ...]) -> bytes:
    """A command and many words of bytes: half of hiredis' time, which allocates for each word."""
    name, *words = command
    lengths = list(map(len, words))
    heads = {length: b"\r\n$%d\r\n" % length for length in set(lengths)}
    parts = [b""] * (2 * len(words))
    parts[0::2] = map(heads.__getitem__, lengths)
    parts[1::2] = words
    first: bytes = hiredis.pack_command((name,)).removeprefix(b"*1\r\n").removesuffix(b"\r\n")
    return b"*%d\r\n%b%b\r\n" % (len(command), first, b"".join(parts))


def _greeting(options: dict[str, Any]) -> list[Command]:
    hello: list[Command] = []
    if options.get("password"):
        hello.append(("AUTH", *([options["username"]] if options.get("username") else []), options["password"]))
    if options.get("db"):
        hello.append(("SELECT", str(options["db"])))
    return hello


class _Wire(asyncio.Protocol):
    """A connection's bytes: who waits for how many replies, in order."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(protocolError=RedisConnectionError, replyError=ResponseError)
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int, list[Any]]] = deque()
        self._transport: asyncio.Transport | None = None
        self.alive = False
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not asyncio's classes
        self.alive = True

    def send(self, packed: bytes, replies: int) -> "asyncio.Future[list[Any]]":
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if not self.alive or self._transport is None:
            answer.set_exception(RedisConnectionError("the connection to Redis was lost"))
            return answer
        self._waiting.append((answer, replies, []))
        self._transport.write(packed)
        return answer

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        following = self._reader.gets
        try:
            while (reply := following()) is not False:
                answer, wanted, got = self._waiting[0]
                got.append(reply)
                while len(got) < wanted:
                    if (reply := following()) is False:
                        return
                    got.append(reply)
                self._waiting.popleft()
                if not answer.done():
                    answer.set_result(got)
        except (RedisConnectionError, IndexError):  # not RESP, or a reply nobody asked for
            self.drop()

    def connection_lost(self, error: Exception | None) -> None:
        self.alive = False
        self.gone.set()
        while self._waiting:
            answer, _, _ = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(RedisConnectionError(f"the connection to Redis was lost: {error or 'closed by the server'}"))

    def drop(self) -> None:
        self.alive = False
        if self._transport is not None:
            self._transport.abort()
