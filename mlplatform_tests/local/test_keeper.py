"""A kept service comes back by itself, however it ended, and is gone for good when it is asked to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlplatform.local.processes import group_members, start_mark
from mlplatform.local.service_state import Kept, kept, read_state, recorded_services, stop_recorded
from mlplatform.local.services import log_says
from mlplatform.local.supervisor import Launch, ServiceFailedError, Supervisor

SERVICE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("it is up", flush=True)
time.sleep(600)
"""
DETACH = """
import sys
from pathlib import Path
from mlplatform.local.supervisor import Launch, Supervisor
from mlplatform.local.services import log_says
home = Path(sys.argv[1])
with Supervisor(home) as supervisor:
    for name, restart in (("plain", False), ("kept", True)):
        supervisor.start(Launch(name, [sys.executable, "-c", sys.argv[2]], log_says("it is up"), restart=restart))
    supervisor.detach()
"""


def launch(name: str = "kept", code: str = SERVICE, restart: bool = True) -> Launch:
    return Launch(name, [sys.executable, "-c", code], log_says("it is up"), restart=restart)


def wait_until(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def told(home: Path) -> Kept:
    found = kept(home, "kept")
    assert found is not None
    return found


def came_back(home: Path, restarts: int) -> bool:
    return told(home).restarts == restarts and told(home).pid != 0


@pytest.fixture
def left_running(tmp_path: Path):
    """Two services whose command has returned: one kept, one not."""
    subprocess.run([sys.executable, "-c", DETACH, str(tmp_path), SERVICE], check=True, timeout=60)
    yield tmp_path
    stop_recorded(tmp_path)


def test_a_killed_service_comes_back_after_the_command_has_returned_and_no_other_is_touched(left_running: Path) -> None:
    plain, kept_one = recorded_services(left_running)
    first = told(left_running).pid
    assert (told(left_running).restarts, first != kept_one.pid) == (0, True)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: came_back(left_running, 1))
    assert "SIGKILL" in told(left_running).last_end
    assert recorded_services(left_running) == (plain, kept_one)
    # What the killed one had started is gone: the keeper, the service and its child.
    wait_until(lambda: len(group_members(kept_one.pgid)) == 3)
    os.kill(told(left_running).pid, signal.SIGTERM)  # ending in order is ending too
    wait_until(lambda: came_back(left_running, 2))
    assert "SIGTERM" in told(left_running).last_end


def test_asked_to_end_neither_the_service_nor_its_keeper_comes_back(left_running: Path) -> None:
    _, kept_one = recorded_services(left_running)
    os.kill(kept_one.pid, signal.SIGTERM)  # the keeper alone
    wait_until(lambda: start_mark(kept_one.pid) is None)
    assert start_mark(told(left_running).pid) is None
    stop_recorded(left_running)
    assert group_members(kept_one.pgid) == []


def test_a_service_that_keeps_ending_is_started_at_growing_distances(tmp_path: Path) -> None:
    code = "import time; print('it is up', time.monotonic(), flush=True); time.sleep(0.3)"
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(launch(code=code))
        wait_until(lambda: told(tmp_path).wait_s == 2.0)
        waits = [line.rpartition(" in ")[2] for line in supervisor.log_file("kept").read_text().splitlines() if line.startswith("keeper")]
    assert waits == ["0.5 s", "1 s", "2 s"]
    assert told(tmp_path).restarts == 2


def test_a_service_that_ends_before_it_is_ready_fails_the_start_instead_of_being_tried_for_ever(tmp_path: Path) -> None:
    broken = launch(code="print('a first line'); raise SystemExit('no such database')")
    with Supervisor(tmp_path) as supervisor:
        with pytest.raises(ServiceFailedError, match=r"(?s)'kept' ended with status 1 .*no such database"):
            supervisor.start(broken)
        [service] = supervisor.services
    assert group_members(service.pgid) == []


def test_an_ended_service_is_replaced_while_the_others_go_on(left_running: Path) -> None:
    plain, kept_one = recorded_services(left_running)
    os.kill(plain.pid, signal.SIGKILL)
    wait_until(lambda: not plain.running)
    with Supervisor(left_running, adopt=True) as supervisor:
        again = supervisor.start_again(plain, launch("plain", restart=False))
        supervisor.detach()
    assert set(recorded_services(left_running)) == {again, kept_one}
    assert group_members(plain.pgid) == []  # its child is gone
    stop_recorded(left_running)
    assert not any(group_members(service.pgid) for service in (again, kept_one))


def test_where_replacing_fails_what_runs_goes_on_and_the_ended_one_is_still_told(left_running: Path) -> None:
    plain, kept_one = recorded_services(left_running)
    os.killpg(plain.pgid, signal.SIGKILL)
    wait_until(lambda: not plain.running)
    broken = launch("plain", "raise SystemExit(3)", restart=False)
    with pytest.raises(ServiceFailedError), Supervisor(left_running, adopt=True) as supervisor:
        supervisor.start_again(plain, broken)
    assert recorded_services(left_running) == (kept_one,)
    assert set(read_state(left_running).services) == {plain, kept_one}
