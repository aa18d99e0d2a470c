"""The end of the process: notice first, then no request is lost, and every answer is in the log."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
BODY = json.dumps({"inputs": [ROW] * 5}).encode()


def answers(connection: socket.socket) -> Iterator[tuple[int, bool, dict[str, object]]]:
    """(status, whether the connection is told to close, body) of one answer after another."""
    received = b""
    while True:
        while b"\r\n\r\n" not in received:
            if not (part := connection.recv(65_536)):
                raise ConnectionResetError("closed before an answer" + (" was whole" if received else ""))
            received += part
        head, _, received = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(received) < int(fields[b"content-length"]):
            if not (part := connection.recv(65_536)):
                raise ConnectionResetError("closed within an answer")
            received += part
        body, received = received[: int(fields[b"content-length"])], received[int(fields[b"content-length"]) :]
        yield int(head.split()[1]), fields.get(b"connection") == b"close", json.loads(body)


class Caller(threading.Thread):
    """Asks one request after another, and keeps to HTTP: a connection is used until it is told to close.

    `refused`: the end came at connecting, or before a new connection's first request was read (the system had taken the connection, and
    nobody the request; then `reset` too). `lost`: anything else that is no answer.
    """

    def __init__(self, port: int, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.port, self.pause_s = port, pause_s
        self.answered: list[str] = []
        self.told = 0
        self.lost: list[str] = []
        self.refused = self.reset = False

    def run(self) -> None:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
        while not self.refused:
            fresh, connected = True, False
            try:
                with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                    connected = True
                    for status, closes, body in self._ask(connection, head):
                        if status != 200:
                            self.lost.append(str(body))
                        self.answered.append(body["predictions"][0]["request_id"])  # type: ignore[index]
                        fresh = False
                        if closes:
                            self.told += 1
                            break
            except OSError as error:
                self.refused, self.reset = True, connected and fresh
                if not fresh:
                    self.lost.append(f"{error!r} after {len(self.answered)} answers")

    def _ask(self, connection: socket.socket, head: bytes) -> Iterator[tuple[int, bool, dict[str, object]]]:
        replies = answers(connection)
        while True:
            connection.sendall(head + BODY)
            yield next(replies)
            time.sleep(self.pause_s)


@contextmanager
def under_load(port: int) -> Iterator[list[Caller]]:
    callers = [Caller(port, pause_s) for pause_s in (0, 0, 0, 0, 0.01, 0.05, 0.2, 0.4)]
    for caller in callers:
        caller.start()
    while not all(len(caller.answered) > 1 for caller in callers):
        time.sleep(0.01)
    yield callers
    for caller in callers:
        caller.join(20)
        assert not caller.is_alive()


def test_under_load_no_request_is_lost_every_answer_is_in_the_log_and_the_exit_is_clean(make_model, run_service, tmp_path, logged) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_NOTICE_S="1.5")
    process.wait_ready()
    with under_load(httpx.URL(process.url).port) as callers:
        assert process.stop() == 0
    assert [caller.lost for caller in callers] == [[]] * len(callers)
    assert all(caller.refused for caller in callers)
    # The system may take a connection in the moment between the last look at what waits and the end of listening.
    assert sum(caller.reset for caller in callers) <= 1
    assert all(caller.told for caller in callers)
    records = logged()
    answered = [request_id for caller in callers for request_id in caller.answered]
    assert set(answered) == {record.request_id for record in records}
    assert len(records) == 5 * len(answered)
    [closed] = [json.loads(line) for line in process.log.read_text().splitlines() if "prediction_log_closed" in line]
    assert closed["written"] == closed["accepted"] == len(records)
    assert closed["queued"] == closed["dropped"] == 0


def test_after_sigterm_it_is_not_ready_at_once_answers_on_and_closes_what_it_answered(make_model, run_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_NOTICE_S="60")
    process.wait_ready()
    with httpx.Client(base_url=process.url, timeout=10) as kept, httpx.Client(base_url=process.url, timeout=10) as idle:
        assert "connection" not in kept.post(PATH, content=BODY, headers={"content-type": "application/json"}).headers
        assert idle.get("/health/live").status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{process.url}/health/ready").status_code != 503:  # a look at the signal ten times a second
            assert time.monotonic() < deadline
        told = httpx.get(f"{process.url}/health/ready")
        assert (told.status_code, told.headers["connection"]) == (503, "close")
        assert "told to end" in told.json()["detail"]
        assert httpx.get(f"{process.url}/health/live").status_code == 200
        answer = kept.post(PATH, content=BODY, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert process.popen.poll() is None  # the idle one is still connected
    assert process.popen.wait(10) == 0  # nobody is left: the notice is over before its time


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_an_interrupt_or_a_second_signal_ends_it_without_notice(make_model, run_service, tmp_path, signals) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_NOTICE_S="600")
    process.wait_ready()
    with httpx.Client(base_url=process.url) as connected:
        connected.get("/health/live")
        for each in signals:
            process.popen.send_signal(each)
            time.sleep(0.3)  # the system may make two signals at once one
        assert process.popen.wait(10) == 0
    assert "prediction_log_closed" in process.log.read_text()


def test_a_request_that_outlasts_the_time_to_stop_ends_the_wait_and_not_the_log(make_model, run_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_NOTICE_S="0", MLPLATFORM_SERVING_STOP_S="1")
    process.wait_ready()
    httpx.post(f"{process.url}{PATH}", content=BODY, headers={"content-type": "application/json"})
    with socket.create_connection(("127.0.0.1", httpx.URL(process.url).port)) as slow:
        slow.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{{".encode()
        )
        time.sleep(0.2)
        assert process.stop(timeout_s=10) == 0
    [closed] = [json.loads(line) for line in process.log.read_text().splitlines() if "prediction_log_closed" in line]
    assert (closed["accepted"], closed["written"]) == (5, 5)
