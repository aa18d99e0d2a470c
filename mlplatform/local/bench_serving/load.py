"""Load on a service: `wrk` for closed loops, our own generator for fixed arrival rates, and what they report.

Belongs here: finding, running and reading the generators. Does not belong here: which load (`cases`), what it costs the server (`server`).
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WRK_SCRIPT = Path(__file__).with_name("wrk.lua")
_TIMEOUT_S = 20


class LoadError(RuntimeError):
    """The load generator is missing, or did not report; says what to do."""


@dataclass(frozen=True)
class Target:
    """Where requests go. `bodies` holds one JSON body a line, sent in turn; None: GET."""

    port: int
    path: str
    bodies: Path | None


@dataclass(frozen=True)
class LoadFigures:
    """What one run of a generator saw. Latencies in milliseconds; `errors` are refused, broken, late and not-2xx answers."""

    requests: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


def find_wrk() -> str:
    """The program. Raises LoadError with the mend where there is none."""
    found = shutil.which("wrk")
    if found is None:
        raise LoadError("wrk, which makes the load, was not found. `make bench-tools` installs it (Debian: sudo apt-get install wrk)")
    return found


def closed_loop(target: Target, connections: int, seconds: float) -> LoadFigures:
    """Every connection sends its next request as soon as it has its answer. Runs on the caller's cores, one thread."""
    command = [find_wrk(), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_TIMEOUT_S}s", f"-s{WRK_SCRIPT}"]
    command += [f"http://127.0.0.1:{target.port}{target.path}", *(["--", str(target.bodies)] if target.bodies else [])]
    return parse_figures(_output(command, seconds))


def open_loop(target: Target, rate: float, seconds: float, connections: int) -> LoadFigures:
    """Requests arrive at `rate` a second whatever the answers do, over at most so many connections; latency counts from when a request
    was due."""
    if target.bodies is None:
        raise ValueError("the open loop posts bodies")
    command = [sys.executable, "-m", "mlplatform.local.bench_serving.open_loop", str(target.port), target.path, str(target.bodies)]
    return parse_figures(_output([*command, str(rate), str(seconds), str(connections)], seconds))


def parse_figures(output: str) -> LoadFigures:
    """The figures from the line `FIGURES {…}` both generators print. Raises LoadError where it is missing."""
    lines = [line.removeprefix("FIGURES ") for line in output.splitlines() if line.startswith("FIGURES ")]
    if len(lines) != 1:
        raise LoadError(f"the load generator reported no figures; it said: {output.strip()[-500:] or 'nothing'}")
    return LoadFigures(**json.loads(lines[0]))


def _output(command: list[str], seconds: float) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 3 * _TIMEOUT_S, check=False)
    if ended.returncode != 0:
        said = (ended.stderr or ended.stdout).strip().rpartition("\n")[2]  # of a trace the last line says what was wrong
        raise LoadError(f"{Path(command[0]).name} ended with status {ended.returncode}: {said[-500:]}")
    return ended.stdout
