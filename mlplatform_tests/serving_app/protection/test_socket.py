"""The service on a real socket, as its own process: what is too long, too slow, too much or no HTTP; and random bytes at every route."""

import asyncio
import gzip
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
BODY = json.dumps({"inputs": [ROW]}).encode()
PREDICT = "/v1/models/basket/predict"
ROUTES = (
    "/health/live",
    "/health/ready",
    "/metrics",
    "/v1/models",
    "/v1/models/basket",
    PREDICT,
    f"{PREDICT}?explain=true",
    "/v1/models/basket/invocations",
    "/v1/hooks/mlflow",
    "/v2/models/basket",
    "/v2/models/basket/infer",
    "/v2/models/basket/versions/1/infer",
    "/ping",
    "/openapi.json",
    "/docs",
    "/docs.js",
    "/",
    "/v2",
)
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
FUZZED = 3000


@pytest.fixture
def service(make_model, run_service, tmp_path) -> Callable[..., httpx.URL]:
    def start(**env: str) -> httpx.URL:
        make_model().into_cache(tmp_path)
        start.process = run_service(**env)  # type: ignore[attr-defined]
        start.process.wait_ready()  # type: ignore[attr-defined]
        return httpx.URL(start.process.url)  # type: ignore[attr-defined]

    return start


def exchange(url: httpx.URL, sent: bytes, wait_s: float = 5.0) -> bytes:
    """All the service answers until it closes the connection, or falls silent for `wait_s`."""
    with socket.create_connection((url.host, url.port), timeout=wait_s) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(65_536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


def head(method: str, path: str, *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def test_a_request_of_http_1_1_names_its_host_once(service) -> None:
    url = service()
    lines = ["POST /v1/models/none/predict HTTP/1.1", "Content-Type: application/json", "Content-Length: 2", "Connection: close", "", "{}"]
    for hosts, told in ((0, b"400"), (1, b"404"), (2, b"400")):
        sent = "\r\n".join([lines[0], *["Host: 127.0.0.1"] * hosts, *lines[1:]]).encode()
        assert exchange(url, sent).startswith(b"HTTP/1.1 " + told), hosts
    assert b"one field Host" in exchange(url, "\r\n".join(lines).encode())
    assert exchange(url, b"GET /health/live HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_head_that_is_too_long_is_refused_whole_in_pieces_and_without_end(service) -> None:
    url = service()
    cases = {
        b"431": head("GET", "/health/live", "X-Long: " + "a" * 40_000),
        b"414": head("GET", "/" + "a" * 40_000),
    }
    for status, sent in cases.items():
        assert exchange(url, sent).startswith(b"HTTP/1.1 " + status), status
    assert exchange(url, head("GET", "/health/live", *(f"X-{n}: 1" for n in range(101)))).startswith(b"HTTP/1.1 431")
    endless = b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 200_000  # a field that never ends
    assert exchange(url, endless).startswith(b"HTTP/1.1 431")
    fine = exchange(url, head("GET", "/health/live", "X-Long: " + "a" * 10_000, "Connection: close"))
    assert fine.startswith(b"HTTP/1.1 200")
    refused = exchange(url, b"nonsense\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in refused
    assert b"server:" not in (fine + refused).lower()


def test_who_is_slow_is_told_408_whether_with_the_head_or_the_body(service) -> None:
    url = service(MLPLATFORM_SERVING_HEAD_TIMEOUT_S="0.5", MLPLATFORM_SERVING_BODY_TIMEOUT_S="0.5")
    assert exchange(url, b"GET /health/live HTTP/1.1\r\nHost: x").startswith(b"HTTP/1.1 408")
    assert exchange(url, b"").startswith(b"HTTP/1.1 408")  # connected, and never asks
    slow_body = head("POST", PREDICT, "Content-Type: application/json", "Content-Length: 100") + b'{"inputs'
    answer = exchange(url, slow_body)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body-too-slow" in answer
    second = head("GET", "/health/live") + b"GET /health/live HTTP/1.1\r\n"  # a whole request, and half of another
    assert [int(s) for s in STATUS.findall(exchange(url, second))] == [200, 408]


def test_connections_on_top_are_closed_and_those_open_go_on(service) -> None:
    url = service(MLPLATFORM_SERVING_CONNECTIONS="20")
    held = [socket.create_connection((url.host, url.port)) for _ in range(20)]
    try:
        time.sleep(0.2)
        assert exchange(url, head("GET", "/health/live")).startswith(b"HTTP/1.1 503")
        held[0].settimeout(5)
        held[0].sendall(head("GET", "/health/live"))
        assert held[0].recv(100).startswith(b"HTTP/1.1 200")
    finally:
        for connection in held:
            connection.close()


def test_what_is_refused_before_there_is_a_request_is_counted_and_logged(service) -> None:
    url = service(MLPLATFORM_SERVING_CONNECTIONS="20", MLPLATFORM_SERVING_HEAD_TIMEOUT_S="0.5")
    process = service.process
    exchange(url, b"GARBAGE\r\n\r\n")
    exchange(url, head("GET", "/" + "a" * 40_000))
    exchange(url, head("GET", "/health/live", "X-Long: " + "a" * 40_000))
    exchange(url, b"GET /health/live HTTP/1.1\r\nHost: x")
    held = [socket.create_connection((url.host, url.port)) for _ in range(20)]
    exchange(url, head("GET", "/health/live"))
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{process.url}/metrics")).status_code != 200:  # while their places are still taken
        assert time.monotonic() < deadline
    counted = dict(re.findall(r'mlplatform_connections_refused_total\{reason="([a-z-]+)"\} (\d+)', answer.text))
    assert {name: int(count) > 0 for name, count in counted.items()} == dict.fromkeys(
        ("not-http", "address-too-long", "header-too-large", "head-too-slow", "overloaded"), True
    )
    process.stop()
    lines = [line for text in process.log.read_text().splitlines() if (line := json.loads(text))["event"] == "connection_refused"]
    assert {(line["status"], line["reason"], line["client"]) for line in lines} == {
        (status, reason, "127.0.0.1")
        for status, reason in (
            (400, "not-http"),
            (414, "address-too-long"),
            (431, "header-too-large"),
            (408, "head-too-slow"),
            (503, "overloaded"),
        )
    }


def test_a_body_that_comes_too_slowly_counts_as_refused(service) -> None:
    url = service(MLPLATFORM_SERVING_BODY_TIMEOUT_S="0.3")
    sized = ("Content-Type: application/json", "Content-Length: 100")
    for path in (PREDICT, f"{PREDICT}?features=true"):
        assert exchange(url, head("POST", path, *sized) + b'{"inputs').startswith(b"HTTP/1.1 408")
    assert 'mlplatform_requests_refused_total{reason="body-too-slow"} 2.0' in httpx.get(f"{service.process.url}/metrics").text


@pytest.mark.parametrize("path", [PREDICT, f"{PREDICT}?explain=true", "/v1/models/basket/invocations", "/v2/models/basket/infer"])
def test_a_body_that_is_compressed_or_says_so_is_refused_on_every_route(make_model, open_service, tmp_path, path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    for body, coding in ((gzip.compress(BODY), "gzip"), (BODY, "gzip"), (BODY, "br")):
        answer = client.post(path, content=body, headers={"content-type": "application/json", "content-encoding": coding})
        assert (answer.status_code, answer.json()["detail"]) == (415, "compressed bodies are not taken")
        assert answer.headers["accept-encoding"] == "identity"
    plain = client.post(PREDICT, content=BODY, headers={"content-type": "application/json", "content-encoding": "identity"})
    assert plain.status_code == 200


def fuzzed(rng: random.Random) -> bytes:
    """One request that is wrong in some way, or only looks it."""
    path = rng.choice(ROUTES)
    method = rng.choice(("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "PRI", "get", ""))
    noise = rng.randbytes(rng.randrange(1, 400))
    sized = (f"Content-Length: {len(BODY)}", "Content-Type: application/json")
    good = head("POST", PREDICT, *sized) + BODY
    spoilt = bytearray(good if rng.random() < 0.5 else head(method, path) + noise)
    for _ in range(rng.randrange(1, 6)):
        spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    number = rng.choice(("-1", "99999999999999999999", "0x10", "+5", " 5 ", "5, 5", "", "NaN", "1e3"))
    chunk = rng.choice(
        (b"5\r\nhello\r\n0\r\n\r\n", b"-1\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"zz\r\n", b"0;a=" + b"b" * 300 + b"\r\n\r\n", b"5\r\nhel")
    )
    values = (
        "null",
        "1e400",
        "NaN",
        "-0",
        '"\\ud800"',
        "[" * 2000,
        "9" * 400,
        '{"a":' * 500,
        '"\\u0000"',
        "[[]]",
        "{}",
        "true",
        '"' + "x" * 3000 + '"',
    )
    version = rng.choice(("1.0", "0.9", "2.0", "9.9", "x"))
    made = dict(ROW)
    made.pop(rng.choice(list(made)))
    text = json.dumps({"inputs": [made]})[:-3] + f', "{rng.choice(list(ROW))}": {rng.choice(values)}' + "}]}"
    return rng.choice(
        (
            lambda: noise,
            lambda: bytes(spoilt),
            lambda: good[: rng.randrange(1, len(good))],
            lambda: head(method, path, f"Content-Length: {number}") + noise,
            lambda: head("POST", path, "Transfer-Encoding: chunked") + chunk,
            lambda: head("POST", PREDICT, *sized, "Transfer-Encoding: chunked", f"Content-Length: {number}") + BODY,
            lambda: head("POST", PREDICT, f"Content-Length: {len(text)}", "Content-Type: application/json") + text.encode(),
            lambda: head("POST", PREDICT, f"Content-Length: {len(noise)}", "Content-Type: application/json") + noise,
            lambda: head(
                method, path + rng.choice(("%00", "%ff%fe", "/../..", "//", "?" + "a=b&" * 50, "#x", "%2e%2e%2f", "é", ";x", "*", " "))
            ),
            lambda: head(
                "GET", path, rng.choice(("Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: a", "Expect: 100-continue"))
            ),
            lambda: head("GET", path, "X-Odd: " + noise.decode("latin-1").replace("\r", "").replace("\n", "")),
            lambda: head("GET", path, "Connection: close", "Authorization: " + "Bearer " * rng.randrange(5), "X-API-Key: \xff"),
            lambda: head("GET", path) * rng.randrange(2, 20),
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise,
            lambda: f"GET http://other.example{path} HTTP/{version}\r\nHost: a\r\nHost: b\r\n\r\n".encode(),  # noqa: PLW0108  # like its neighbours
        )
    )()


async def throw(url: httpx.URL, requests: list[bytes]) -> tuple[Counter[int], list[tuple[int, bytes]]]:
    """Sends each on a connection of its own, many at a time; counts the statuses and keeps what met a server error."""
    statuses: Counter[int] = Counter()
    errors: list[tuple[int, bytes]] = []
    turns = asyncio.Semaphore(32)

    async def one(sent: bytes) -> None:
        async with turns:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            received = b""
            try:
                writer.write(sent)
                while part := await asyncio.wait_for(reader.read(65_536), 0.2):
                    received += part
            except (TimeoutError, ConnectionError):
                pass
            finally:
                writer.close()
        for status in map(int, STATUS.findall(received)):
            statuses[status] += 1
            if status >= 500:
                errors.append((status, sent))

    await asyncio.gather(*map(one, requests))
    return statuses, errors


def test_random_bytes_at_every_route_meet_no_server_error_and_leave_the_service_as_it_was(service) -> None:
    url = service()
    rng = random.Random(20131)
    statuses, errors = asyncio.run(throw(url, [fuzzed(rng) for _ in range(FUZZED)]))
    assert not errors, (len(errors), errors[:3])
    assert {200, 400, 404, 405, 422} <= set(statuses), statuses
    process = service.process
    assert process.popen.poll() is None
    log = process.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    answer = httpx.post(f"{process.url}{PREDICT}", content=BODY, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    metrics = httpx.get(f"{process.url}/metrics").text
    assert "mlplatform_requests_in_work 0.0" in metrics  # the one that asks takes no place
    assert "mlplatform_request_bytes_held 0.0" in metrics
