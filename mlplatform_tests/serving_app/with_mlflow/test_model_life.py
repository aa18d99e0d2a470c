"""A model's life against a real MLflow server: alias changes without a restart, refusals, the registry's absence."""

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import xgboost as xgb

from mlplatform.contracts import CONTRACT_FILE, MODELS_CHANNEL

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}


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
    # Ready means that one model is loaded; other tests have left theirs in this MLflow, and they are loaded one by one.
    deadline = time.monotonic() + 30
    while served(client, "flips") != first:
        assert time.monotonic() < deadline
        time.sleep(0.05)

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
    for target in (second, first, second, first, second):
        mlflow.alias("flips", target)
        notify(redis_url, "flips")
        eventually(lambda target=target: served(client, "flips") == target)  # the next look would come after a minute
    stop.set()
    for thread in threads:
        thread.join()

    assert {status for status, _, _ in answers} == {200}
    assert {version for _, version, _ in answers} == {first, second}
    for _, version, body in answers:
        assert {(p["model_version"], p["prediction"]) for p in body["predictions"]} == {(version, wanted[version])}
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
        ("truncated", "hash", {"model.ubj": slice(0, -100)}),  # of the good file
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
    spoilt = {k: good.files[k][v] if isinstance(v, slice) else v for k, v in extra.items()}
    files = {k: v for k, v in (good.files | spoilt).items() if v is not None}
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


def test_a_version_without_the_seal_of_its_gates_is_refused_however_it_got_the_alias_but_may_be_shadow(
    mlflow, make_model, open_service, redis_url
) -> None:
    good, other = make_model(seed=1, model="sealed"), make_model(seed=2, model="sealed")
    first = mlflow.register("sealed", good.files, key="secret")
    mlflow.alias("sealed", first)
    client = open_service(mlflow_url=mlflow.url, serving_models="sealed", serving_poll_s=60, signing_key="secret")
    assert served(client, "sealed") == first
    bare = mlflow.register("sealed", other.files)  # a right hash, but without the key
    mlflow.alias("sealed", bare, "shadow")
    notify(redis_url, "sealed")
    eventually(lambda: [v["role"] for v in client.get("/v1/models/sealed").json()["versions"]] == ["current", "shadow"])
    mlflow.alias("sealed", bare)
    mlflow.alias("sealed", bare, "canary")
    notify(redis_url, "sealed")
    eventually(lambda: client.get("/v1/models/sealed").json()["refused"])
    told = client.get("/v1/models/sealed").json()
    assert (told["version"], told["refused"]["version"], told["refused"]["step"]) == (first, bare, "verified")
    assert "canary" not in [v["role"] for v in told["versions"]]
    assert client.post("/v1/models/sealed/predict", json={"inputs": [ROW]}).json()["version"] == first
    # A start with the registry: the cache knows what served.
    again = open_service(mlflow_url=mlflow.url, serving_models="sealed", serving_poll_s=60, signing_key="secret")
    assert served(again, "sealed") == first
