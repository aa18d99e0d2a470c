"""Starting again those services of a running platform that have ended, each at its address, and none of the others.

Belongs here: which launch a recorded service had. Does not belong here: the first start, in order (`profile`), services that
start again by themselves (`keeper`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mlplatform.local import services
from mlplatform.local.profile import ENVIRONMENT, START, repository_root
from mlplatform.local.service_state import Service, read_state
from mlplatform.local.supervisor import Launch, Supervisor


def revive(home: Path) -> tuple[Service, ...]:
    """Starts what has ended; returns it. Raises ServiceFailedError, HomeInUseError; what runs is untouched either way."""
    home = home.absolute()
    environment: dict[str, str] = json.loads((home / ENVIRONMENT).read_text())
    with Supervisor(home, environment | services.QUIET, adopt=True) as supervisor:
        recorded = read_state(home).services
        ended = [service for service in recorded if not service.running]
        dagster = [service in ended for service in recorded if service.name.startswith("dagster")]
        if dagster and all(dagster):  # else a run may still be at work
            from mlplatform.orchestration.runner import end_orphans

            end_orphans(home / "dagster")
        # In the order of the first start: what others lean on comes first.
        started = tuple(supervisor.start_again(service, launch_of(service, home, environment)) for service in ended)
        supervisor.detach()
    return started


def launch_of(service: Service, home: Path, environment: Mapping[str, str]) -> Launch:
    """How `profile` started it. Raises ValueError for a name it does not know."""
    port, dagster_home, workspace = service.port, home / "dagster", repository_root() / "workspace.yaml"
    launches: dict[str, Callable[[], Launch]] = {
        "valkey": lambda: services.valkey(home, port),
        "sources": lambda: services.source_systems(home, environment["MLPLATFORM_REDIS_URL"], home / "clock.json", START, port),
        "mlflow": lambda: services.mlflow(home, port),
        "reports": lambda: services.reports(home, port),
        "serving": lambda: services.prediction_service(port=port),
        "stream": lambda: services.stream_worker(port),
        "dagster-webserver": lambda: services.dagster_webserver(dagster_home, workspace, port),
        "dagster-daemon": lambda: services.dagster_daemon(dagster_home, workspace),
    }
    if service.name not in launches:
        raise ValueError(f"{service.name} was started by another version: `mlplatform down`, then `mlplatform up`")
    return launches[service.name]()
