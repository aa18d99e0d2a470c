"""Each service of the local profile starts, answers at its address, keeps its data, and calls nobody."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from mlplatform.local.processes import group_members
from mlplatform.local.service_state import kept
from mlplatform.local.services import QUIET, dagster_daemon, dagster_webserver, mlflow, prediction_service, stream_worker, valkey
from mlplatform.local.supervisor import Supervisor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_valkey_keeps_its_data_over_a_restart(tmp_path: Path, number: signal.Signals) -> None:
    with Supervisor(tmp_path) as supervisor:
        service = supervisor.start(valkey(tmp_path))
        with redis.Redis.from_url(service.url) as client:
            client.config_set("appendfsync", "always")
            client.set("kept", "yes")
        os.kill(service.pid, number)
    with Supervisor(tmp_path) as supervisor:
        again = supervisor.start(valkey(tmp_path))
        with redis.Redis.from_url(again.url, decode_responses=True) as client:
            assert client.get("kept") == "yes"


def test_valkey_runs_from_a_home_with_a_blank_in_its_name(tmp_path: Path) -> None:
    home = tmp_path / "my home"
    with Supervisor(home) as supervisor:
        service = supervisor.start(valkey(home))
        with redis.Redis.from_url(service.url) as client:
            assert client.ping()
    assert (home / "valkey" / "appendonlydir").is_dir()


def answer(url: str) -> str:
    try:
        return httpx.get(url).text
    except httpx.HTTPError:
        return ""


def works(url: str) -> str:
    """The worker's metrics once it has started."""
    deadline = time.monotonic() + 120
    while "mlplatform_stream_starts_total 1.0" not in (told := answer(url)):
        assert time.monotonic() < deadline, "it did not start in time"
        time.sleep(0.1)
    return told


@contextmanager
def killed(home: Path, name: str) -> Iterator[None]:
    """The service has been killed and its keeper knows; at the end of the block it must be back, once."""
    before = kept(home, name)
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    while kept(home, name) == before:
        time.sleep(0.1)
    yield
    after = kept(home, name)
    assert after is not None
    assert (after.restarts, after.pid != before.pid) == (1, True)


@pytest.mark.timeout(240)
def test_the_streaming_worker_starts_beside_an_empty_lake_and_tells_its_metrics(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        redis_url = supervisor.start(valkey(tmp_path)).url
        supervisor.environment.update({"MLPLATFORM_HOME": str(tmp_path), "MLPLATFORM_REDIS_URL": redis_url, "MLPLATFORM_CLOCK": "system"})
        service = supervisor.start(stream_worker())
        assert "mlplatform_stream_connected 1.0" in works(service.url)
        assert (tmp_path / "lake" / "offline" / "origin_congestion" / "_delta_log").is_dir()
        # Killed, it comes back by itself at its port, and waits for the lease of the one before it to run out.
        with killed(tmp_path, "stream"):
            assert "mlplatform_stream_leads 1.0" in works(service.url)
        assert supervisor.services[1] == service
    assert group_members(service.pgid) == []


@pytest.mark.timeout(120)
def test_a_killed_prediction_service_comes_back_by_itself_at_its_port(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        redis_url = supervisor.start(valkey(tmp_path)).url
        supervisor.environment.update({"MLPLATFORM_HOME": str(tmp_path), "MLPLATFORM_REDIS_URL": redis_url, "MLPLATFORM_DEVICE": "cpu"})
        service = supervisor.start(prediction_service())
        with killed(tmp_path, "serving"):
            deadline = time.monotonic() + 60
            while not answer(f"{service.url}/health/live"):
                assert time.monotonic() < deadline, "it did not come back in time"
                time.sleep(0.1)
    assert group_members(service.pgid) == []


@pytest.mark.timeout(240)
def test_mlflow_answers_on_loopback_and_leaves_nothing(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        service = supervisor.start(mlflow(tmp_path))
        answer = httpx.post(f"{service.url}/api/2.0/mlflow/experiments/create", json={"name": "here"})
        assert answer.status_code == 200
        shown = httpx.get(f"{service.url}/api/2.0/mlflow/experiments/get", params=answer.json()).json()
        assert shown["experiment"]["artifact_location"].startswith("mlflow-artifacts:")
        # The server and its one worker; a job runner would bring eight more.
        assert len(group_members(service.pgid)) <= 3
    assert group_members(service.pgid) == []
    assert (tmp_path / "mlflow" / "mlflow.db").is_file()


@pytest.mark.timeout(240)
def test_dagster_runs_on_a_workspace_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text("import dagster as dg\n@dg.asset\ndef a() -> None: ...\ndefs = dg.Definitions(assets=[a])\n")
    workspace = tmp_path / "workspace.yaml"
    workspace.write_text(f"load_from:\n  - python_file: {tmp_path / 'tiny.py'}\n")
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with Supervisor(tmp_path) as supervisor:
        # One after the other: Dagster's SQLite stores cannot be made by two processes at once (ours exist before both start).
        services = [supervisor.start(dagster_webserver(home, workspace)), supervisor.start(dagster_daemon(home, workspace))]
        query = {"query": "{ assetNodes { assetKey { path } } }"}
        shown = httpx.post(f"{services[0].url}/graphql", json=query, timeout=60).json()
        assert shown["data"]["assetNodes"] == [{"assetKey": {"path": ["a"]}}]
        assert all(len(group_members(service.pgid)) >= 2 for service in services)
    assert not any(group_members(service.pgid) for service in services)


def test_the_prediction_service_is_started_as_a_process_with_its_environment() -> None:
    launch = prediction_service({"MLPLATFORM_DEVICE": "cpu"}, port=12345)
    assert launch.command[1:] == ["-m", "serving_app"]
    where = {"MLPLATFORM_SERVING_HOST": "127.0.0.1", "MLPLATFORM_SERVING_PORT": "12345"}
    assert launch.environment == QUIET | {"MLPLATFORM_DEVICE": "cpu"} | where


def test_every_process_gets_the_variables_that_keep_it_from_calling_home(tmp_path: Path) -> None:
    launches = [
        mlflow(tmp_path),
        dagster_webserver(tmp_path, tmp_path / "w"),
        dagster_daemon(tmp_path, tmp_path / "w"),
        prediction_service(),
    ]
    assert all(QUIET.items() <= launch.environment.items() for launch in launches)
