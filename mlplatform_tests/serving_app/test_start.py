"""A service that has just started: what is in place from the first answer on, and what it says while it does not know what to serve."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mlplatform.contracts import Arm, CanaryRule, Experiment, TrafficRules
from mlplatform.local.supervisor import free_port
from serving_app.lineup import Lineup
from serving_app.main import collector_at_rest
from serving_app.model_handle import VersionRef
from serving_app.model_loader import ModelLoader
from serving_app.model_source import ModelCache
from serving_app.router import ModelRouter, Slot

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
NOBODY = "http://user:pwsecret@127.0.0.1:9"
ARMS = (Arm(name="a", serves="production", weight=50), Arm(name="b", serves="3", weight=50))
RULES = TrafficRules(canary=CanaryRule(weight=50), experiment=Experiment(name="e", salt="x", arms=ARMS))


def ref(version: int) -> VersionRef:
    return VersionRef("basket", version, "test")


@pytest.fixture
def remembering(make_model, tmp_path) -> Any:
    """`remembering(rules)`: three versions in the cache, which serve as champion, canary and arm by these rules."""

    def remember(rules: TrafficRules) -> None:
        for version in (1, 2, 3):
            make_model(version, seed=version).into_cache(tmp_path)
        arms = (None, ref(3)) if rules.experiment else ()
        ModelCache(tmp_path / "serving" / "models").remember("basket", Lineup(ref(1), ref(2), ref(2), rules, arms))

    return remember


def test_champion_variants_and_rules_are_in_place_with_the_first_swap(remembering, open_service, monkeypatch) -> None:
    remembering(RULES)
    put, seen = ModelRouter.put, []

    def watched(self: ModelRouter, slot: Slot) -> None:
        seen.append(slot)
        put(self, slot)

    monkeypatch.setattr(ModelRouter, "put", watched)
    open_service()
    first = seen[0]
    assert first.canary is not None
    assert first.shadow is first.canary  # one version in two roles is one model in memory
    assert [first.current.version, first.canary.version, [arm and arm.version for arm in first.arms]] == [1, 2, [None, 3]]
    assert first.rules == RULES


def test_remembered_rules_that_draw_on_a_field_nobody_sends_do_not_count(remembering, open_service) -> None:
    remembering(TrafficRules(canary=CanaryRule(weight=50), sticky_on=("nofield",)))
    told = open_service().get("/v1/models/basket").json()["traffic"]
    assert [(v["variant"], v["percent"]) for v in told["variants"]] == [("champion", 100)]
    assert told["sticky_on"] == ["customer", "shop"]


ADDRESSES = [
    ("POST", "/v1/models/basket/predict"),
    ("POST", "/v1/models/basket/predict?explain=true"),
    ("POST", "/v1/models/basket/invocations"),
    ("POST", "/v2/models/basket/infer"),
    ("GET", "/v1/models/basket"),
    ("GET", "/v1/models/basket/ping"),
    ("GET", "/v2/models/basket/ready"),
]


def test_while_nobody_has_said_what_there_is_no_model_is_missing(open_service) -> None:
    client = open_service(wait=False, mlflow_url=NOBODY)
    for method, path in ADDRESSES:
        answer = client.request(method, path, json={"inputs": [ROW]} if method == "POST" else None)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:mlplatform:problem:not-ready"), path
        assert answer.headers["retry-after"] == "1"


def test_a_registry_that_is_away_is_named_without_its_password(open_service, capsys) -> None:
    client = open_service(wait=False, mlflow_url=NOBODY, serving_poll_s=0.05)
    while "being read" in (detail := client.get("/health/ready").json()["detail"]):
        continue
    assert "no model is loaded: MLflow does not answer at http://127.0.0.1:9" in detail
    assert "MLflow does not answer" in client.post("/v1/models/basket/predict", json={"inputs": [ROW]}).json()["detail"]
    wanted = open_service(wait=False, mlflow_url=NOBODY, serving_models="basket")
    while "MLflow" not in (missing := wanted.get("/health/ready").json()["detail"]):
        continue
    assert "model 'basket' is not loaded: MLflow does not answer" in missing
    told = capsys.readouterr()
    assert "registry_away" in told.out + told.err
    assert "pwsecret" not in detail + missing + told.out + told.err


def test_a_model_that_loads_is_not_missing_either(remembering, open_service, monkeypatch) -> None:
    remembering(RULES)
    free, obtain = threading.Event(), ModelLoader._read

    def slow(self: ModelLoader, wanted: VersionRef) -> Any:
        assert free.wait(20)
        return obtain(self, wanted)

    monkeypatch.setattr(ModelLoader, "_read", slow)
    client = open_service(wait=False)
    try:
        answer = client.post("/v1/models/basket/predict", json={"inputs": [ROW]})
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:mlplatform:problem:not-ready")
    finally:
        free.set()


def test_once_it_is_known_what_there_is_other_names_are_missing(remembering, open_service) -> None:
    remembering(RULES)
    client = open_service(mlflow_url=NOBODY)  # the cache says
    while (answer := client.post("/v1/models/other/predict", json={"inputs": [ROW]})).status_code == 503:
        continue
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:mlplatform:problem:model-not-found")
    [warning] = client.get("/health/ready").json()["warnings"]
    assert warning.startswith("MLflow does not answer at http://127.0.0.1:9")


def test_an_empty_cache_without_a_registry_serves_nothing_and_says_so(open_service) -> None:
    client = open_service(wait=False)
    while client.post("/v1/models/basket/predict", json={"inputs": [ROW]}).status_code == 503:
        continue
    assert client.post("/v1/models/basket/predict", json={"inputs": [ROW]}).status_code == 404
    assert "the verified cache holds none, and MLPLATFORM_MLFLOW_URL is not set" in client.get("/health/ready").json()["detail"]


def test_a_model_that_is_not_among_the_wanted_is_missing_at_once(open_service) -> None:
    client = open_service(wait=False, mlflow_url=NOBODY, serving_models="basket")
    assert client.post("/v1/models/other/predict", json={"inputs": [ROW]}).status_code == 404
    assert client.post("/v1/models/basket/predict", json={"inputs": [ROW]}).status_code == 503


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("MLPLATFORM_SERVING_AUTH", "keys", "`mlplatform keys create NAME --file "),
        ("MLPLATFORM_SERVING_POLL_S", "-1", "MLPLATFORM_SERVING_POLL_S: Input should be greater than 0"),
    ],
)
def test_under_uvicorns_own_command_a_start_that_cannot_be_says_why_in_a_line(setting: str, value: str, told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "serving_app.main:app", "--port", str(free_port())]
    ended = subprocess.run(
        command,
        env=os.environ | {"MLPLATFORM_HOME": str(tmp_path), setting: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    assert ended.returncode != 0
    assert len(errors) == 2  # the second is uvicorn's: that the start failed
    assert told in errors[0]
    assert "Traceback" not in ended.stderr


def test_the_collector_is_left_as_it_was_found() -> None:
    before = gc.get_threshold()
    with collector_at_rest():
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
