"""Shadow versions: copies of requests, logged under the request's id, that no caller ever notices."""

import asyncio
import importlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import xgboost as xgb

from mlplatform.contracts import PredictionRecord, TrafficRules, source_hash
from serving_app.batcher import Batch, Scored
from serving_app.features import Assembled
from serving_app.log_entry import LogEntry
from serving_app.router import ModelRouter, Slot
from serving_app.row_texts import RowTexts
from serving_app.shadow import Shadow, ShadowBudget

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
MISBEHAVING = """
import threading

from feature_definitions.shop import functions

gate = threading.Event()
faults = []


def basket_features(columns):
    gate.wait()
    if faults:
        raise faults[0]
    return functions.basket_features(columns)
"""


def eventually(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def misbehaving(definitions) -> Iterator[Any]:
    """A module of request-time functions that can be told to hang (`gate.clear()`) or to fail (`faults`)."""
    (definitions / "feature_definitions" / "shop" / "misbehaving.py").write_text(MISBEHAVING)
    importlib.invalidate_caches()
    module = importlib.import_module("feature_definitions.shop.misbehaving")
    module.gate.set()
    yield module
    module.gate.set()
    sys.modules.pop("feature_definitions.shop.misbehaving")


@pytest.fixture
def two_versions(make_model, misbehaving, tmp_path) -> Callable[..., Any]:
    """The cache with version 1 as champion and version 2, whose functions misbehave on demand, as shadow. Returns version 2."""

    def make(rules: TrafficRules | None = None) -> Any:
        champion = make_model(1, seed=1)
        champion.into_cache(tmp_path)
        plain = champion.contract.model_dump(mode="json")
        path = "feature_definitions.shop.misbehaving:basket_features"
        functions = [f | {"path": path, "source_hash": source_hash(misbehaving.basket_features)} for f in plain["functions"]]
        features = [f | {"source": path} if ":" in f["source"] else f for f in plain["features"]]
        shadow = make_model(2, seed=2, functions=functions, features=features)
        shadow.into_cache(tmp_path, serving=False)
        lineup = {"version": 1, "source": "test", "shadow": {"version": 2, "source": "test"}}
        lineup["traffic"] = (rules or TrafficRules()).model_dump(mode="json")
        (tmp_path / "serving" / "models" / "basket" / "serving.json").write_text(json.dumps(lineup))
        return shadow

    return make


def of(variant: str, found: list[PredictionRecord]) -> dict[tuple[str, int], PredictionRecord]:
    return {(r.request_id, r.input_index): r for r in found if r.variant == variant}


def ask(client: httpx.Client, *rows: dict[str, Any]) -> Any:
    answer = client.post(PATH, json={"inputs": list(rows)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def shadow_figures(client: httpx.Client) -> dict[str, float]:
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith("mlplatform_shadow_")]
    return {name.removeprefix("mlplatform_shadow_").removesuffix("_total"): float(value) for name, value in lines}


def start(open_service, **settings: Any) -> httpx.Client:
    client = open_service(**settings)
    eventually(lambda: client.get("/v1/models/basket").json()["traffic"]["shadow_version"] == 2)
    return client


def test_a_shadow_is_logged_under_the_same_request_id_with_its_own_answer(two_versions, open_service, logged) -> None:
    shadow = two_versions()
    client = start(open_service)
    rows = [ROW | {"customer": i} for i in range(1, 4)]
    answers = [ask(client, *rows) for _ in range(3)]
    eventually(lambda: len(logged()) == 18)
    found = logged()
    served, copied = of("champion", found), of("shadow", found)
    assert served.keys() == copied.keys() == {(p["request_id"], p["input_index"]) for a in answers for p in a["predictions"]}
    names = [f.name for f in shadow.contract.features]
    for key, record in copied.items():
        row = np.array([[np.nan if v is None else v for v in record.features]])
        assert record.prediction == float(shadow.booster.predict(xgb.DMatrix(row, feature_names=names))[0])
        assert (record.version, record.contract_digest) == (2, shadow.contract.digest())
        assert record.inputs == served[key].inputs
    assert {p["model_version"] for a in answers for p in a["predictions"]} == {1}


def test_a_shadow_that_hangs_holds_up_no_answer_and_what_its_queue_cannot_take_is_counted(
    two_versions, open_service, misbehaving, logged
) -> None:
    two_versions()
    client = start(open_service, serving_shadow_queue=5)
    before = ask(client, ROW)["predictions"][0]["prediction"]
    eventually(lambda: shadow_figures(client)["answered"] == 1)
    misbehaving.gate.clear()
    answers = [ask(client, ROW) for _ in range(40)]  # none of these would come if anything waited for the shadow
    assert {a["predictions"][0]["prediction"] for a in answers} == {before}
    assert shadow_figures(client) == {"offered": 41, "answered": 1, "failed": 0, "dropped": 35, "waiting": 5}
    misbehaving.gate.set()
    eventually(lambda: shadow_figures(client)["answered"] == 6)
    eventually(lambda: len(of("shadow", logged())) == 6)
    assert len(of("champion", logged())) == 41


def test_a_shadow_that_fails_is_counted_and_recovers(two_versions, open_service, misbehaving, logged) -> None:
    two_versions()
    client = start(open_service)
    misbehaving.faults.append(ValueError("a shadow's own trouble"))
    answers = [ask(client, ROW) for _ in range(10)]
    assert {a["predictions"][0]["variant"] for a in answers} == {"champion"}
    eventually(lambda: shadow_figures(client)["failed"] == 10)
    misbehaving.faults.clear()
    ask(client, ROW)
    eventually(lambda: len(of("shadow", logged())) == 1)
    figures = shadow_figures(client)
    assert figures["offered"] == figures["answered"] + figures["failed"] + figures["dropped"] + figures["waiting"] == 11


def test_only_the_declared_share_of_the_requests_is_copied(two_versions, open_service) -> None:
    two_versions(TrafficRules(shadow_share=30))
    client = start(open_service)
    for _ in range(200):
        ask(client, ROW)
    assert 20 < shadow_figures(client)["offered"] < 105  # six standard deviations around 60


def alone(submit: Any, written: list[LogEntry], share: float = 1.0) -> Shadow:
    """A shadow without a service around it, whose model answers by `submit`."""

    @asynccontextmanager
    async def scorer() -> AsyncIterator[Any]:
        yield submit

    parser = SimpleNamespace(parse=lambda inputs, limit: INPUTS)
    handle: Any = SimpleNamespace(name="m", ref=None, version=1, digest="d", contract=SimpleNamespace(fields=(), views=()), parser=parser)
    router = ModelRouter()
    router.put(Slot(handle, shadow=handle))
    return Shadow(router, scorer, written.append, ShadowBudget(100, share))


INPUTS: Any = SimpleNamespace(rows=1, received=[{}], given=None)


def test_after_a_batch_the_thread_rests_so_that_its_share_of_the_time_is_kept(monkeypatch) -> None:
    rests: list[float] = []
    sleep = asyncio.sleep

    async def submit(handle: Any, parsed: Any) -> Any:
        await sleep(0.01)
        assembled = Assembled(0, np.zeros((1, 1)), [])
        return Scored(Batch("", assembled, [0.5], RowTexts([b""], [b""], assembled.matrix)), 0, 1)

    async def noted(delay: float, *rest: Any) -> Any:
        if threading.current_thread().name == "shadow":
            rests.append(delay)
        return await sleep(0, *rest)

    async def run() -> None:
        written: list[LogEntry] = []
        shadow = alone(submit, written, share=0.25)
        shadow.start()
        shadow.offer("m", INPUTS, "r")
        while not rests:
            await sleep(0.001)
        await shadow.close()
        await sleep(0)
        assert [entry.common.partition(b",")[0] for entry in written] == [b'"request_id":"r"']

    monkeypatch.setattr(asyncio, "sleep", noted)
    asyncio.run(run())
    assert rests[0] >= 0.01 * 3


def test_a_shadow_that_hangs_does_not_hold_up_the_end_of_the_service() -> None:
    hanging, hang, written = threading.Event(), threading.Event(), []

    async def submit(handle: Any, parsed: Any) -> Any:
        hanging.set()
        hang.wait()

    async def run() -> Shadow:
        shadow = alone(submit, written)
        shadow.start()
        shadow.offer("m", INPUTS, "r")
        await asyncio.to_thread(hanging.wait)
        await shadow.close()  # comes back, though the thread does not
        return shadow

    shadow = asyncio.run(run())
    assert (shadow.counts()["waiting"], written) == (1, [])
    hang.set()
    eventually(lambda: shadow.counts()["failed"] == 1)
    eventually(lambda: not any(t.name == "shadow" for t in threading.enumerate()))
