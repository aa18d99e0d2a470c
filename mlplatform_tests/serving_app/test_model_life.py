"""A model's life against a real MLflow server: alias changes without a restart, refusals, the registry's absence."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import xgboost as xgb

from mlplatform.contracts import CONTRACT_FILE, MODELS_CHANNEL

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}


class Mlflow:
    """A real `mlflow server`, spoken to by REST only."""

    def __init__(self, root: Any, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = (root / "mlflow.log").open("wb")
        store = [f"--backend-store-uri=sqlite:///{root}/mlflow.db", f"--artifacts-destination={root}/artifacts", "--serve-artifacts"]
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1", *store]
        self._popen = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError("MLflow did not start")

    def post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(f"/api/2.0/mlflow/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def register(self, model: str, files: dict[str, bytes]) -> int:
        run = self.post("runs/create", experiment_id="0")["run"]["info"]
        folder = run["artifact_uri"].removeprefix("mlflow-artifacts:/").lstrip("/") + "/model"
        for name, raw in files.items():
            assert self.http.put(f"/api/2.0/mlflow-artifacts/artifacts/{folder}/{name}", content=raw).status_code == 200
        if self.http.get("/api/2.0/mlflow/registered-models/get", params={"name": model}).status_code == 404:
            self.post("registered-models/create", name=model)
        version = self.post("model-versions/create", name=model, source=f"mlflow-artifacts:/{folder}", run_id=run["run_id"])
        return int(version["model_version"]["version"])

    def alias(self, model: str, version: int) -> None:
        self.post("registered-models/alias", name=model, alias="production", version=str(version))

    def pause(self) -> None:
        os.killpg(self._popen.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._popen.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.http.close()
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(10)
        self._log.close()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Mlflow(tmp_path_factory.mktemp("mlflow"), port)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def eventually(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def served(client: httpx.Client, model: str) -> Any:
    answer = client.get(f"/v1/models/{model}")
    return answer.json()["version"] if answer.status_code == 200 else None


def notify(redis_url: str, model: str) -> None:
    with redis.Redis.from_url(redis_url) as store:
        assert store.publish(MODELS_CHANNEL, model) >= 1


def test_models_are_discovered_by_their_alias_and_rolled_back_and_forth_without_a_failed_or_mixed_answer(
    mlflow, make_model, open_service, redis_url
) -> None:
    made = {}
    for seed in (1, 2):
        model = make_model(seed=seed, model="flips")
        made[mlflow.register("flips", model.files)] = model
    first, second = sorted(made)
    mlflow.alias("flips", first)
    client = open_service(mlflow_url=mlflow.url, serving_poll_s=60)
    assert served(client, "flips") == first

    nan = float("nan")
    features = np.array([[5, nan, 10.5, 5, 12.5, 12.5 / 3, nan, nan, 1, 30]])
    wanted = {}
    for version, model in made.items():
        data = xgb.DMatrix(features, feature_names=[f.name for f in model.contract.features])
        wanted[version] = float(model.booster.predict(data)[0])
    assert wanted[first] != wanted[second]

    answers: list[tuple[int, int, dict[str, Any]]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=client.base_url, timeout=10) as own:
            while not stop.is_set():
                answer = own.post("/v1/models/flips/predict", json={"inputs": [ROW] * 3})
                answers.append((answer.status_code, answer.json().get("version"), answer.json()))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    waits = []
    for target in (second, first, second, first, second):
        mlflow.alias("flips", target)
        started = time.monotonic()
        notify(redis_url, "flips")
        eventually(lambda target=target: served(client, "flips") == target)
        waits.append(time.monotonic() - started)
    stop.set()
    for thread in threads:
        thread.join()

    assert {status for status, _, _ in answers} == {200}
    assert {version for _, version, _ in answers} == {first, second}
    for _, version, body in answers:
        assert {(p["model_version"], p["prediction"]) for p in body["predictions"]} == {(version, wanted[version])}
    assert max(waits) < 5
    detail = client.get("/v1/models/flips").json()
    assert [(v["version"], v["role"]) for v in detail["versions"]] == [(second, "current"), (first, "previous")]
    assert 'mlplatform_model_swaps_total{model="flips"} 5.0' in client.get("/metrics").text


def test_without_a_notification_the_poll_finds_the_change(mlflow, make_model, open_service) -> None:
    versions = [mlflow.register("polled", make_model(seed=seed, model="polled").files) for seed in (1, 2)]
    mlflow.alias("polled", versions[0])
    client = open_service(mlflow_url=mlflow.url, serving_models="polled", serving_poll_s=0.2)
    mlflow.alias("polled", versions[1])
    eventually(lambda: served(client, "polled") == versions[1])


@pytest.mark.parametrize(
    ("name", "step", "extra"),
    [
        ("altered", "hash", {"model.ubj": b"{L\x00"}),
        ("pickled", "pickle", {"helper/model.pkl": b"\x80\x04."}),
        ("uncontracted", "contract", {CONTRACT_FILE: None}),
        ("disguised", "pickle", {"model.ubj": b"\x80\x04\x95junk"}),
    ],
)
def test_a_bad_version_is_refused_and_the_old_one_goes_on(mlflow, make_model, open_service, redis_url, name, step, extra) -> None:
    good = make_model(seed=1, model=name)
    mlflow.alias(name, mlflow.register(name, good.files))
    client = open_service(mlflow_url=mlflow.url, serving_models=name, serving_poll_s=60)
    before = served(client, name)
    files = {k: v for k, v in (good.files | extra).items() if v is not None}
    bad = mlflow.register(name, files)
    mlflow.alias(name, bad)
    notify(redis_url, name)
    eventually(lambda: client.get(f"/v1/models/{name}").json()["refused"])
    told = client.get(f"/v1/models/{name}").json()
    assert told["version"] == before
    assert (told["refused"]["version"], told["refused"]["step"]) == (bad, step)
    assert client.post(f"/v1/models/{name}/predict", json={"inputs": [ROW]}).json()["version"] == before
    ready = client.get("/health/ready")
    assert ready.status_code == 200
    assert f"version {bad} was refused as production" in ready.json()["warnings"][0]
    assert f'mlplatform_model_refused_total{{model="{name}",step="{step}"}} 1.0' in client.get("/metrics").text

    mlflow.alias(name, before)
    notify(redis_url, name)
    eventually(lambda: client.get(f"/v1/models/{name}").json()["refused"] is None)


def test_a_spoilt_cache_is_fetched_anew_and_another_registrys_version_of_the_same_number_is_not_taken(
    mlflow, make_model, open_service, tmp_path
) -> None:
    right, wrong = make_model(seed=1, model="again"), make_model(seed=2, model="again")
    version = mlflow.register("again", right.files)
    mlflow.alias("again", version)
    wrong.version = version
    wrong.into_cache(tmp_path, source="another registry")
    client = open_service(mlflow_url=mlflow.url, serving_models="again")
    assert client.get("/v1/models/again").json()["contract_digest"] == right.contract.digest()
    folder = tmp_path / "serving" / "models" / "again" / str(version)
    (folder / "model.ubj").write_bytes(b"spoilt")
    second = open_service(mlflow_url=mlflow.url, serving_models="again")
    assert served(second, "again") == version
    assert (folder / "model.ubj").read_bytes() == right.files["model.ubj"]


def test_a_registry_that_hangs_changes_nothing_and_a_restart_serves_the_cache(mlflow, make_model, open_service) -> None:
    mlflow.alias("steady", mlflow.register("steady", make_model(model="steady").files))
    settings = {"mlflow_url": mlflow.url, "serving_models": "steady", "serving_poll_s": 0.2, "serving_registry_timeout_s": 0.5}
    client = open_service(**settings)
    mlflow.pause()
    try:
        eventually(lambda: "mlplatform_registry_errors_total 0.0" not in client.get("/metrics").text)
        assert client.post("/v1/models/steady/predict", json={"inputs": [ROW]}).status_code == 200
        assert client.get("/health/ready").status_code == 200
        again = open_service(**settings)
        assert served(again, "steady") == served(client, "steady")
    finally:
        mlflow.resume()
    version = mlflow.register("steady", make_model(seed=5, model="steady").files)
    mlflow.alias("steady", version)
    eventually(lambda: served(client, "steady") == version)
