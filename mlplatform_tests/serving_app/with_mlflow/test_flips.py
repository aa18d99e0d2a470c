"""A release under load: a hundred promotions and rollbacks by the platform against a real process, and every answer accounted for."""

import itertools
import random
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import xgboost as xgb
from pydantic import SecretStr

from mlplatform.orchestration.canary_state import set_canary
from mlplatform.orchestration.recording import verify_ledger
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.settings import Settings

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
FLIPS = 100
CLIENTS = 4


def wanted(model: Any) -> dict[int, float]:
    """What the version answers, by the customer's age; nothing is in the online store."""
    nan = float("nan")
    ages = range(18, 90)
    rows = np.array([[5, nan, 10.5, 5, 12.5, 12.5 / 3, nan, nan, 1, age] for age in ages])
    found = model.booster.predict(xgb.DMatrix(rows, feature_names=[f.name for f in model.contract.features]))
    return dict(zip(ages, found.tolist(), strict=True))


class Caller(threading.Thread):
    """One connection that asks without a pause, and keeps what it got: (status or error, ages asked for, body)."""

    def __init__(self, url: str, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self._url, self._random, self._stopped = url, random.Random(seed), stop
        self.got: list[tuple[Any, list[int], Any]] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._stopped.is_set():
                ages = [self._random.randrange(18, 90) for _ in range(self._random.choice((1, 1, 5)))]
                rows = [ROW | {"age": age, "customer": self._random.randrange(1, 1000)} for age in ages]
                try:
                    answer = client.post("/v1/models/hundred/predict", json={"inputs": rows})
                    self.got.append((answer.status_code, ages, answer.json()))
                except httpx.HTTPError as error:
                    self.got.append((repr(error), ages, None))


@pytest.mark.timeout(600)
def test_a_hundred_promotions_and_rollbacks_under_load_lose_no_request_and_mix_no_versions(
    mlflow, make_model, run_service, redis_url, tmp_path, logged
) -> None:
    made = {mlflow.register("hundred", (m := make_model(seed=seed, model="hundred")).files): m for seed in (1, 2, 3)}
    first, second, canary = sorted(made)
    right = {version: wanted(model) for version, model in made.items()}
    clients = Clients(Settings(home=tmp_path / "platform", mlflow_url=mlflow.url, redis_url=SecretStr(redis_url)))
    promote(clients, "hundred", first, "ann")
    assert not set_canary(clients, "hundred", canary, 20, "ann", "go").refused
    process = run_service(MLPLATFORM_MLFLOW_URL=mlflow.url, MLPLATFORM_SERVING_MODELS="hundred", MLPLATFORM_SERVING_POLL_S="60")
    process.wait_ready(60)

    stop = threading.Event()
    callers = [Caller(process.url, seed, stop) for seed in range(CLIENTS)]
    with httpx.Client(base_url=process.url, timeout=20) as watch:
        for caller in callers:
            caller.start()
        for target in itertools.islice(itertools.cycle((second, first)), FLIPS):
            if target == second:
                assert promote(clients, "hundred", second, "ann", by_hand=True).action == "promote"
            else:
                assert roll_back(clients, "hundred", "again", "ann").version == first
            while watch.get("/v1/models/hundred").json()["version"] != target:
                assert process.popen.poll() is None, process.log.read_text()
        swaps = watch.get("/metrics").text
        stop.set()
        for caller in callers:
            caller.join()
        process.stop()
        records = logged(model="hundred")

    assert verify_ledger(clients, "hundred").holds
    moves = [(e.action, e.version) for e in clients.ledger.entries("hundred") if e.action in ("promote", "rollback")]
    assert moves == [("promote", first), *([("promote", second), ("rollback", first)] * (FLIPS // 2))]
    assert f'mlplatform_model_swaps_total{{model="hundred"}} {FLIPS}.0' in swaps
    got = [answer for caller in callers for answer in caller.got]
    assert {status for status, _, _ in got} == {200}
    assert {body["version"] for _, _, body in got} == {first, second, canary}
    told = {}
    for _, ages, body in got:
        variant = {p["variant"] for p in body["predictions"]}
        assert variant == ({"canary"} if body["version"] == canary else {"champion"})
        for age, p in zip(ages, body["predictions"], strict=True):
            assert (p["model_version"], p["prediction"]) == (body["version"], right[body["version"]][age])
            told[p["request_id"], p["input_index"]] = (p["model_version"], p["variant"], p["prediction"])
    assert {(r.request_id, r.input_index): (r.version, r.variant, r.prediction) for r in records} == told
    assert len(records) == len(told)
