"""A home is reset only where it is a platform's own, and none runs there."""

import sys
from pathlib import Path

import pytest

from mlplatform.local.profile import refuse_to_reset
from mlplatform.local.service_state import stop_recorded
from mlplatform.local.services import log_says
from mlplatform.local.supervisor import HomeInUseError, Launch, Supervisor

SLEEPER = Launch("sleeper", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"], log_says("up"))


def test_an_empty_folder_or_none_may_be_taken(tmp_path: Path) -> None:
    refuse_to_reset(tmp_path / "new")
    (tmp_path / "logs").mkdir()
    refuse_to_reset(tmp_path)


def test_what_a_bench_installed_for_its_peers_stops_no_demo(tmp_path: Path) -> None:
    (tmp_path / "bench" / "peer").mkdir(parents=True)
    (tmp_path / "bench" / "peer" / "installed").touch()
    refuse_to_reset(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(HomeInUseError, match="files that no platform wrote"):
        refuse_to_reset(tmp_path)


def test_a_folder_with_somebodys_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "thesis.txt").write_text("years of work")
    with pytest.raises(HomeInUseError, match="files that no platform wrote"):
        refuse_to_reset(tmp_path)


def test_a_home_is_refused_while_a_platform_runs_there_and_taken_after(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(SLEEPER)
        supervisor.detach()
    try:
        with pytest.raises(HomeInUseError, match="a platform runs under"):
            refuse_to_reset(tmp_path)
    finally:
        stop_recorded(tmp_path)
    refuse_to_reset(tmp_path)
