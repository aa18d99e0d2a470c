"""`HOME/services.json`: which services run, for the next command to find; beside each kept one what its keeper tells.

Belongs here: the files, and ending what it lists. Does not belong here: starting (`supervisor`).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlplatform.local.processes import end_groups, same_group_lives, start_mark


class StateFileError(ValueError):
    """A file under HOME that keeps the platform's state cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Service:
    """A started service. `started` marks the process, to tell it from a later one with its number.

    `wave` counts the starts: services of one wave were started side by side, and later waves may lean on earlier ones.
    """

    name: str
    pid: int
    pgid: int
    port: int
    url: str
    started: str
    wave: int = 0

    @property
    def running(self) -> bool:
        return start_mark(self.pid) == self.started


@dataclass(frozen=True)
class Kept:
    """What a keeper has done: `pid` of the service itself (0 while it waits `wait_s` to start it again), `last_end` in words."""

    pid: int
    restarts: int
    last_end: str
    wait_s: float


@dataclass(frozen=True)
class State:
    """`supervisor` is (pid, start mark) of the command that ends the services when it ends; None once they are detached."""

    services: tuple[Service, ...] = ()
    supervisor: tuple[int, str] | None = None

    @property
    def supervised(self) -> bool:
        return self.supervisor is not None and start_mark(self.supervisor[0]) == self.supervisor[1]


def kept_file(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.kept.json"


def kept(home: Path, name: str) -> Kept | None:
    """What the keeper of a service has written; None for a service without one."""
    file = kept_file(home, name)
    return Kept(**json.loads(file.read_text())) if file.is_file() else None


def _path(home: Path) -> Path:
    return home / "services.json"


def read_state(home: Path) -> State:
    """Raises `StateFileError` where the file is not what this version writes."""
    if not _path(home).exists():
        return State()
    try:
        content = json.loads(_path(home).read_text())
        supervisor = content["supervisor"]
        return State(tuple(Service(**entry) for entry in content["services"]), (supervisor[0], supervisor[1]) if supervisor else None)
    except (OSError, KeyError, TypeError, ValueError) as fault:
        raise StateFileError(f"{_path(home)} cannot be read ({fault}): end its processes by hand and remove it") from fault


def write_state(home: Path, state: State) -> None:
    """Replaces the file in one step."""
    home.mkdir(parents=True, exist_ok=True)
    scratch = _path(home).with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(asdict(state), indent=1))
    scratch.replace(_path(home))


def recorded_services(home: Path) -> tuple[Service, ...]:
    """The services of the state file whose process still runs."""
    return tuple(service for service in read_state(home).services if service.running)


def end_waves(services: Sequence[Service], grace_s: float) -> None:
    """Ends the services' whole groups, last wave first: what others lean on goes last."""
    for wave in sorted({service.wave for service in services}, reverse=True):
        end_groups([service.pgid for service in services if service.wave == wave], grace_s)


def stop_recorded(home: Path, grace_s: float = 10.0) -> tuple[Service, ...]:
    """Ends what the state file lists and still lives; gives what was ended. Foreign processes are never touched.

    Services of a command that still runs are ended too: it then fails on its own.
    """
    state = read_state(home)
    alive = tuple(service for service in state.services if same_group_lives(service.pgid, service.started))
    end_waves(alive, grace_s)
    if state.services:
        write_state(home, State())
    return alive
