"""API keys on a running service: who is let in, to what, how often; and the file changing under it."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from typer.testing import CliRunner

from mlplatform import access_keys
from mlplatform.access_keys import AccessKey, AccessKeys, HashedSecret
from mlplatform.cli import app as command_line
from mlplatform.client import NotAllowedError, PredictionClient
from mlplatform.contracts import prediction_stream
from mlplatform.queries import status as ask_status
from mlplatform.queries import use_home

PREDICT = "/v1/models/basket/predict"
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
BODY = {"inputs": [ROW]}


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(*arguments: str) -> str:
    result = CliRunner().invoke(command_line, ["keys", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def make_key(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(*options: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(command("create", "shop", "--home", str(tmp_path), "--json", *options))
        return made

    return make


@pytest.fixture
def service(make_model, open_service, tmp_path) -> Callable[..., Callable[..., httpx.Response]]:
    """`service()` starts it and returns `ask(key, path=…, …)`."""

    def start(**settings: Any) -> Callable[..., httpx.Response]:
        make_model().into_cache(tmp_path)
        client = open_service(wait=False, serving_auth="keys", **settings)
        eventually(lambda: client.get("/health/ready").status_code == 200)

        def ask(key: str | None, path: str = PREDICT, method: str = "POST", **headers: str) -> httpx.Response:
            sent = ({"authorization": f"Bearer {key}"} if key else {}) | headers
            return client.request(method, path, headers=sent, json=BODY if method == "POST" else None)

        return ask

    return start


def test_a_key_predicts_in_either_header_and_nobody_does_without(service, make_key) -> None:
    key = make_key()["key"]
    ask = service()
    assert ask(key).status_code == 200
    assert ask(None, **{"x-api-key": key}).status_code == 200
    refused = ask(None)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Bearer realm="predictions"'
    assert refused.json()["type"] == "urn:mlplatform:problem:not-authenticated"
    assert refused.headers["content-type"] == "application/problem+json"
    wrong = ask(key[:-1] + ("A" if key[-1] != "A" else "B"))
    assert (wrong.status_code, 'error="invalid_token"' in wrong.headers["www-authenticate"]) == (401, True)
    for credential in ("", "mlp_", "a" * 10_000, "mlp_000000000000_" + "A" * 43, key + "x"):
        assert ask(None, **{"x-api-key": credential}).status_code == 401, credential
    assert ask(None, authorization=f"Basic {key}").status_code == 401
    assert ask(key, **{"x-api-key": key}).status_code == 401  # two credentials are none


def test_health_and_the_empty_page_need_no_key_and_tell_nothing_of_models(service, make_key) -> None:
    key = make_key()["key"]
    ask = service()
    assert ask(None, "/health/live", "GET").status_code == 200
    assert ask(None, "/docs", "GET").status_code == 200
    for path in ("/v1/models", "/v1/models/basket", "/openapi.json", "/metrics", "/nothing/here", "/health/live/x", "//health/live"):
        assert ask(None, path, "GET").status_code == 401, path
    for path in ("/v1/models", "/v1/models/basket", "/openapi.json"):
        assert ask(key, path, "GET").status_code == 200, path
    assert ask(key, "/metrics", "GET").status_code == 403
    scraper = make_key("--action", "metrics")["key"]
    eventually(lambda: ask(scraper, "/metrics", "GET").status_code == 200)
    assert ask(scraper).status_code == 403
    assert 'mlplatform_requests_refused_total{reason="not-allowed"}' in ask(scraper, "/metrics", "GET").text


def test_metrics_can_be_opened_for_a_scraper_that_nobody_else_reaches(service, make_key) -> None:
    make_key()
    assert service(serving_metrics_open=True)(None, "/metrics", "GET").status_code == 200


def test_a_key_for_one_model_reaches_no_other_and_no_unknown_address(service, make_key) -> None:
    other, own = make_key("--model", "other")["key"], make_key("--model", "basket", "--model", "other")["key"]
    ask = service()
    assert ask(own).status_code == 200
    assert ask(other).status_code == 403
    assert ask(other, "/v1/models/other/predict").status_code == 404
    for path in ("/v1/models/basket", "/v1/models/%62asket", "/v1/models/basket/", "/v1//models/basket", "/V1/models/basket", "/x"):
        assert ask(other, path, "GET").status_code == 403, path
    # However the path is written, what is answered is about the model the key is for.
    assert "Prediction" not in ask(other, "/v1/models/other/../basket", "GET").text


def test_the_platforms_client_sends_its_key(service, make_key) -> None:
    key = make_key()["key"]
    url = str(service()(key).url).removesuffix(PREDICT)
    with PredictionClient(url, api_key=key) as client:
        assert client.predict("basket", [ROW]).version == 1
    with PredictionClient(url) as client, pytest.raises(NotAllowedError, match="send a credential") as refused:
        client.predict("basket", [ROW])
    assert (refused.value.status, refused.value.kind) == (401, "not-authenticated")


def test_the_platform_s_status_sends_its_key_and_says_when_one_is_missing(
    make_model, open_service, make_key, tmp_path, monkeypatch
) -> None:
    key = make_key()["key"]
    make_model().into_cache(tmp_path)
    client = open_service(wait=False, serving_auth="keys")
    eventually(lambda: client.get("/health/ready").status_code == 200)
    monkeypatch.setenv("MLPLATFORM_SERVING_URL", str(client.base_url))

    def status() -> dict[str, Any]:
        return ask_status(tmp_path, use_home(tmp_path))

    found = status()
    assert found["serving"] is None
    assert "status 401" in found["serving_fault"]
    assert "MLPLATFORM_SERVING_API_KEY" in found["serving_fault"]
    monkeypatch.setenv("MLPLATFORM_SERVING_API_KEY", f"{key}\n")
    found = status()
    assert ([model["name"] for model in found["serving"]], found["serving_fault"]) == (["basket"], "")


def test_the_wrong_key_never_reaches_the_model(service, make_key, redis_url) -> None:
    make_key()
    ask = service()
    assert ask("mlp_000000000000_" + "A" * 43).status_code == 401
    with redis.Redis.from_url(redis_url) as store:
        assert store.xlen(prediction_stream("basket")) == 0


def test_rotation_and_revocation_reach_the_running_service(service, make_key, tmp_path) -> None:
    made = make_key()
    ask = service()
    assert ask(made["key"]).status_code == 200
    home = ("--home", str(tmp_path))
    second = json.loads(command("rotate", made["id"], "--json", *home))
    assert second["secrets"] == 2
    eventually(lambda: ask(second["key"]).status_code == 200)
    assert ask(made["key"]).status_code == 200  # within the day of grace
    third = json.loads(command("rotate", made["id"], "--grace-h", "0", "--json", *home))
    eventually(lambda: ask(third["key"]).status_code == 200)
    assert ask(made["key"]).status_code == ask(second["key"]).status_code == 401
    command("revoke", made["id"], *home)
    eventually(lambda: ask(third["key"]).status_code == 401)
    assert "revoked" in ask(third["key"]).json()["detail"]
    [row] = json.loads(command("list", "--json", *home))
    assert (row["id"], row["state"]) == (made["id"], "revoked")


def test_a_spoilt_file_keeps_the_keys_read_before(service, make_key, tmp_path) -> None:
    first = make_key()["key"]
    ask = service()
    path = tmp_path / access_keys.KEYS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(1.5)  # longer than the pause between two looks
    assert ask(first).status_code == 200
    path.unlink()
    time.sleep(1.5)
    assert ask(first).status_code == 200
    path.write_bytes(whole)
    second = make_key()["key"]
    eventually(lambda: ask(second).status_code == 200)


def test_a_key_works_from_its_beginning_to_its_end(service, tmp_path) -> None:
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    cases = {
        "a" * 12: ({"not_before": now + hour}, "not valid yet"),
        "b" * 12: ({"expires_at": now - hour}, "expired"),
        "c" * 12: ({"not_before": now - hour, "expires_at": now + hour}, ""),
    }
    secret = access_keys.new_secret()
    hashed = HashedSecret(sha256=access_keys.hash_secret(secret), created_at=now)
    keys = AccessKeys(keys=tuple(AccessKey(id=name, name="x", secrets=(hashed,), **given) for name, (given, _) in cases.items()))
    (tmp_path / "serving").mkdir()
    access_keys.write(tmp_path / access_keys.KEYS_FILE, keys)
    ask = service()
    for name, (_, reason) in cases.items():
        answer = ask(access_keys.written(name, secret))
        assert (answer.status_code == 401) is bool(reason), name
        assert reason in answer.json().get("detail", "")


def test_a_key_over_its_rate_gets_429_and_another_key_does_not(service, make_key) -> None:
    slow, free = make_key("--rate", "0.01", "--burst", "3")["key"], make_key()["key"]
    ask = service()
    assert [ask(slow).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = ask(slow)
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    assert refused.json()["type"] == "urn:mlplatform:problem:rate-limited"
    assert ask(free).status_code == 200


def test_a_daily_quota_counts_what_other_replicas_took(service, make_key, redis_url) -> None:
    made = make_key("--quota", "5")
    ask = service()
    assert ask(made["key"]).status_code == 200
    with redis.Redis.from_url(redis_url) as store:
        eventually(lambda: len(store.keys("mlplatform:quota:*")) == 1)
        [name] = store.keys("mlplatform:quota:*")
        assert list(store.hvals(name)) == [b"1"]
        assert 0 < store.ttl(name) <= 2 * 86_400
        store.hset(name, "another replica", "4")
    eventually(lambda: ask(made["key"]).status_code == 429)
    refused = ask(made["key"])
    assert refused.json()["type"] == "urn:mlplatform:problem:quota-used-up"
    assert 0 < int(refused.headers["retry-after"]) <= 86_400


def test_a_refused_request_s_line_names_the_caller_who_was_recognized(run_service, make_model, make_key, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    made = {
        429: make_key("--rate", "0.001", "--burst", "1"),
        403: make_key("--model", "other"),
        422: make_key(),
        401: make_key(),
    }
    command("revoke", made[401]["id"], "--home", str(tmp_path))
    process = run_service(MLPLATFORM_SERVING_AUTH="keys")
    process.wait_ready()
    for path in (PREDICT, f"{PREDICT}?features=true"):  # the hot route, and the way through the application
        for status, key in made.items():
            for _ in range(2):
                answer = httpx.post(f"{process.url}{path}", json={} if status == 422 else BODY, headers={"x-api-key": key["key"]})
            assert answer.status_code == status
    process.stop()
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    told = {(line["status"], line["caller"]) for line in lines if line["event"] == "request_refused"}
    assert told == {(status, key["id"]) for status, key in made.items()}


def test_no_secret_is_kept_and_none_is_printed_again(make_key, tmp_path) -> None:
    made = make_key("--rate", "5")
    secret = made["key"].split("_", 2)[2]
    assert secret not in (tmp_path / access_keys.KEYS_FILE).read_text()
    assert secret not in command("list", "--home", str(tmp_path), "--json") + command("list", "--home", str(tmp_path))
    assert made["burst"] == 5
