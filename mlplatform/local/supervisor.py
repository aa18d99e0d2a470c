"""Starts, watches and ends the local profile's child processes; nothing is left behind however the parent ends.

Belongs here: ports, logs, readiness, stopping. Does not belong here: which services there are (`services`).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeAlias

from mlplatform.local import keeper, watchdog
from mlplatform.local.processes import end_groups, same_group_lives, start_mark
from mlplatform.local.service_state import Kept, Service, State, end_waves, kept, kept_file, read_state, stop_recorded, write_state

_LOG_TAIL_LINES = 30
_PROBE_EVERY_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Feast sets them for its own server when it is imported, and removes their folder when its process ends: a child that
# inherits them counts its metrics there, and fails once the folder is gone.
_NOT_INHERITED = frozenset({"PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR"})
_given_out: set[int] = set()

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


@dataclass(frozen=True)
class Launch:
    """How one service is started. `port` 0: it listens nowhere. `ready(log_text)` is asked until it says yes.

    `url` is what others connect to. `environment` is added to the supervisor's own. With `restart` a keeper starts it again
    whenever it ends, also after the command that started it has returned.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[str], bool]
    url: str = ""
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    restart: bool = False


class ServiceFailedError(RuntimeError):
    """A service ended or stayed silent while it should have become ready; carries the end of its log."""


class HomeInUseError(RuntimeError):
    """Another command supervises services under the same home."""


def free_port() -> int:
    """A loopback port nobody listens on, and that this process has not given out before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_out:
            _given_out.add(port)
            return port


class Supervisor:
    """Context manager around the children of one command: leaving it, by whatever way, ends them all.

    Entering ends services that an earlier command left running under this home, and raises `HomeInUseError` where that
    command still runs. SIGINT, SIGTERM and SIGHUP leave it as `SystemExit(128 + signal)`, so that `finally` blocks run;
    for a supervisor that is killed outright its watchdog does the work. After `detach()` the children stay.
    `environment` is given to every child.

    With `adopt` what an earlier command left running stays and is left alone, also on leaving; `start_again` replaces those
    of it that have ended.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None, *, adopt: bool = False) -> None:
        self.home = home.absolute()
        self._adopt = adopt
        self._found: tuple[Service, ...] = ()  # as an earlier command left them
        self._adopted: tuple[Service, ...] = ()  # those of them that were not started again
        self.environment = dict(environment or {})
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Service, subprocess.Popen[bytes]]] = {}
        self._waves = 0
        self._handlers: dict[int, Handler] = {}
        self._detached = False
        self._stopping = False

    def __enter__(self) -> Self:
        if read_state(self.home).supervised:
            raise HomeInUseError(f"another command runs its services under {self.home}: end it, or use another home")
        if self._adopt:
            self._found = self._adopted = read_state(self.home).services
        else:
            stop_recorded(self.home)
        reading, self._registry = os.pipe()
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, "watch", str(reading)],
            pass_fds=[reading],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(reading)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self._record()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if not self._detached:
                self.stop_all()
                # Ends what a signal kept from being counted: every child made itself known to the watchdog first.
                self._tell(watchdog.END)
                write_state(self.home, State(self._found))
        finally:
            os.close(self._registry)
            self._watchdog.wait()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # Told at once, so that starts under way give up. While stopping, a second Ctrl-C must not leave half behind.
        if not self._stopping:
            self._stopping = True
            raise SystemExit(128 + number)

    def _tell(self, word: str) -> None:
        os.write(self._registry, f"{word}\n".encode())

    @property
    def services(self) -> tuple[Service, ...]:
        """The running services in the order of their start."""
        with self._lock:
            return tuple(service for service, _ in self._running.values())

    def log_file(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def start(self, launch: Launch) -> Service:
        """Starts a service and waits until it is ready. Raises `ServiceFailedError` with the end of its log."""
        return self.start_all([launch])[0]

    def start_all(self, launches: Sequence[Launch]) -> tuple[Service, ...]:
        """Starts services side by side, as one wave; a failure is raised once all have settled."""
        self._waves += 1
        with ThreadPoolExecutor(max_workers=max(len(launches), 1), thread_name_prefix="start") as pool:
            return tuple(pool.map(self._start, launches, [self._waves] * len(launches)))

    def start_again(self, ended: Service, launch: Launch) -> Service:
        """Starts an adopted service that has ended, after what it left behind. Raises `ServiceFailedError`."""
        if same_group_lives(ended.pgid, ended.started):
            end_groups([ended.pgid])
        return self._start(launch, ended.wave)

    def _start(self, launch: Launch, wave: int) -> Service:
        log = self.log_file(launch.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output, self._lock:
            offset = output.tell()
            process = self._spawn(launch, output.fileno())
            service = Service(launch.name, process.pid, process.pid, launch.port, launch.url, start_mark(process.pid) or "", wave)
            self._running[launch.name] = (service, process)
            self._adopted = tuple(other for other in self._adopted if other.name != launch.name)
            self._record()
        self._await_ready(launch, process, log, offset)
        return service

    def _spawn(self, launch: Launch, output: int) -> "subprocess.Popen[bytes]":
        if launch.name in self._running:
            raise ValueError(f"the service '{launch.name}' was started already")
        if self._stopping:
            raise ServiceFailedError(f"'{launch.name}' is not started: the supervisor is stopping")
        kept_by = [sys.executable, "-I", "-S", keeper.__file__, str(kept_file(self.home, launch.name))] if launch.restart else []
        kept_file(self.home, launch.name).unlink(missing_ok=True)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, "run", str(self._registry), *kept_by, *launch.command],
            env={name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
            | self.environment
            | dict(launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[self._registry],
            start_new_session=True,
        )

    def _await_ready(self, launch: Launch, process: "subprocess.Popen[bytes]", log: Path, offset: int) -> None:
        deadline = time.monotonic() + launch.timeout_s
        while process.poll() is None and time.monotonic() < deadline and not self._stopping and not self._failing(launch):
            if launch.ready(_text_from(log, offset)):
                return
            time.sleep(_PROBE_EVERY_S)
        if (failing := self._failing(launch)) is not None:
            how = f"ended with {failing.last_end} before it was ready"
        elif process.poll() is not None:
            how = f"ended with status {process.returncode} before it was ready"
        else:
            how = "was stopped while it started" if self._stopping else f"was not ready within {launch.timeout_s:.0f} s"
        tail = "\n".join(_text_from(log, offset).splitlines()[-_LOG_TAIL_LINES:])
        raise ServiceFailedError(f"the service '{launch.name}' {how}; the end of {log}:\n{tail}")

    def _failing(self, launch: Launch) -> Kept | None:
        """What its keeper tells of a service that has ended before it was ready: a keeper itself would try for ever."""
        found = kept(self.home, launch.name) if launch.restart else None
        return found if found is not None and found.last_end else None

    def stop(self, name: str, grace_s: float = 10.0) -> None:
        """Ends one service and everything it started."""
        with self._lock:
            ended = self._running.pop(name)
        self._end([ended], grace_s)

    def stop_all(self, grace_s: float = 10.0) -> None:
        """Ends every service and everything they started, last started first; nothing can be started afterwards."""
        self._stopping = True
        with self._lock:
            running, self._running = list(self._running.values()), {}
        self._end(running, grace_s)

    def _end(self, running: "list[tuple[Service, subprocess.Popen[bytes]]]", grace_s: float) -> None:
        end_waves([service for service, _ in running], grace_s)
        for service, process in running:
            process.wait()
            self._tell(f"-{service.pgid}")
        with self._lock:
            self._record()

    def _record(self) -> None:
        supervisor = None if self._detached else (os.getpid(), start_mark(os.getpid()) or "")
        services = (*self._adopted, *(service for service, _ in self._running.values()))
        write_state(self.home, State(tuple(sorted(services, key=lambda service: service.wave)), supervisor))

    def detach(self) -> None:
        """Lets the children outlive this process; `stop_recorded(home)` ends them."""
        with self._lock:
            self._detached = True
            self._record()
            self._tell(watchdog.DETACH)
            for _, process in self._running.values():
                # No longer ours to wait for; without a status Popen would warn when it is collected.
                process.returncode = 0


def _text_from(log: Path, offset: int) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
