"""Processes held to a part of a core each, so that a machine with few shows what they would do with more.

Belongs here: the system's control groups. Does not belong here: what is measured meanwhile.

The kernel lets a group run for `quota` of each `period` (CFS bandwidth control, P. Turner et al., "CPU bandwidth control for CFS", 2010);
who is held back does not compete with who makes the load. Version 1 of control groups, by root.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import sleep

_ROOT = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 10_000  # short, so that a closed loop does not see the pauses as load that comes in waves
_GONE_S = 0.05


class NoQuotaError(RuntimeError):
    """This system, or this user, holds nobody back; says why."""


@contextmanager
def held(pids: Sequence[int], share: float) -> Iterator[None]:
    """Each of these processes gets `share` of a core while the block runs. Raises NoQuotaError."""
    with ExitStack() as stack:
        for pid in pids:
            stack.enter_context(_group(pid, share))
        yield


@contextmanager
def _group(pid: int, share: float) -> Iterator[None]:
    folder = _ROOT / f"mlplatform-bench-{pid}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoQuotaError(f"no control group can be made under {_ROOT} ({error.strerror})") from error
    try:
        try:
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(round(share * _PERIOD_US)))
            (folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise NoQuotaError(f"{folder} takes no quota ({error.strerror})") from error
        yield
    finally:
        with suppress(OSError):  # it has ended
            (_ROOT / "cgroup.procs").write_text(str(pid))
        _remove(folder)


def _remove(folder: Path) -> None:
    """An empty group; one that a process has just left is busy for a moment."""
    for _ in range(20):
        try:
            folder.rmdir()
        except OSError:
            sleep(_GONE_S)
        else:
            return
