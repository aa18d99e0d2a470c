"""The guard's one question, without a server: open where it is safe, closed where it is not, and addresses read as routes read them."""

from ipaddress import ip_network
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi

from serving_app.main import create_app
from serving_app.problems import ProblemError
from serving_app.protection.admission import Admission
from serving_app.protection.callers import INVALID, Caller
from serving_app.protection.guard import Allowed, Guard
from serving_app.protection.needs import need_of


def scope(path: str = "/v1/models/m/predict", client: Any = ("127.0.0.1", 5), root: str = "", **headers: str) -> dict[str, Any]:
    given = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": root,
        "client": client,
        "state": {},
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }


def open_guard(*trusted: str) -> Guard:
    return Guard(Admission(10, 0.02), None, [ip_network(network) for network in trusted])


def kind(answer: Allowed | ProblemError) -> str:
    return answer.kind if isinstance(answer, ProblemError) else "allowed"


@pytest.mark.parametrize("client", [("127.0.0.1", 5), ("127.8.9.1", 5), ("::1", 5), ("::ffff:127.0.0.1", 5), None], ids=str)
def test_without_authentication_this_machine_is_answered(client) -> None:
    assert kind(open_guard().check(scope(client=client), 0.0)) == "allowed"


@pytest.mark.parametrize("client", [("10.0.0.1", 5), ("192.168.1.9", 5), ("8.8.8.8", 5), ("::2", 5), ("testclient", 5), ("", 0)], ids=str)
def test_without_authentication_nobody_else_is(client) -> None:
    refused = open_guard().check(scope(client=client), 0.0)
    assert kind(refused) == "open-only-here"
    assert "MLPLATFORM_SERVING_AUTH" in refused.detail


@pytest.mark.parametrize(
    "headers",
    [{"x_forwarded_for": "8.8.8.8"}, {"forwarded": "for=8.8.8.8"}, {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}],
    ids=str,
)
def test_what_comes_over_loopback_for_somebody_else_is_refused(headers) -> None:
    assert kind(open_guard().check(scope(**headers), 0.0)) == "open-only-here"
    assert kind(open_guard("127.0.0.0/8").check(scope(**headers), 0.0)) == "allowed"  # a proxy that was declared


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"])
def test_the_names_of_this_machine_are_its_own(host) -> None:
    assert kind(open_guard().check(scope(host=host), 0.0)) == "allowed"


def test_a_declared_network_is_answered_and_its_neighbour_is_not() -> None:
    guard = open_guard("10.1.0.0/16", "fd00::/8")
    assert kind(guard.check(scope(client=("10.1.2.3", 5), host="predictions.example"), 0.0)) == "allowed"
    assert kind(guard.check(scope(client=("fd00::7", 5)), 0.0)) == "allowed"
    assert kind(guard.check(scope(client=("10.2.2.3", 5)), 0.0)) == "open-only-here"


def only(models: set[str] | None) -> Guard:
    caller = Caller("k", frozenset({"predict"}), None if models is None else frozenset(models))
    return Guard(Admission(10, 0.02), lambda text, wall: caller if text == "good" else INVALID)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models/m/predict", "m"),
        ("/v1/models/m/invocations", "m"),
        ("/v2/models/m/infer", "m"),
        ("/v2/models/m/versions/3/infer", "m"),
        ("/v1/models/m", "m"),
    ],
)
def test_a_path_below_a_model_needs_a_key_for_it(path, model) -> None:
    assert (need_of(path).kind, need_of(path).model) == ("predict", model)
    assert kind(only({"m"}).check(scope(path, x_api_key="good"), 0.0)) == "allowed"
    assert kind(only({"n"}).check(scope(path, x_api_key="good"), 0.0)) == "not-allowed"
    assert kind(only({"n"}).check(scope(f"/api{path}", root="/api", x_api_key="good"), 0.0)) == "not-allowed"


@pytest.mark.parametrize("path", ["/invocations", "/v3/models/m", "/v1/models//predict", "/health/ready/", "/docs/x", "", "*"])
def test_a_path_nobody_declared_is_closed_to_keys_of_single_models(path) -> None:
    assert kind(only({"m"}).check(scope(path, x_api_key="good"), 0.0)) == "not-allowed"
    assert kind(only(None).check(scope(path, x_api_key="good"), 0.0)) == "allowed"
    assert kind(only(None).check(scope(path), 0.0)) == "not-authenticated"


def test_the_webhook_needs_no_key_since_it_is_signed_and_health_is_mlflows_too() -> None:
    assert kind(only(None).check(scope("/v1/hooks/mlflow"), 0.0)) == "allowed"
    for path in ("/ping", "/health", "/v2/health/ready"):
        assert kind(only(None).check(scope(path), 0.0)) == "allowed"
    for path in ("/v1/hooks/other", "/version", "/v2", "/v1/models/m/ping"):
        assert kind(only(None).check(scope(path), 0.0)) == "not-authenticated"


def test_every_route_of_the_application_is_declared() -> None:
    paths = get_openapi(title="", version="", routes=create_app().routes)["paths"]
    assert not [path for path in paths if need_of(path.replace("{model}", "m")).kind == "unknown"]
    assert "/v1/models/{model}/predict" in paths


def test_a_full_service_refuses_strangers_as_strangers_and_costs_the_others_nothing() -> None:
    guard = Guard(Admission(1, 0.02), only(None)._recognize)
    guard.admission.enter()
    assert kind(guard.check(scope(), 0.0)) == "not-authenticated"
    refused = guard.check(scope(x_api_key="good"), 0.0)
    assert isinstance(refused, ProblemError)
    assert (refused.status, refused.headers) == (503, {"Retry-After": "1"})
    assert kind(guard.check(scope("/health/ready"), 0.0)) == "allowed"
    guard.admission.leave(0.01)
    assert kind(guard.check(scope(x_api_key="good"), 0.0)) == "allowed"


def test_what_is_remembered_of_strangers_has_an_end() -> None:
    guard = open_guard()
    for number in range(5000):
        guard.check(scope(f"/{number}", client=(f"10.0.{number // 250}.{number % 250}", 1)), 0.0)
    assert len(guard._needs) <= 1024
    assert len(guard._near) <= 1024
