"""Releasing from the command line: promoting, sign-offs, traffic and the way back, on a real MLflow store, ledger and Valkey."""

import getpass
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlplatform import cli
from mlplatform.contracts import (
    CONTRACT_FILE,
    EVALUATION_TAG,
    GATE_RESULTS_TAG,
    GATES_TAG,
    TRAINED_BY_TAG,
    VERIFIED_TAG,
    ContractField,
    ServingContract,
)
from mlplatform.queries import NothingBuiltError
from mlplatform.verified import Identity, seal

MODEL = "flight_disruption"
pytestmark = pytest.mark.usefixtures("clean_environment")


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
        slices = {"name": "auc_minimum_by_town", "passed": verdict == "passed", "blocking": True, "reason": "auc of town Oslo is 0.5"}
        tags |= {GATE_RESULTS_TAG: json.dumps([slices])} if number > 1 else {}  # the first was evaluated before results were kept
        tags |= {VERIFIED_TAG: seal("", Identity(MODEL, number, "d", "m"), evaluation)} if verdict == "passed" else {}
        client.create_model_version(MODEL, source=str(home / "mlflow" / "artifacts"), run_id=made.info.run_id, tags=tags)
    return home


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
    assert [[g["reason"] for g in v["gate_results"] if not g["passed"]] for v in versions] == [["auc of town Oslo is 0.5"], [], []]
    shown = call("models", MODEL)[1]
    assert "auc 0.7600" in shown
    assert "refused: auc_minimum_by_town" in " ".join(shown.split())

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


@pytest.mark.parametrize("words", [["approve", MODEL, "1"], ["reject", MODEL, "1"], ["rollback", MODEL]])
def test_a_decision_without_a_reason_is_none(words) -> None:
    answer = CliRunner().invoke(cli.app, [*words, "--reason", " \n"])
    assert answer.exit_code == 2
    assert "say why" in answer.output


@pytest.mark.parametrize("words", [["deployment", MODEL], ["experiment", MODEL], ["rebuild", MODEL, "1"]])
def test_a_mistyped_home_is_told_and_does_not_become_one(words, tmp_path) -> None:
    answer = CliRunner().invoke(cli.app, [*words, "--home", str(tmp_path / "typo")])
    assert isinstance(answer.exception, NothingBuiltError)
    assert not (tmp_path / "typo").exists()


def test_what_has_not_come_yet_was_never_served(registered, fails) -> None:
    assert "has not come yet: the platform's clock stands at" in fails("history", MODEL, "--at", "2150-01-01", "--home", str(registered))


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


@mlflow_store
def test_a_version_without_a_record_of_its_ingredients_is_told_so(registered, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mlplatform", "rebuild", MODEL, "1", "--verify", "--home", str(registered)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "version 1 of flight_disruption was registered without a record of its ingredients" in told
    assert "Traceback" not in told
