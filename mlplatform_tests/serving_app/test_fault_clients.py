"""Clients that misbehave: who leaves in the middle of a batch, who sends slowly, and who only sits there, ten thousand of them."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import redis

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
IDLE = 10_000
OTHER_FILES = 200  # of this process and of the service, beside the connections


def request(rows: int = 1) -> bytes:
    body = json.dumps({"inputs": [ROW] * rows}).encode()
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


def test_who_leaves_in_the_middle_of_a_batch_takes_nobody_with_him(make_model, open_service, tmp_path, redis_url, logged) -> None:
    """The store holds its replies back, so that a batch is under way; half of those who wait for it close their connection."""
    make_model().into_cache(tmp_path)
    client = open_service(serving_redis_timeout_s=5)
    assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
    address = (client.base_url.host, client.base_url.port)
    connections = [socket.create_connection(address, 10) for _ in range(20)]
    with redis.Redis.from_url(redis_url) as store:
        store.execute_command("CLIENT", "PAUSE", "600", "ALL")
    for connection in connections:
        connection.sendall(request())
    time.sleep(0.2)
    for connection in connections[::2]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closed by a reset
        connection.close()
    for connection in connections[1::2]:
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        connection.close()
    assert len(logged(11)) >= 11  # of those who left some were answered
    metrics = client.get("/metrics").text
    assert "mlplatform_requests_in_work 0.0" in metrics  # the one that asks takes no place
    assert "mlplatform_request_bytes_held 0.0" in metrics


def test_bodies_that_dribble_hold_nobody_up_and_are_answered_when_they_are_there(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service(serving_in_work=4)
    whole = request()
    connections = [socket.create_connection((client.base_url.host, client.base_url.port), 10) for _ in range(40)]
    step = 40
    for start in range(0, len(whole) - 1, step):
        for connection in connections:
            connection.sendall(whole[start : min(start + step, len(whole) - 1)])
        # Ten times as many are at it as places to work are there; none of them holds one.
        assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
    for connection in connections:
        connection.sendall(whole[-1:])
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_while_it_comes_and_its_connection_closed(make_model, open_service, tmp_path, chunked) -> None:
    make_model().into_cache(tmp_path)
    client = open_service(serving_body_limit=10_000)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = 0
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.sendall((head + ("Transfer-Encoding: chunked" if chunked else "Content-Length: 50000000") + "\r\n\r\n").encode())
        try:
            while sent < 50_000_000:
                connection.sendall(b"fa0\r\n" + b" " * 4000 + b"\r\n" if chunked else b" " * 4000)
                sent += 4000
                time.sleep(0.001)
        except OSError:
            pass  # closed by the service, long before all of it was sent
        assert sent < 5_000_000
    assert 'status="413",variant="champion"' in client.get("/metrics").text
    assert "mlplatform_request_bytes_held 0.0" in client.get("/metrics").text
    assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200


@pytest.fixture
def idle() -> Iterator[int]:
    """How many connections this process may hold, ten thousand where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def hold(url: httpx.URL, count: int, then: Any) -> None:
    """Opens `count` connections that ask for nothing, runs `then` in a thread, and looks whether all of them still work."""
    opened = []
    for _ in range(0, count, 500):
        opened += await asyncio.gather(*(asyncio.open_connection(url.host, url.port) for _ in range(min(500, count - len(opened)))))
    await asyncio.to_thread(then)
    for reader, writer in opened[:: max(1, count // 50)]:
        writer.write(request())
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 200 ")
    for _, writer in opened:
        writer.close()


def test_ten_thousand_idle_connections_cost_memory_and_no_answer(make_model, run_service, tmp_path, idle, record_property) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_HEAD_TIMEOUT_S="300", MLPLATFORM_SERVING_KEEP_ALIVE_S="300", MLPLATFORM_SERVING_NOTICE_S="0")
    process.wait_ready()
    service = psutil.Process(process.popen.pid)

    def median_ms() -> float:
        took = []
        with httpx.Client(base_url=process.url, timeout=20) as client:
            for _ in range(200):
                begun = time.perf_counter()
                assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
                took.append((time.perf_counter() - begun) * 1000)
        return sorted(took)[len(took) // 2]

    alone_ms, before = median_ms(), service.memory_info().rss
    seen: dict[str, float] = {}

    def meanwhile() -> None:
        assert len(service.net_connections("tcp")) >= idle
        seen.update(median_ms=median_ms(), bytes_each=(service.memory_info().rss - before) / idle)
        assert httpx.get(f"{process.url}/health/ready").status_code == 200

    asyncio.run(hold(httpx.URL(process.url), idle, meanwhile))
    # Shown by `pytest -rP` or in a report: the machine decides the times, so nothing is asserted of them.
    for name, value in (("idle connections", idle), ("median ms alone", alone_ms), *seen.items()):
        record_property(name, value)
    print(f"\n{idle} idle connections: {seen['bytes_each']:.0f} bytes each, median {alone_ms:.2f} -> {seen['median_ms']:.2f} ms")  # noqa: T201
    assert seen["bytes_each"] < 40_000
    deadline = time.monotonic() + 20
    while len(service.net_connections("tcp")) > 50:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert process.stop() == 0
