"""Where the service's processor time goes under load: py-spy's samples, summed up by stage and by function.

Belongs here: sampling a running process, reading the samples. Does not belong here: load, showing.

A sample belongs to the innermost of our functions in its stack, with everything called from there; where there is none, to the library's.
"""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlplatform.local.bench_serving.load import LoadError

_RATE = 500  # samples a second
_OURS = ("serving_app/", "mlplatform/", "feature_definitions/")


@dataclass(frozen=True)
class Share:
    """`own`: samples in which it was the innermost of ours; `within`: samples in which it was anywhere in the stack; both of 1."""

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
    """Frames `function (file:line)`, outermost first, and how many samples had them."""
    for line in output.splitlines():
        frames, _, count = line.rpartition(" ")
        yield frames.split(";"), int(count)


def by_function(found: list[tuple[list[str], int]]) -> list[Share]:
    """Shares of single functions, largest first."""
    return _shares([([_function(frame) for frame in frames], count) for frames, count in found])


def by_file(found: list[tuple[list[str], int]]) -> list[Share]:
    """Shares of whole modules, which are the stages of a request, largest first."""
    return _shares([([_function(frame).partition(" ")[0] for frame in frames], count) for frames, count in found])


def _shares(found: list[tuple[list[str], int]]) -> list[Share]:
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for frames, count in found:
        own[next((frame for frame in reversed(frames) if frame.startswith(_OURS)), frames[-1])] += count
        for frame in set(frames):
            within[frame] += count
    total = sum(own.values()) or 1
    return [Share(where, count / total, within[where] / total) for where, count in own.most_common()]


def _function(frame: str) -> str:
    """`parse (serving_app/inputs.py:40)` as `serving_app/inputs.py parse`."""
    name, _, place = frame.rpartition(" (")
    return f"{place.rpartition(':')[0] or place.rstrip(')')} {name}"
