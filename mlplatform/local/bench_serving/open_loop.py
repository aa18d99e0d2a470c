"""Requests at a fixed mean rate, each due at its own moment however long answers take: run as a program by `load.open_loop`.

Belongs here: sending when due, over connections kept open. Does not belong here: what the figures are compared with.

Why our own: `h2load --rps` sends one body only, lets all its clients send in the same millisecond, and counts from when a request was
sent, so a stalled server looks fast (coordinated omission); wrk2 is in no distribution. Arrivals are independent of each other
(exponential gaps), as those of many users are. `select` is used because its timeouts are exact to microseconds; those of epoll are
milliseconds.
"""

import json
import random
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LINGER_S = 20.0  # answers that are later than this after the last request was due count as errors


@dataclass
class _Connection:
    """One connection with at most one request under way. `due` is when that request should have been sent."""

    socket: socket.socket
    due: float = 0.0
    received: bytes = b""

    def send(self, request: bytes, due: float) -> None:
        self.due, self.received = due, b""
        with suppress(OSError):  # the server hung up: reading it tells
            self.socket.sendall(request)

    def answer(self) -> int | None:
        """The status once the answer is whole, None before. Raises ConnectionError where the server hung up."""
        part = self.socket.recv(1 << 20)
        if not part:
            raise ConnectionError("the server closed the connection")
        self.received += part
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return None
        status, *headers = head.split(b"\r\n")
        length = next((int(h.partition(b":")[2]) for h in headers if h.lower().startswith(b"content-length:")), 0)
        return int(status.split(b" ")[1]) if len(body) >= length else None


def run(port: int, path: str, bodies: list[bytes], rate: float, seconds: float, connections: int) -> dict[str, float]:
    """Latencies run from the moment a request was due, in milliseconds."""
    requests = [_request(path, body) for body in bodies]
    chance, last = random.Random(1), rate * seconds  # noqa: S311  # no secret
    # Each in its turn: one that is left idle for long is closed by the service, as by any.
    free = deque(_connect(port) for _ in range(connections))
    busy: dict[socket.socket, _Connection] = {}
    waiting: deque[float] = deque()
    latencies: list[float] = []
    planned, sent, errors = round(last), 0, 0
    began = time.perf_counter()
    next_due, drawn = began, 0
    deadline = began + seconds + _LINGER_S
    while len(latencies) + errors < planned and (now := time.perf_counter()) < deadline:
        while drawn < planned and next_due <= now:
            waiting.append(next_due)
            next_due += chance.expovariate(rate)
            drawn += 1
        while waiting and free:
            connection = free.popleft()
            busy[connection.socket] = connection
            connection.send(requests[sent % len(requests)], waiting.popleft())
            sent += 1
        pause = next_due - time.perf_counter() if drawn < planned else deadline - now
        for readable in select.select(list(busy), [], [], max(0.0, pause))[0]:
            connection = busy[readable]
            try:
                status = connection.answer()
            except OSError:  # a lost request, and the others go on
                connection.socket.close()
                status, connection = 0, _connect(port)
            if status is None:
                continue
            if status == 200:
                latencies.append(time.perf_counter() - connection.due)
            else:
                errors += 1
            del busy[readable]
            free.append(connection)
    took = time.perf_counter() - began
    for connection in (*free, *busy.values()):
        connection.socket.close()
    return _figures(latencies, planned - len(latencies), took)


def _connect(port: int) -> _Connection:
    connected = socket.create_connection(("127.0.0.1", port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _Connection(connected)


def _request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _figures(latencies: list[float], errors: int, seconds: float) -> dict[str, float]:
    ordered = sorted(latencies) or [float("inf")]
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 for share in (0.5, 0.95, 0.99)}
    return {
        "requests": len(latencies),
        "seconds": seconds,
        "p50_ms": at[0.5],
        "p95_ms": at[0.95],
        "p99_ms": at[0.99],
        "errors": errors,
    }


if __name__ == "__main__":
    port, path, file, rate, seconds, connections = sys.argv[1:]
    found = run(int(port), path, Path(file).read_bytes().splitlines(), float(rate), float(seconds), int(connections))
    print(f"FIGURES {json.dumps(found)}")  # noqa: T201  # a program's answer
