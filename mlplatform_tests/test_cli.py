"""The command line: what it prints, how it ends, what it changes; on a real MLflow store, ledger and Valkey."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from mlplatform import cli
from mlplatform.clients.lake import Lake
from mlplatform.clients.ledger import Ledger
from mlplatform.clock import SimulatedClock
from mlplatform.local.processes import start_mark
from mlplatform.local.service_state import Service, State, write_state
from mlplatform.records import LedgerEntry
from mlplatform.settings import load_settings

COMMANDS = [
    *("demo", "stream", "up", "down", "status", "doctor", "models", "history", "promote", "rollback", "replay", "bench"),
    *("deployment", "approve", "reject"),
    *("features", "fingerprint", "online", "feast", "traffic", "judge", "experiment", "rebuild", "keys"),
    "version",
]
HEAVY = ("dagster", "mlflow", "feast", "polars", "pandas", "numpy", "rich.console", "pydantic", "httpx", "redis")
MODEL = "flight_disruption"
pytestmark = pytest.mark.usefixtures("clean_environment")


def entry(at: datetime, action: str, version: int, before: int | None) -> LedgerEntry:
    return LedgerEntry(at, MODEL, action, "production", version, before, "ann", f"{action} it")


@pytest.fixture
def deployed(home: Path) -> Path:
    """A home with a history: version 1 at noon, a refusal at one, version 2 at two, back to 1 at three, on 1 September 2013."""
    ledger = Ledger(Lake(str(home / "lake")))
    moves = [(12, "promote", 1, None), (13, "refuse", 3, 1), (14, "promote", 2, 1), (15, "rollback", 1, 2)]
    for hour, action, version, before in moves:
        ledger.append(entry(datetime(2013, 9, 1, hour, tzinfo=UTC), action, version, before))
    return home


# --- the whole -------------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    code = f"import mlplatform.cli, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mlplatform.cli", "--help"], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_every_command_explains_itself(command: str) -> None:
    answer = CliRunner().invoke(cli.app, [command, "--help"])
    assert answer.exit_code == 0
    assert len(answer.stdout.splitlines()[2].strip()) > 20


@pytest.mark.parametrize("command", ["status", "doctor", "models", "history", "deployment", "features", "fingerprint", "version"])
def test_every_question_can_answer_in_json(command: str) -> None:
    assert "--json" in CliRunner().invoke(cli.app, [command, "--help"]).stdout
    for name in ("quality", "fingerprint"):
        assert "--json" in CliRunner().invoke(cli.app, ["bench", name, "--help"]).stdout


def test_the_version_is_the_installed_one() -> None:
    answer = json.loads(CliRunner().invoke(cli.app, ["version", "--json"]).stdout)
    assert answer["python"] == ".".join(map(str, sys.version_info[:3]))


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_fault_is_one_line_and_its_mend(fails) -> None:
    error, mend = fails("history", "nobody", "--at", "14:61").splitlines()[0], fails("fingerprint", "offline/nobody").splitlines()[1]
    assert error.startswith("error: ")
    assert mend == "mend:  nothing is built yet: `mlplatform demo`, or materialize the asset in the Dagster UI"


def test_the_trace_is_shown_on_request(home, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mlplatform", "history", "nobody", "--home", str(home)])
    monkeypatch.setenv("MLPLATFORM_DEBUG", "1")
    with pytest.raises(LookupError, match="nobody"):
        cli.main()


def test_refused_settings_name_the_variable_and_never_its_value(fails, monkeypatch) -> None:
    monkeypatch.setenv("MLPLATFORM_DEVICE", "quantum-secret")
    said = fails("status")
    assert "MLPLATFORM_DEVICE" in said
    assert "quantum-secret" not in said


def test_an_unreadable_environment_file_says_how_to_renew_it(fails, home) -> None:
    home.mkdir()
    (home / "environment.json").write_text("{")
    assert "make down" in fails("status")


# --- running it: arguments reach the profile -------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the profile's own functions, which have tests of their own, and keeps what they were given."""
    given = SimpleNamespace()

    def keep(name: str, status: int) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            setattr(given, name, arguments)
            return status

        return function

    monkeypatch.setattr("mlplatform.local.demo.run_demo", keep("demo", 3))
    monkeypatch.setattr("mlplatform.local.demo_release.run_release", keep("release", 1))
    monkeypatch.setattr("mlplatform.local.up.run_up", keep("up", 0))
    monkeypatch.setattr("mlplatform.local.up.run_down", keep("down", 0))
    monkeypatch.setattr("mlplatform.local.replay.run_replay", keep("replay", 0))
    monkeypatch.setattr("mlplatform.local.bench_quality.run_bench_quality", keep("quality", 1))
    monkeypatch.setattr("mlplatform.local.bench_fingerprint.run_bench_fingerprint", keep("fingerprint", 1))
    monkeypatch.setattr("mlplatform.local.bench_join.run_bench_join", keep("join", 1))
    monkeypatch.setattr("mlplatform.local.bench_join.run_bench_join_memory", keep("memory", 0))
    monkeypatch.setattr("mlplatform.local.feast_command.run_feast", keep("feast", 0))
    return given


def test_demo_passes_its_options_on_and_ends_with_its_status(run, home, called) -> None:
    assert run("demo", "--days", "3", "--keep", "--trials", "5", "--all-models").exit_code == 3
    assert called.demo == (home, 3, True, 5, True)
    run("demo")
    assert called.demo == (home, 2, False, None, False)


def test_the_release_story_takes_the_options_that_are_its_own_and_refuses_the_others(run, home, called) -> None:
    assert run("demo", "--release", "--keep", "--trials", "5").exit_code == 1
    assert called.release == (home, True, 5)
    for other in (("--days", "3"), ("--all-models",)):
        refused = run("demo", "--release", *other)
        assert refused.exit_code == 2
        assert "neither --days nor --all-models" in refused.output
    assert not hasattr(called, "demo")


def test_up_down_and_bench_pass_their_options_on(run, home, called) -> None:
    assert run("up", "--speed", "60").exit_code == 0
    assert run("down").exit_code == 0
    assert run("bench", "quality", "--json").exit_code == 1
    assert CliRunner().invoke(cli.app, ["bench", "fingerprint", "--json"]).exit_code == 1
    assert called.fingerprint == (True,)
    assert (called.up, called.down, called.quality) == ((home, 60.0), (home,), (home, True))


def test_bench_join_has_a_race_and_a_memory_of_different_sizes(called) -> None:
    ask = CliRunner().invoke
    assert ask(cli.app, ["bench", "join", "--rounds", "5", "--json"]).exit_code == 1
    assert ask(cli.app, ["bench", "join", "--memory"]).exit_code == 0
    assert (called.join, called.memory) == ((300_000, 5, True), (10_000_000, False))


def test_feast_gets_every_word_after_the_dashes(home, called) -> None:
    CliRunner().invoke(cli.app, ["feast", "--home", str(home), "--", "serve", "--port", "1", "--help"])
    settings, words = called.feast
    assert (settings.home, words) == (home, ["serve", "--port", "1", "--help"])


def test_replay_takes_times_in_utc(run, home, called) -> None:
    assert run("replay", MODEL, "--from", "2013-09-03", "--to", "2013-09-03T14:00+02:00").exit_code == 0
    assert called.replay == (MODEL, datetime(2013, 9, 3, tzinfo=UTC), datetime(2013, 9, 3, 12, tzinfo=UTC), home)


def test_replay_refuses_times_that_are_none_or_run_backwards(fails, called) -> None:
    assert "'soon' is no time" in fails("replay", MODEL, "--from", "soon", "--to", "2013-09-03")
    assert "not after" in fails("replay", MODEL, "--from", "2013-09-04", "--to", "2013-09-03")
    assert not hasattr(called, "replay")


# --- settings of the running platform --------------------------------------------------------------------------------


def running(home: Path, **variables: str) -> None:
    """Records this process as a service of `home`, with the variables the platform would have been started with."""
    me = Service("valkey", os.getpid(), os.getpid(), 1, "redis://127.0.0.1:1/0", start_mark(os.getpid()) or "")
    write_state(home, State((me,)))
    (home / "environment.json").write_text(json.dumps({f"MLPLATFORM_{name.upper()}": value for name, value in variables.items()}))


def test_the_running_platforms_settings_are_used_below_the_environments_own(run, home, monkeypatch) -> None:
    running(home, serving_url="http://127.0.0.1:1", lake=str(home / "elsewhere"), clock="system")
    monkeypatch.setenv("MLPLATFORM_LAKE", str(home / "mine"))
    run("status")
    assert load_settings().serving_url == "http://127.0.0.1:1"
    assert load_settings().lake_root == str(home / "mine")
    assert load_settings().home == home


def test_where_nothing_runs_any_more_mlflow_is_read_from_its_own_store(run, home) -> None:
    running(home, mlflow_url="http://127.0.0.1:1")
    run("status")
    assert load_settings().mlflow_uri == "http://127.0.0.1:1"
    del os.environ["MLPLATFORM_MLFLOW_URL"]
    write_state(home, State())
    run("status")
    assert load_settings().mlflow_uri.startswith("sqlite:///")


def test_status_of_an_empty_home_says_what_to_do(run) -> None:
    answer = run("status")
    assert answer.exit_code == 0
    assert "nothing runs: `make up`" in answer.stdout


def test_status_tells_services_clock_and_last_writes(run, deployed) -> None:
    running(deployed, clock=str(deployed / "clock.json"))
    SimulatedClock(deployed / "clock.json").set(datetime(2013, 9, 1, 16, tzinfo=UTC))
    found = json.loads(run("status", "--json").stdout)
    assert found["running"] is True
    assert [(s["service"], s["up"]) for s in found["services"]] == [("valkey", True)]
    assert found["clock"] == {"now": "2013-09-01T16:00:00+00:00", "simulated": True}
    assert (found["serving"], found["serving_fault"]) == (None, "the prediction service does not answer")
    [stage] = found["stages"]
    assert (stage["stage"], stage["tables"]) == ("deployment", 1)
    assert abs(datetime.fromisoformat(stage["last_written"]) - datetime.now(UTC)).total_seconds() < 60
    assert "valkey" in run("status").stdout


# --- history ---------------------------------------------------------------------------------------------------------


def test_history_lists_every_entry(run, deployed) -> None:
    found = json.loads(run("history", MODEL, "--json").stdout)
    assert [(e["action"], e["version"]) for e in found["entries"]] == [("promote", 1), ("refuse", 3), ("promote", 2), ("rollback", 1)]
    assert "served" not in found
    assert "refuse it" in run("history", MODEL).stdout


@pytest.mark.parametrize(
    ("at", "version"),
    [
        ("2013-09-01T11:59:59", None),
        ("2013-09-01T12:00", 1),
        ("2013-09-01T13:30", 1),  # a refusal moves nothing
        ("2013-09-01T14:03", 2),
        ("2013-09-01T16:03+02:00", 2),
        ("2013-09-01T15:00", 1),
        ("2014-01-01", 1),
    ],
)
def test_history_tells_what_served_then(run, deployed, at, version) -> None:
    served = json.loads(run("history", MODEL, "--at", at, "--json").stdout)["served"]
    assert (served and served["version"]) == version


def test_a_time_of_day_is_todays_by_the_platforms_clock(run, deployed) -> None:
    running(deployed, clock=str(deployed / "clock.json"))
    SimulatedClock(deployed / "clock.json").set(datetime(2013, 9, 1, 16, tzinfo=UTC))
    assert (
        "at 2013-09-01 14:03:00 UTC: version 2 served, since 2013-09-01 14:00:00 (promote by ann)"
        in run("history", MODEL, "--at", "14:03").stdout
    )


def test_history_says_whether_an_entry_was_altered(run, deployed, fails) -> None:
    found = json.loads(run("history", MODEL, "--verify", "--json").stdout)["verification"]
    assert (found["entries"], found["hashed"], found["faults"]) == (4, 4, [])
    assert "unaltered: 4 entries; head 3:" in run("history", MODEL, "--verify").stdout
    ledger = Ledger(Lake(str(deployed / "lake")))
    rows = ledger.lake.read(ledger.key(MODEL)).filter(pl.col("version") != 2)
    shutil.rmtree(deployed / "lake")
    ledger = Ledger(Lake(str(deployed / "lake")))
    ledger.lake.replace(ledger.key(MODEL), rows)
    answer = CliRunner().invoke(cli.app, ["history", MODEL, "--verify", "--home", str(deployed)])
    assert answer.exit_code == 1
    assert "ALTERED" in answer.stdout


def test_history_of_a_declared_model_nobody_deployed_is_empty(run) -> None:
    assert json.loads(run("history", MODEL, "--json").stdout)["entries"] == []
    assert "never deployed" in run("history", MODEL).stdout


def test_history_of_a_model_nobody_declared_names_those_that_are(fails) -> None:
    assert fails("history", "flght_disruption") == f"error: no model 'flght_disruption' is declared: choose one of arrival_delay, {MODEL}\n"
