"""What the operating system knows of processes and their groups: who lives, since when, and ending a whole group.

Belongs here: identity, membership and signals, on Linux through /proc and elsewhere through `ps`. Does not belong here:
what the processes are for (`supervisor`, `services`).
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def start_mark(pid: int) -> str | None:
    """A mark that another process with the same number would not carry; None where no such process lives.

    On Linux the boot and the start in clock ticks, elsewhere the start time that `ps` shows.
    """
    if (_PROC / "self" / "stat").exists():
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    lines = _ps("-p", str(pid), "-o", "stat=,lstart=")
    return None if not lines or lines[0].startswith("Z") else lines[0].split(maxsplit=1)[1]


def group_members(pgid: int) -> list[int]:
    """The living processes of a group; one that has ended and waits for its parent does not count."""
    if (_PROC / "self" / "stat").exists():
        found = ((int(entry.name), _stat(int(entry.name))) for entry in _PROC.iterdir() if entry.name.isdigit())
        return [pid for pid, fields in found if fields is not None and fields[2] == str(pgid) and fields[0] not in "ZX"]
    rows = (line.split() for line in _ps("-ax", "-o", "pid=,pgid=,stat="))
    return [int(pid) for pid, group, state in rows if group == str(pgid) and not state.startswith("Z")]


def same_group_lives(pgid: int, mark: str) -> bool:
    """Whether the group led by the process of `mark` still has members, the leader itself perhaps gone.

    A process number is not given out again while a group carries it, so a leader with another mark means the group is gone.
    """
    leader = start_mark(pgid)
    if leader is not None:
        return leader == mark
    if (_PROC / "self" / "stat").exists() and not mark.startswith(f"{_boot()}:"):
        return False
    return bool(group_members(pgid))


def end_groups(pgids: Iterable[int], grace_s: float = 10.0) -> None:
    """SIGTERM to every group, SIGKILL to those that still live after `grace_s`. Returns when none does.

    Raises `TimeoutError` where even SIGKILL leaves one behind (it hangs in the kernel).
    """
    waiting = list(pgids)
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        for pgid in waiting:
            _signal_group(pgid, number)
        deadline = time.monotonic() + patience
        while waiting and time.monotonic() < deadline:
            waiting = [pgid for pgid in waiting if group_members(pgid)]
            time.sleep(0.05 if waiting else 0)
    if waiting:
        raise TimeoutError(f"process groups {waiting} survived SIGKILL")


def _signal_group(pgid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        pass  # ended by itself in the meantime: that is what was wanted
    except PermissionError:
        # macOS answers so for a group of which only an ended, unreaped process is left.
        if group_members(pgid):
            raise


def _boot() -> str:
    return (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (field 3 of proc(5)); None where the process is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before it stands in brackets and may itself hold brackets and blanks.
    return text.rpartition(") ")[2].split()


def _ps(*arguments: str) -> list[str]:
    return subprocess.run(["ps", *arguments], capture_output=True, text=True, check=False).stdout.splitlines()
