"""Canary, experiment and shadow against a real MLflow server: who answers, what is refused, what a start without the registry keeps."""

import base64
import hashlib
import hmac
import json
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import redis

import serving_app.model_loader
from mlplatform.contracts import CANARY, MODELS_CHANNEL, SHADOW, TRAFFIC_TAG, Arm, CanaryRule, Experiment, TrafficRules
from mlplatform.sticky import key_of
from serving_app.traffic import Draw

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
HALF = TrafficRules(canary=CanaryRule(weight=50))


def eventually(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def traffic(client: httpx.Client, model: str) -> Any:
    answer = client.get(f"/v1/models/{model}")
    return answer.json()["traffic"] if answer.status_code == 200 else {"variants": [], "refused": None}


def variants(client: httpx.Client, model: str) -> dict[str, tuple[int, float]]:
    return {v["variant"]: (v["version"], v["percent"]) for v in traffic(client, model)["variants"]}


def ask(client: httpx.Client, model: str, customer: int) -> tuple[str, int]:
    answer = client.post(f"/v1/models/{model}/predict", json={"inputs": [ROW | {"customer": customer}]})
    assert answer.status_code == 200, answer.text
    [told] = answer.json()["predictions"]
    return told["variant"], told["model_version"]


@pytest.fixture
def notify(redis_url: str) -> Callable[[str], None]:
    def publish(model: str) -> None:
        with redis.Redis.from_url(redis_url) as store:
            assert store.publish(MODELS_CHANNEL, model) >= 1

    return publish


@pytest.fixture
def registered(mlflow, make_model) -> Callable[..., list[int]]:
    """`registered("name", 3)`: a model with three good versions, the first in production."""

    def register(model: str, count: int) -> list[int]:
        versions = [mlflow.register(model, make_model(seed=seed, model=model).files) for seed in range(count)]
        mlflow.alias(model, versions[0])
        return versions

    return register


def test_a_canary_answers_its_entities_and_keeps_them_when_it_grows(mlflow, registered, open_service, notify) -> None:
    first, second = registered("grows", 2)
    client = open_service(mlflow_url=mlflow.url, serving_models="grows", serving_poll_s=60)
    mlflow.alias("grows", second, CANARY)
    mlflow.tag("grows", TRAFFIC_TAG, TrafficRules(canary=CanaryRule(weight=20)).canonical_json())
    notify("grows")
    eventually(lambda: variants(client, "grows") == {"champion": (first, 80), "canary": (second, 20)})
    draw = Draw("canary", "canary")
    places = {i: draw.place(key_of(("customer", "shop"), ROW | {"customer": i})) for i in range(1, 60)}
    wanted = {i: ("canary", second) if place < 0.2 else ("champion", first) for i, place in places.items()}
    assert set(wanted.values()) == {("canary", second), ("champion", first)}
    assert {i: ask(client, "grows", i) for i in wanted} == wanted

    mlflow.tag("grows", TRAFFIC_TAG, HALF.canonical_json())
    notify("grows")
    eventually(lambda: variants(client, "grows")["canary"] == (second, 50))
    after = {i: ask(client, "grows", i) for i in wanted}
    assert after == {i: ("canary", second) if place < 0.5 else ("champion", first) for i, place in places.items()}
    assert traffic(client, "grows")["sticky_on"] == ["customer", "shop"]

    mlflow.unalias("grows", CANARY)
    notify("grows")
    eventually(lambda: variants(client, "grows") == {"champion": (first, 100)})
    assert {ask(client, "grows", i) for i in wanted} == {("champion", first)}


def test_every_protocol_gives_an_entity_the_same_variant_and_a_named_version_overrides_it(mlflow, registered, open_service) -> None:
    first, second = registered("spoken", 2)
    mlflow.alias("spoken", second, CANARY)
    mlflow.tag("spoken", TRAFFIC_TAG, HALF.canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models="spoken", serving_poll_s=60)
    eventually(lambda: "canary" in variants(client, "spoken"))
    found = {i: ask(client, "spoken", i) for i in range(1, 20)}
    assert set(found.values()) == {("champion", first), ("canary", second)}
    kinds = {
        "shop": "BYTES",
        "customer": "INT64",
        "placed_at": "BYTES",
        "price": "FP64",
        "items": "INT64",
        "channel": "BYTES",
        "age": "INT64",
    }
    for customer, (variant, version) in found.items():
        row = ROW | {"customer": customer}
        told = client.post("/v1/models/spoken/invocations", json={"dataframe_records": [row]}).json()
        assert (told["variant"], told["model_version"]) == (variant, version)
        body = {"inputs": [{"name": name, "shape": [1], "datatype": kinds[name], "data": [value]} for name, value in row.items()]}
        told = client.post("/v2/models/spoken/infer", json=body).json()
        assert (told["parameters"]["variant"], told["model_version"]) == (variant, str(version))
        for named in (first, second):
            told = client.post(f"/v2/models/spoken/versions/{named}/infer", json=body).json()
            assert (told["parameters"]["variant"], told["model_version"]) == ("pinned", str(named))
    assert client.get("/v2/models/spoken").json()["versions"] == [str(first), str(second)]


def test_a_promoted_canary_takes_over_without_being_loaded_again(mlflow, registered, open_service, notify, monkeypatch) -> None:
    loads: list[int] = []
    real = serving_app.model_loader.load_model
    monkeypatch.setattr(serving_app.model_loader, "load_model", lambda ref, *rest: loads.append(ref.version) or real(ref, *rest))
    first, second = registered("promoted", 2)
    mlflow.alias("promoted", second, CANARY)
    mlflow.tag("promoted", TRAFFIC_TAG, HALF.canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models="promoted", serving_poll_s=60)
    eventually(lambda: "canary" in variants(client, "promoted"))
    mlflow.alias("promoted", second)
    mlflow.unalias("promoted", CANARY)
    notify("promoted")
    eventually(lambda: variants(client, "promoted") == {"champion": (second, 100)})
    roles = {(v["version"], v["role"]) for v in client.get("/v1/models/promoted").json()["versions"]}
    assert roles == {(second, "current"), (first, "previous")}
    assert loads == [first, second]


def experiment(serves: str) -> TrafficRules:
    arms = (Arm(name="control", serves="production", weight=50), Arm(name="b", serves=serves, weight=50))
    return TrafficRules(experiment=Experiment(name="price", salt="2013-09", arms=arms))


def test_an_experiment_by_version_number_and_a_refused_change_of_it(mlflow, registered, make_model, open_service, notify) -> None:
    first, second = registered("arms", 2)
    mlflow.tag("arms", TRAFFIC_TAG, experiment(str(second)).canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models="arms", serving_poll_s=60)
    good = {"price/control": (first, 50), "price/b": (second, 50)}
    eventually(lambda: variants(client, "arms") == good)
    assert {ask(client, "arms", i) for i in range(1, 40)} == {("price/control", first), ("price/b", second)}

    bad = mlflow.register("arms", make_model(model="arms").files | {"model.ubj": b"{L\x00"})
    for text, reason in (
        (experiment(str(bad)).canonical_json(), f"version {bad} of the arm 'b' was refused (hash"),
        (experiment("99").canonical_json(), "the arm 'b' serves version 99, which does not exist"),
        (experiment("nobody").canonical_json(), "serves the alias 'nobody', which no version carries"),
        ('{"canary": {"weight": 500}}', "canary.weight: "),
        ("no json", "Invalid JSON"),
    ):
        mlflow.tag("arms", TRAFFIC_TAG, text)
        notify("arms")
        eventually(lambda reason=reason: reason in (traffic(client, "arms")["refused"] or ""))
        assert variants(client, "arms") == good
        assert "the newest traffic rules were refused" in " ".join(client.get("/health/ready").json()["warnings"])
    assert 'mlplatform_model_refused_total{model="arms",step="traffic"} 5.0' in client.get("/metrics").text

    mlflow.tag("arms", TRAFFIC_TAG, "")
    notify("arms")
    eventually(lambda: variants(client, "arms") == {"champion": (first, 100)})
    assert traffic(client, "arms")["refused"] is None
    assert client.get("/health/ready").json()["warnings"] == []


def test_a_bad_canary_or_shadow_is_refused_and_the_old_one_goes_on(mlflow, registered, make_model, open_service, notify) -> None:
    first, second = registered("sides", 2)
    mlflow.alias("sides", second, CANARY)
    mlflow.alias("sides", second, SHADOW)
    mlflow.tag("sides", TRAFFIC_TAG, HALF.canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models="sides", serving_poll_s=60)
    good = {"champion": (first, 50), "canary": (second, 50)}
    eventually(lambda: variants(client, "sides") == good)
    pickled = mlflow.register("sides", make_model(model="sides").files | {"model.ubj": b"\x80\x04\x95junk"})
    mlflow.alias("sides", pickled, CANARY)
    mlflow.alias("sides", pickled, SHADOW)
    notify("sides")
    eventually(lambda: len(traffic(client, "sides")["refused_versions"]) == 2)
    told = traffic(client, "sides")
    assert {(r["role"], r["version"], r["step"]) for r in told["refused_versions"]} == {
        (r, pickled, "pickle") for r in ("canary", "shadow")
    }
    assert variants(client, "sides") == good
    assert told["shadow_version"] == second


def test_a_start_without_the_registry_keeps_canary_shadow_and_experiment(mlflow, registered, open_service) -> None:
    first, second, third, fourth = registered("offline", 4)
    mlflow.alias("offline", second, CANARY)
    mlflow.alias("offline", fourth, SHADOW)
    rules = experiment(str(third)).model_copy(update={"canary": CanaryRule(weight=10)})
    mlflow.tag("offline", TRAFFIC_TAG, rules.canonical_json())
    settings = {"mlflow_url": mlflow.url, "serving_models": "offline", "serving_registry_timeout_s": 0.5, "serving_poll_s": 60}
    client = open_service(**settings)
    wanted = {"price/control": (first, 45), "price/b": (third, 45), "canary": (second, 10)}
    eventually(lambda: variants(client, "offline") == wanted)
    answers = [ask(client, "offline", i) for i in range(1, 40)]
    mlflow.pause()
    try:
        again = open_service(**settings)
        eventually(lambda: variants(again, "offline") == wanted)
        assert traffic(again, "offline") == traffic(client, "offline")
        assert [ask(again, "offline", i) for i in range(1, 40)] == answers
    finally:
        mlflow.resume()


def test_rules_refused_before_a_start_leave_the_ones_that_were_in_place(mlflow, registered, open_service) -> None:
    first, second = registered("restarted", 2)
    mlflow.tag("restarted", TRAFFIC_TAG, experiment(str(second)).canonical_json())
    settings = {"mlflow_url": mlflow.url, "serving_models": "restarted", "serving_poll_s": 60}
    good = {"price/control": (first, 50), "price/b": (second, 50)}
    before = open_service(**settings)
    eventually(lambda: variants(before, "restarted") == good)
    eventually(lambda: traffic(before, "restarted")["refused"] is None)
    mlflow.tag("restarted", TRAFFIC_TAG, experiment("99").canonical_json())
    for _ in range(2):  # the second start finds what the first remembered
        client = open_service(**settings)
        eventually(lambda client=client: traffic(client, "restarted")["refused"])
        eventually(lambda client=client: variants(client, "restarted") == good)


@pytest.mark.parametrize("fields", [("nofield",), ("shop", "nofield"), ("region",)])  # `region` is a constant: in every request the same
def test_rules_that_draw_on_a_field_nobody_sends_are_refused_and_the_earlier_go_on(
    mlflow, registered, open_service, notify, fields
) -> None:
    model = f"drawn-{'-'.join(fields)}"
    first, second = registered(model, 2)
    mlflow.alias(model, second, CANARY)
    mlflow.tag(model, TRAFFIC_TAG, HALF.canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models=model, serving_poll_s=60)
    before = {i: ask(client, model, i) for i in range(1, 20)}
    assert set(before.values()) == {("champion", first), ("canary", second)}

    mlflow.tag(model, TRAFFIC_TAG, TrafficRules(canary=CanaryRule(weight=60), sticky_on=fields).canonical_json())
    notify(model)
    eventually(lambda: traffic(client, model)["refused"])
    told = traffic(client, model)
    assert repr(fields[-1]) in told["refused"]
    assert "its fields: shop, customer, placed_at" in told["refused"]
    assert told["sticky_on"] == ["customer", "shop"]
    assert variants(client, model) == {"champion": (first, 50), "canary": (second, 50)}
    assert {i: ask(client, model, i) for i in range(1, 20)} == before
    assert any(repr(fields[-1]) in warning for warning in client.get("/health/ready").json()["warnings"])
    assert f'mlplatform_model_refused_total{{model="{model}",step="traffic"}} 1.0' in client.get("/metrics").text


def test_rules_made_for_another_champion_draw_on_the_fields_of_this_one(mlflow, registered, make_model, open_service, notify) -> None:
    _, second = registered("redrawn", 2)
    mlflow.alias("redrawn", second, CANARY)
    mlflow.tag("redrawn", TRAFFIC_TAG, TrafficRules(canary=CanaryRule(weight=50), sticky_on=("age",)).canonical_json())
    client = open_service(mlflow_url=mlflow.url, serving_models="redrawn", serving_poll_s=60)
    assert traffic(client, "redrawn")["sticky_on"] == ["age"]
    contract = make_model(model="redrawn").contract.model_dump(mode="json")
    fields = [field | {"constant": "30"} if field["name"] == "age" else field for field in contract["fields"]]
    third = mlflow.register("redrawn", make_model(seed=9, model="redrawn", fields=fields).files)
    mlflow.alias("redrawn", third)
    notify("redrawn")
    eventually(lambda: "'age'" in (traffic(client, "redrawn")["refused"] or ""))
    assert traffic(client, "redrawn")["sticky_on"] == ["customer", "shop"]
    assert variants(client, "redrawn") == {"champion": (third, 50), "canary": (second, 50)}


def test_versions_that_nothing_names_leave_memory(mlflow, registered, open_service, notify, monkeypatch) -> None:
    loaded: dict[int, Any] = {}
    real = serving_app.model_loader.load_model

    def load(ref: Any, *rest: Any) -> Any:
        handle = real(ref, *rest)
        loaded[ref.version] = weakref.ref(handle)
        return handle

    monkeypatch.setattr(serving_app.model_loader, "load_model", load)
    versions = registered("many", 5)
    client = open_service(mlflow_url=mlflow.url, serving_models="many", serving_poll_s=60)
    for version in versions:
        mlflow.alias("many", version)
        notify("many")
        eventually(lambda version=version: variants(client, "many") == {"champion": (version, 100)})
        ask(client, "many", 1)
    assert set(loaded) == set(versions)
    eventually(lambda: {v for v, handle in loaded.items() if handle() is not None} == set(versions[-2:]))


def test_a_model_that_loads_slowly_holds_up_no_other_models_notice(mlflow, registered, open_service, notify, monkeypatch) -> None:
    go = threading.Event()
    real = serving_app.model_loader.load_model
    slow, quick = registered("slow", 2), registered("quick", 2)

    def load(ref: Any, *rest: Any) -> Any:
        if (ref.model, ref.version) == ("slow", slow[1]):
            go.wait()
        return real(ref, *rest)

    monkeypatch.setattr(serving_app.model_loader, "load_model", load)
    client = open_service(mlflow_url=mlflow.url, serving_models="slow,quick", serving_poll_s=60)
    try:
        eventually(lambda: client.get("/health/ready").status_code == 200)
        mlflow.alias("slow", slow[1])
        notify("slow")
        mlflow.alias("quick", quick[1])
        notify("quick")
        eventually(lambda: variants(client, "quick") == {"champion": (quick[1], 100)})
        assert variants(client, "slow") == {"champion": (slow[0], 100)}
    finally:
        go.set()
    eventually(lambda: variants(client, "slow") == {"champion": (slow[1], 100)})


def signed(body: bytes, secret: str, stamp: int) -> dict[str, str]:
    digest = hmac.new(secret.encode(), f"d1.{stamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": "d1",
        "X-MLflow-Timestamp": str(stamp),
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def test_mlflows_webhook_moves_the_version_without_redis_or_poll(mlflow, registered, open_service) -> None:
    first, second = registered("hooked", 2)
    client = open_service(mlflow_url=mlflow.url, serving_models="hooked", serving_poll_s=60, serving_webhook_secret="s3cret")
    assert variants(client, "hooked") == {"champion": (first, 100)}
    events = [{"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}]
    url = str(client.base_url.join("/v1/hooks/mlflow"))
    made = mlflow.post("webhooks", name="serving", url=url, events=events, secret="s3cret")["webhook"]["webhook_id"]
    try:
        mlflow.alias("hooked", second)
        eventually(lambda: variants(client, "hooked") == {"champion": (second, 100)})
    finally:
        assert mlflow.http.delete(f"/api/2.0/mlflow/webhooks/{made}").status_code == 200


def test_a_notice_that_is_forged_old_or_no_notice_is_refused(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service(serving_webhook_secret="s3cret")
    body = json.dumps({"entity": "model_version_alias", "action": "created", "data": {"name": "basket"}}).encode()
    now = int(time.time())

    def status(headers: dict[str, str], content: bytes = body) -> int:
        return client.post("/v1/hooks/mlflow", content=content, headers=headers).status_code

    assert status(signed(body, "s3cret", now)) == 204
    assert status({}) == 401
    assert status(signed(body, "other", now)) == 401
    assert status(signed(body, "s3cret", now - 3600)) == 401
    assert status(signed(body, "s3cret", now + 3600)) == 401
    assert status(signed(body, "s3cret", now), body + b" ") == 401
    assert status(signed(body, "s3cret", now) | {"X-MLflow-Timestamp": "soon"}) == 401
    assert status(signed(b"[]", "s3cret", now), b"[]") == 400
    assert status(signed(b"{", "s3cret", now), b"{") == 400
    assert status(signed(b" " * 70_000, "s3cret", now), b" " * 70_000) == 413
    assert open_service().post("/v1/hooks/mlflow", content=body, headers=signed(body, "", now)).status_code == 404
