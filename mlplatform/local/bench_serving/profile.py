"""Where the service's processor time goes under load: py-spy's samples, summed up by package and by function.

Belongs here: sampling a running process, reading the samples. Does not belong here: load, showing.
"""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlplatform.local.bench_serving.load import LoadError

_RATE = 500  # samples a second
_OURS = ("serving_app/", "mlplatform/", "feature_definitions/")


# Threads of a pool that wait for work, and the shadow's event loop: the sampler takes them for busy where it may not ask the system. The
# application's own loop is uvloop's, which selects elsewhere.
_WAITING = ("wait (threading.py", "Condition.wait (threading.py", "EpollSelector.select (selectors.py")
_IDLE = ("_worker (concurrent/futures/thread.py", *_WAITING)


@dataclass(frozen=True)
class Share:
    """`own`: samples that are counted here alone; `within`: samples that have it anywhere in their stack; both of 1."""

    where: str
    own: float
    within: float


def find_py_spy() -> str:
    """The program. Raises LoadError with the mend where there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise LoadError("py-spy, which samples the service, was not found. The extra `bench` has it: pip install 'mlplatform[bench]'")
    return found


def sampling(pid: int, seconds: float, output: Path) -> "subprocess.Popen[str]":
    """Begins to sample a process for `seconds`; wait for it, then `stacks(output)`."""
    options = ["--rate", str(_RATE), "--duration", str(round(seconds)), "--format", "raw", "--function", "--output", str(output)]
    return subprocess.Popen(
        [find_py_spy(), "record", *options, "--pid", str(pid)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def stacks(output: str) -> Iterator[tuple[list[str], int]]:
    """Frames `function (file:line)`, outermost first, and how many samples had them; threads that wait are left out."""
    for line in output.splitlines():
        frames, _, count = line.rpartition(" ")
        found = frames.split(";")
        if not found[-1].startswith(_IDLE):
            yield found, int(count)


def by_package(found: list[tuple[list[str], int]]) -> list[Share]:
    """A sample counts where the processor was: the innermost frame's package, or our module. Largest first."""
    return _shares([([_package(frame) for frame in frames], count) for frames, count in found], innermost=lambda frames: frames[-1])


def by_function(found: list[tuple[list[str], int]]) -> list[Share]:
    """A sample counts for the innermost function of ours, with every library called from there; else for the library's. Largest first."""

    def innermost(frames: list[str]) -> str:
        return next((frame for frame in reversed(frames) if frame.startswith(_OURS)), frames[-1])

    return _shares([([f"{_file(frame)} {_name(frame)}" for frame in frames], count) for frames, count in found], innermost)


def _shares(found: list[tuple[list[str], int]], innermost: Callable[[list[str]], str]) -> list[Share]:
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for frames, count in found:
        own[innermost(frames)] += count
        for frame in set(frames):
            within[frame] += count
    total = sum(own.values()) or 1
    return [Share(where, count / total, within[where] / total) for where, count in own.most_common()]


def _file(frame: str) -> str:
    """`serving_app/inputs.py` of `parse (serving_app/inputs.py:40)`."""
    place = frame.rpartition(" (")[2].rstrip(")")
    file, _, line = place.rpartition(":")
    return file if line.isdigit() else place


def _name(frame: str) -> str:
    return frame.rpartition(" (")[0]


def _package(frame: str) -> str:
    file = _file(frame)
    return file if file.startswith(_OURS) else file.partition("/")[0]
