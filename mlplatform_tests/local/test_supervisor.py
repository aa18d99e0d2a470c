"""Children live exactly as long as they should: no process is left behind, and no foreign one is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlplatform.local.processes import end_groups, group_members, same_group_lives, start_mark
from mlplatform.local.service_state import read_state, recorded_services, stop_recorded
from mlplatform.local.services import http_ready, log_says
from mlplatform.local.supervisor import HomeInUseError, Launch, ServiceFailedError, Supervisor, free_port

# Starts a child of its own, as MLflow and Dagster do, and ignores SIGTERM where asked to.
FAMILY = """
import signal, subprocess, sys, time
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("family is up", flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from mlplatform.local.supervisor import Launch, Supervisor
from mlplatform.local.services import log_says
how, home = sys.argv[1], Path(sys.argv[2])
with Supervisor(home) as supervisor:
    supervisor.start_all([Launch(n, [sys.executable, "-c", sys.argv[3]], log_says("family is up")) for n in ("one", "two")])
    if how == "slow":
        supervisor.start(Launch("never", [sys.executable, "-c", sys.argv[3]], log_says("what is never said"), timeout_s=600))
    if how == "detach":
        supervisor.detach()
    else:
        (home / "ready").touch()
        time.sleep(600)
"""


def family(name: str = "family", *arguments: str) -> Launch:
    return Launch(name, [sys.executable, "-c", FAMILY, *arguments], log_says("family is up"))


def parent(how: str, home: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", PARENT, how, str(home), FAMILY], start_new_session=True)


def wait_until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def members(home: Path) -> list[int]:
    return [pid for service in read_state(home).services for pid in group_members(service.pgid)]


def test_leaving_the_supervisor_ends_children_and_grandchildren(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        service = supervisor.start(family())
        assert len(group_members(service.pgid)) == 2
        assert recorded_services(tmp_path) == (service,)
    assert group_members(service.pgid) == []
    assert read_state(tmp_path).services == ()


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        service = supervisor.start(family("deaf", "deaf"))
        supervisor.stop("deaf", grace_s=0.3)
        assert group_members(service.pgid) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_a_parent_that_is_signalled(tmp_path: Path, number: signal.Signals) -> None:
    with parent("stay", tmp_path) as process:
        wait_until((tmp_path / "ready").exists)
        groups = [service.pgid for service in read_state(tmp_path).services]
        assert (len(groups), len(members(tmp_path))) == (2, 4)
        process.send_signal(number)
        status = process.wait(20)
    assert status == (-9 if number is signal.SIGKILL else 128 + number)
    wait_until(lambda: not any(group_members(group) for group in groups))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_parent_signalled_while_a_service_starts_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with parent("slow", tmp_path) as process:
        wait_until(lambda: len(members(tmp_path)) == 6)
        groups = [service.pgid for service in read_state(tmp_path).services]
        process.send_signal(number)
        process.wait(5)
    wait_until(lambda: not any(group_members(group) for group in groups))


def test_detached_children_outlive_the_command_and_the_next_one_ends_them(tmp_path: Path) -> None:
    with parent("detach", tmp_path) as process:
        assert process.wait(20) == 0
    time.sleep(0.7)  # longer than the watchdog's round
    assert sorted(service.name for service in recorded_services(tmp_path)) == ["one", "two"]  # they start side by side
    groups = [service.pgid for service in read_state(tmp_path).services]
    assert {service.name for service in stop_recorded(tmp_path)} == {"one", "two"}
    assert not any(group_members(group) for group in groups)
    assert stop_recorded(tmp_path) == ()


def test_entering_ends_what_an_earlier_command_left_running(tmp_path: Path) -> None:
    with parent("detach", tmp_path) as process:
        process.wait(20)
    groups = [service.pgid for service in read_state(tmp_path).services]
    with Supervisor(tmp_path):
        assert not any(group_members(group) for group in groups)


def test_a_home_is_supervised_by_one_command_at_a_time(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as first:
        with pytest.raises(HomeInUseError), Supervisor(tmp_path):
            pass
        first.start(family())
        with pytest.raises(HomeInUseError), Supervisor(tmp_path):
            pass
        assert len(recorded_services(tmp_path)) == 1


def test_a_process_that_took_over_the_number_is_not_touched(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as foreign:
        entry = {"name": "x", "pid": foreign.pid, "pgid": foreign.pid, "port": 0, "url": "", "started": "another boot:1"}
        (tmp_path / "services.json").write_text(json.dumps({"services": [entry], "supervisor": None}))
        assert recorded_services(tmp_path) == ()
        assert stop_recorded(tmp_path) == ()
        assert foreign.poll() is None
        mark = start_mark(foreign.pid)
        assert same_group_lives(foreign.pid, str(mark))
        end_groups([foreign.pid])
    assert start_mark(foreign.pid) is None


def test_a_leaderless_group_is_still_known_and_ended(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        service = supervisor.start(family())
        os.kill(service.pid, signal.SIGKILL)
        wait_until(lambda: len(group_members(service.pgid)) == 1)
        assert not service.running
        assert same_group_lives(service.pgid, service.started)
    assert group_members(service.pgid) == []


def test_a_service_that_fails_to_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    broken = Launch("broken", [sys.executable, "-c", "print('a first line'); raise SystemExit('no such database')"], log_says("never"))
    with Supervisor(tmp_path) as supervisor, pytest.raises(ServiceFailedError, match=r"(?s)'broken' ended with status 1.*no such database"):
        supervisor.start(broken)


def test_a_silent_service_runs_into_its_timeout(tmp_path: Path) -> None:
    silent = Launch("silent", [sys.executable, "-c", "import time; time.sleep(600)"], http_ready(free_port(), "/"), timeout_s=0.5)
    with Supervisor(tmp_path) as supervisor:
        with pytest.raises(ServiceFailedError, match="was not ready within"):
            supervisor.start(silent)
        groups = [service.pgid for service in supervisor.services]
    assert [group_members(group) for group in groups] == [[]]


def test_readiness_ignores_what_an_earlier_start_wrote_to_the_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.log_file("silent").parent.mkdir()
        supervisor.log_file("silent").write_text("family is up\n")
        silent = Launch("silent", [sys.executable, "-c", "import time; time.sleep(600)"], log_says("family is up"), timeout_s=0.4)
        with pytest.raises(ServiceFailedError):
            supervisor.start(silent)


def test_services_of_a_wave_start_side_by_side_and_the_last_wave_ends_first(tmp_path: Path) -> None:
    slow = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('ended', time.time(), flush=True), sys.exit()))\n"
    code = slow + "time.sleep(0.8); print('family is up', flush=True); time.sleep(600)"
    launches = [Launch(name, [sys.executable, "-c", code], log_says("family is up")) for name in ("base", "left", "right")]
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(launches[0])
        begin = time.monotonic()
        supervisor.start_all(launches[1:])
        assert time.monotonic() - begin < 1.5
    ended = {n: float(supervisor.log_file(n).read_text().split("ended ")[1]) for n in ("base", "left", "right")}
    assert ended["base"] > max(ended["left"], ended["right"])


def test_ports_are_not_given_out_twice() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
