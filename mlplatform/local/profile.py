"""The local profile: which services run under one home, and the settings that point everything at them.

Belongs here: starting the services in the right order and the `MLPLATFORM_*` variables that follow from where they answer.
Does not belong here: how one service is started (`services`), or what is done on the platform (`demo`).
"""

import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from mlplatform.clock import SimulatedClock
from mlplatform.local import services
from mlplatform.local.service_state import read_state
from mlplatform.local.supervisor import HomeInUseError, Supervisor, free_port
from mlplatform.settings import load_settings

# The sample data is of 2013; the demo stands at the first of September.
START = datetime(2013, 9, 1, tzinfo=UTC)

ENVIRONMENT = "environment.json"
PORTS = "ports.json"
SERVICES = ("valkey", "sources", "mlflow", "reports", "serving", "dagster", "stream")

BENCH = "bench"  # what the benches install for the services they compare with; no part of a platform, and left alone

# What a new demo starts without. The cache of the sample data stays: it is the same every time.
STATE = ("lake", "mlflow", "valkey", "dagster", "feast", "optuna", "serving", "reports", "logs", "clock.json", ENVIRONMENT)


def reset(home: Path) -> None:
    """Removes the platform's state under `home`, the sample data's cache excepted.

    Tens of thousands of small files take half a minute to delete: they are moved aside at once and deleted on the way. What
    a short command leaves of them, the next reset deletes.
    """
    trash = home / "trash"
    aside = trash / uuid.uuid4().hex
    for name in STATE:
        if (home / name).exists():
            aside.mkdir(parents=True, exist_ok=True)
            (home / name).rename(aside / name)
    if trash.exists():
        threading.Thread(target=shutil.rmtree, args=(trash,), kwargs={"ignore_errors": True}, daemon=True).start()


def refuse_to_reset(home: Path) -> None:
    """Raises HomeInUseError where a platform runs under `home`, or where what lies there is not a platform's."""
    if any(service.running for service in read_state(home).services):
        raise HomeInUseError(f"a platform runs under {home}, and this would remove its tables, models and history")
    others = [top for top in home.iterdir() if top.name != BENCH] if home.is_dir() else []
    if not (home / "services.json").exists() and any(path.is_file() for top in others for path in (top, *top.rglob("*"))):
        raise HomeInUseError(f"{home} holds files that no platform wrote, and this would remove what is in its way there")


def stable_ports(home: Path) -> dict[str, int]:
    """A loopback port per service: the one it had last time where that is still free, so that links keep working."""
    file = home / PORTS
    known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    ports = {name: known[name] if name in known and _is_free(known[name]) else free_port() for name in SERVICES}
    file.write_text(json.dumps(ports))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((services.HOST, port))
        except OSError:
            return False
    return True


def repository_root() -> Path:
    """The checkout's root: where workspace.yaml and dagster.yaml lie. Raises LookupError for an installation without them."""
    root = Path(__file__).parents[2]
    if not (root / "workspace.yaml").exists():
        raise LookupError(f"no workspace.yaml under {root}: the local profile runs from a checkout, not from an installed wheel")
    return root


@dataclass
class LocalPlatform(AbstractContextManager["LocalPlatform"]):
    """The running local platform. Entering starts Valkey, the source systems and MLflow; leaving ends everything."""

    home: Path
    start: datetime = START

    def __post_init__(self) -> None:
        self.home = self.home.absolute()
        self.clock = SimulatedClock(self.home / "clock.json")
        self.supervisor = Supervisor(self.home)
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        self.supervisor.__enter__()
        try:
            self._start_base()
        except BaseException:  # Ctrl-C too: `with` calls no __exit__ of its own when entering fails
            self.supervisor.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.supervisor.__exit__(kind, error, trace)

    def _start_base(self) -> None:
        if not self.clock.path.exists():
            self.clock.set(self.start)
        self.ports = stable_ports(self.home)
        valkey = self.supervisor.start(services.valkey(self.home, self.ports["valkey"]))
        base = [
            services.source_systems(self.home, valkey.url, self.clock.path, self.start, self.ports["sources"]),
            services.mlflow(self.home, self.ports["mlflow"]),
            services.reports(self.home, self.ports["reports"]),
        ]
        sources, mlflow, reports = self.supervisor.start_all(base)
        self._use(
            {
                "MLPLATFORM_PROFILE": "local",
                "MLPLATFORM_HOME": str(self.home),
                "MLPLATFORM_CLOCK": str(self.clock.path),
                "MLPLATFORM_REDIS_URL": valkey.url,
                "MLPLATFORM_MLFLOW_URL": mlflow.url,
                "MLPLATFORM_SOURCE_REFERENCE": f"sqlite:///{self.home / 'sources' / 'reference.db'}",
                "MLPLATFORM_SOURCE_WEATHER": sources.url,
                "MLPLATFORM_REPORTS_URL": reports.url,
                "MLPLATFORM_SERVING_URL": f"http://{services.HOST}:{self.ports['serving']}",
                "MLPLATFORM_DAGSTER_URL": f"http://{services.HOST}:{self.ports['dagster']}",
                "MLPLATFORM_FEAST_REGISTRY": str(self.home / "feast" / "registry.db"),
                "MLPLATFORM_DAGSTER_HISTORY": str(self.home / "dagster" / "history"),
                "DAGSTER_HOME": str(self.home / "dagster"),
                **services.QUIET,
            }
        )
        self.sources_url = sources.url

    def _use(self, variables: Mapping[str, str]) -> None:
        """Gives the variables to this process and to every child started from now on."""
        self.environment |= variables
        os.environ.update(variables)
        self.supervisor.environment.update(variables)
        load_settings.cache_clear()
        dagster_home = self.home / "dagster"
        (dagster_home / "history").mkdir(parents=True, exist_ok=True)
        # The UI's welcome dialog counts as seen: it asks for an e-mail address before it shows anything.
        (dagster_home / ".nux").mkdir(exist_ok=True)
        (dagster_home / ".nux" / "nux.yaml").write_text("seen: 1\n")
        # For the other commands: where everything answers. No secret is in it; the local services have none.
        settings = {k: v for k, v in self.environment.items() if k.startswith(("MLPLATFORM_", "DAGSTER_HOME"))}
        (self.home / ENVIRONMENT).write_text(json.dumps(settings, indent=2, sort_keys=True))
        shutil.copy(repository_root() / "dagster.yaml", dagster_home / "dagster.yaml")

    def start_serving(self) -> None:
        """Starts the prediction service; it finds the model by its alias as soon as there is one."""
        self.supervisor.start(services.prediction_service(port=self.ports["serving"]))

    def start_automation(self) -> None:
        """Starts what keeps the platform up to date: the streaming worker; Dagster's UI and daemon with all automation running."""
        from mlplatform.orchestration.runner import end_orphans

        workspace = repository_root() / "workspace.yaml"
        end_orphans(self.home / "dagster")
        self.supervisor.start_all(
            [
                services.dagster_webserver(self.home / "dagster", workspace, self.ports["dagster"]),
                services.dagster_daemon(self.home / "dagster", workspace),
                services.stream_worker(self.ports["stream"]),
            ]
        )

    def start_clock(self, speed: float) -> None:
        """Lets the simulated clock run, through the source systems so that they publish what becomes due."""
        import httpx

        # Stopped first: a clock left running by an unclean end is past the time read from it by the time it is set.
        now = max(self.clock.now(), self.start)
        self.clock.set(now)
        httpx.post(f"{self.sources_url}/clock", json={"to": now.isoformat(), "speed": speed}, timeout=60).raise_for_status()
