"""A service under load as a process: on which cores it runs, when it first answers, what it uses.

Belongs here: what is the same for ours and for a peer. Does not belong here: how each is started and asked (`contenders`).
"""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlplatform.local.processes import group_members
from mlplatform.local.service_state import Service
from mlplatform.local.supervisor import Launch, ServiceFailedError, Supervisor

_PROC = Path("/proc")
_POLL_S = 0.01
_FIRST_ANSWER_S = 120.0


class TooFewCoresError(RuntimeError):
    """The machine cannot keep the load off the service's core."""


class AnswerError(RuntimeError):
    """A service answered something else than 200; carries what it said."""


@dataclass(frozen=True)
class Cores:
    """Who runs where. With two cores the server has one and the load, Valkey and MLflow the other."""

    server: frozenset[int]
    load: frozenset[int]

    @classmethod
    def split(cls, available: Sequence[int], workers: int) -> "Cores | None":
        """A core per worker and as many for the rest; None where there are not so many."""
        ordered = sorted(available)
        if len(ordered) < 2 * workers:
            return None
        return cls(frozenset(ordered[:workers]), frozenset(ordered[workers:]))


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """What is started inside stays on these cores: a child has its parent's."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


@dataclass(frozen=True)
class Usage:
    """Of all processes of a service: processor seconds so far, and the largest process's resident memory."""

    cpu_s: float
    rss_mb: float


@dataclass(frozen=True)
class Running:
    """A started service. `ready_s`: from the start of its process to its first good answer."""

    service: Service
    ready_s: float

    @property
    def usage(self) -> Usage:
        pids = group_members(self.service.pgid)
        return Usage(sum(map(cpu_s, pids)), max(map(_rss_mb, pids), default=0.0))

    def pause(self) -> None:
        """While another is measured, this one must not use its core."""
        os.killpg(self.service.pgid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.service.pgid, signal.SIGCONT)


def start(supervisor: Supervisor, launch: Launch, cores: frozenset[int], path: str, body: Mapping[str, Any] | None) -> Running:
    """Starts a service on `cores` and asks until it answers 200. Raises ServiceFailedError with the end of its log."""
    began = time.perf_counter()
    # The supervisor looks ten times a second, which is too coarse for a start of a second.
    with on_cores(cores):
        service = supervisor.start(replace(launch, ready=lambda _: True))
    last = ""
    while (taken := time.perf_counter() - began) < _FIRST_ANSWER_S and service.running:
        try:
            ask(launch.port, path, body)
        except (OSError, http.client.HTTPException, AnswerError) as error:
            last = str(error)
            time.sleep(_POLL_S)
        else:
            return Running(service, time.perf_counter() - began)
    log = supervisor.log_file(launch.name).read_text(errors="replace")[-2000:]
    raise ServiceFailedError(f"{launch.name} gave no good answer within {taken:.0f} s ({last}); the end of its log:\n{log}")


def ask(port: int, path: str, body: Mapping[str, Any] | None) -> Any:
    """The JSON answer of one request on a connection of its own (GET without a body). Raises AnswerError, OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise AnswerError(f"{path} answered {answer.status}: {content[:300].decode(errors='replace')}")
        return json.loads(content)
    finally:
        connection.close()


def answers(port: int, path: str, body: Mapping[str, Any] | None) -> bool:
    """Whether the service answers one request with 200."""
    try:
        ask(port, path, body)
    except (OSError, http.client.HTTPException, AnswerError):
        return False
    return True


def busy_s() -> float:
    """Processor seconds of the whole machine so far, everybody's."""
    fields = (_PROC / "stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / _ticks()


def own_s(supervisor: Supervisor) -> float:
    """Processor seconds so far of this process, its ended children (the load generators) and every service."""
    mine = os.times()
    services = sum(cpu_s(pid) for service in supervisor.services for pid in group_members(service.pgid))
    return mine.user + mine.system + mine.children_user + mine.children_system + services


def cpu_s(pid: int) -> float:
    """Processor seconds of one process so far; 0 where it has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _ticks()


def _rss_mb(pid: int) -> float:
    try:
        pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK")
