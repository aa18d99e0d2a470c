"""The client against a real HTTP server that answers what it is told to; the service's own tests cover real answers."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from mlplatform.client import (
    AsyncPredictionClient,
    Explanation,
    InputFault,
    InvalidInputError,
    NotAllowedError,
    PredictionClient,
    PredictionServiceError,
    RetryPolicy,
    ServiceUnavailableError,
    ServiceUnreachableError,
    UnknownModelError,
)

ANSWER = {
    "model": "m",
    "version": 3,
    "threshold": 0.5,
    "predictions": [
        {
            "request_id": "r",
            "input_index": 0,
            "prediction": 0.25,
            "decision": False,
            "model_version": 3,
            "variant": "champion",
            "feature_ages_s": {"v": 1.5, "w": None},
            "imputed": ["w"],
            "shortfalls": {"w": "missing"},
        }
    ],
}
FAST = RetryPolicy(attempts=3, pause_s=0.01)


class Script:
    """The answers a server gives, in turn (the last one again and again), and the bodies it got. None: the connection is cut."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]] | None] = [(200, ANSWER, {})]
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.headers: list[Any] = []
        self.delay_s = 0.0


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            script.paths.append(self.path)
            script.headers.append(self.headers)
            script.bodies.append(json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null"))
            time.sleep(script.delay_s)
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if answer is None:
                self.close_connection = True
                return
            status, body, headers = answer
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(raw)), "x-request-id": "abc", **headers}.items():
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):  # a client with a time limit has left
                self.end_headers()
                self.wfile.write(raw)

        do_GET = do_POST  # noqa: N815 - the library's name

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, url: str) -> Ask:
    """`ask("predict", …)`: the named method on the blocking client, or on its twin."""

    def call(method: str, *args: Any, at: str = url, asked: dict[str, Any] | None = None, **options: Any) -> Any:
        options = {"retry": FAST} | options
        asked = asked or {}
        if request.param == "sync":
            with PredictionClient(at, **options) as client:
                return getattr(client, method)(*args, **asked)

        async def run() -> Any:
            async with AsyncPredictionClient(at, **options) as client:
                return await getattr(client, method)(*args, **asked)

        return asyncio.run(run())

    return call


def test_an_answer_comes_back_typed(ask, script) -> None:
    result = ask("predict", "m", [{"when": datetime(2013, 9, 1, tzinfo=UTC), "x": 1}])
    assert (result.model, result.version, result.predictions[0].prediction) == ("m", 3, 0.25)
    assert result.predictions[0].imputed == ("w",)
    assert result.predictions[0].shortfalls == {"w": "missing"}
    assert (result.predictions[0].features, result.predictions[0].explanation) == (None, None)
    assert script.paths == ["/v1/models/m/predict"]
    assert result.predictions[0].feature_ages_s == {"v": 1.5, "w": None}
    assert script.bodies == [{"inputs": [{"when": "2013-09-01T00:00:00+00:00", "x": 1}]}]


def test_busy_answers_and_cut_connections_are_tried_again(ask, script) -> None:
    script.answers = [(503, {"detail": "busy"}, {}), None, (200, ANSWER, {})]
    assert ask("predict", "m", [{}]).version == 3
    assert len(script.bodies) == 3


def test_a_service_that_stays_unavailable_is_an_error_with_its_reason(ask, script) -> None:
    script.answers = [(503, {"detail": "not ready", "type": "urn:mlplatform:problem:not-ready"}, {})]
    with pytest.raises(ServiceUnavailableError, match="not ready") as caught:
        ask("predict", "m", [{}])
    assert (caught.value.status, caught.value.kind, caught.value.request_id) == (503, "not-ready", "abc")
    assert len(script.bodies) == 3


def test_retry_after_is_respected(ask, script) -> None:
    script.answers = [(503, {"detail": "busy"}, {"retry-after": "1"}), (200, ANSWER, {})]
    started = time.monotonic()
    ask("predict", "m", [{}])
    assert time.monotonic() - started >= 1


def test_explanations_and_features_are_asked_for_and_come_back_typed(ask, script) -> None:
    told = {"base": -1.0, "contributions": {"x": 0.5}, "features": {"x": None}, "unit": "log-odds"}
    row = ANSWER["predictions"][0] | {"features": {"x": None}, "explanation": told}
    script.answers = [(200, ANSWER | {"predictions": [row]}, {})]
    result = ask("predict", "m", [{"features": {"x": None}}], asked={"explain": True, "features": True})
    assert result.predictions[0].explanation == Explanation(-1.0, {"x": 0.5}, {"x": None}, "log-odds")
    assert result.predictions[0].features == {"x": None}
    ask("predict", "m", [{}], asked={"features": True})
    assert script.paths == ["/v1/models/m/predict?explain=true&features=true", "/v1/models/m/predict?features=true"]
    assert script.bodies[0] == {"inputs": [{"features": {"x": None}}]}


def test_a_pause_that_would_outlast_the_deadline_is_not_waited_for(ask, script) -> None:
    script.answers = [(429, {"detail": "the day is used up"}, {"retry-after": "3600"})]
    with pytest.raises(ServiceUnavailableError, match="used up") as caught:
        ask("predict", "m", [{}])
    assert caught.value.retry_after_s == 3600
    assert len(script.bodies) == 1


def test_a_date_to_come_again_is_understood(ask, script) -> None:
    script.answers = [(503, {"detail": "busy"}, {"retry-after": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)})]
    with pytest.raises(ServiceUnavailableError) as caught:
        ask("predict", "m", [{}])
    assert 3000 < caught.value.retry_after_s <= 3600
    script.answers = [(503, {"detail": "busy"}, {"retry-after": "soon"}), (200, ANSWER, {})]
    assert ask("predict", "m", [{}]).version == 3


def test_the_deadline_ends_all_attempts_together(ask, script) -> None:
    script.answers = [(503, {"detail": "busy"}, {})]
    endless = RetryPolicy(attempts=10**6, pause_s=0.01)
    with pytest.raises(ServiceUnavailableError):
        ask("predict", "m", [{}], retry=endless, asked={"deadline_s": 0.5})
    assert len(script.bodies) > 1
    script.delay_s = 1.0
    with pytest.raises(ServiceUnreachableError, match="Timeout"):
        ask("predict", "m", [{}], retry=endless, asked={"deadline_s": 0.2})


def test_one_call_may_have_a_time_limit_of_its_own(ask, script) -> None:
    script.delay_s = 0.5
    with pytest.raises(ServiceUnreachableError, match="ReadTimeout"):
        ask("predict", "m", [{}], asked={"timeout_s": 0.1})
    assert ask("predict", "m", [{}], timeout_s=0.1, asked={"timeout_s": 5}).version == 3


def test_pauses_are_spread_and_never_shorter_than_the_service_says() -> None:
    pauses = {RetryPolicy().pause(1, 2.0) for _ in range(50)}
    assert len(pauses) > 1
    assert min(pauses) >= 2.0
    assert max(pauses) <= 2.5


def test_bad_inputs_are_not_tried_again_and_name_their_fields(ask, script) -> None:
    script.answers = [
        (422, {"detail": "input 0, field 'x': is required", "errors": [{"input": 0, "field": "x", "detail": "is required"}]}, {})
    ]
    with pytest.raises(InvalidInputError, match="field 'x'") as caught:
        ask("predict", "m", [{}])
    assert caught.value.faults == (InputFault("is required", 0, "x"),)
    assert len(script.bodies) == 1


def test_other_failures_have_clear_exceptions(ask, script) -> None:
    for answer, kind in (
        ((404, {"detail": "no model 'm'"}, {}), UnknownModelError),
        ((500, {"detail": "failed"}, {}), PredictionServiceError),
        ((200, b"<html>", {}), PredictionServiceError),
    ):
        script.answers = [answer]
        with pytest.raises(kind):
            ask("predict", "m", [{}])
    assert len(script.bodies) == 3


def test_a_slow_answer_runs_into_the_time_limit_and_is_not_repeated(ask, script) -> None:
    script.delay_s = 0.5
    with pytest.raises(ServiceUnreachableError, match="ReadTimeout"):
        ask("predict", "m", [{}], timeout_s=0.1)
    assert len(script.bodies) == 1


def test_nothing_there_is_unreachable_and_not_ready(ask) -> None:
    with pytest.raises(ServiceUnreachableError):
        ask("models", at="http://127.0.0.1:9")
    assert ask("ready", at="http://127.0.0.1:9") is False


def test_ready_and_models(ask, script) -> None:
    script.answers = [(200, {"models": [{"name": "m"}]}, {})]
    assert ask("ready") is True
    assert ask("models") == [{"name": "m"}]
    script.answers = [(503, {"detail": "no"}, {})]
    assert ask("ready") is False


def test_waiting_for_readiness_ends_when_it_is_there_or_tells_why_not(ask, script) -> None:
    script.answers = [(503, {"detail": "model 'm' is not loaded"}, {}), (503, {}, {}), (200, {"status": "ready"}, {})]
    ask("wait_until_ready", 5)
    script.answers = [(503, {"detail": "model 'm' is not loaded"}, {})]
    with pytest.raises(ServiceUnavailableError, match="model 'm' is not loaded"):
        ask("wait_until_ready", 0.2)


# --- what is not the service's own answer, or not what it was yesterday ------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (503, ServiceUnavailableError),
        (429, ServiceUnavailableError),
        (401, NotAllowedError),
        (403, NotAllowedError),
        (502, PredictionServiceError),
    ],
)
def test_a_proxy_that_answers_in_text_is_told_by_its_status(ask, script, status, kind) -> None:
    script.answers = [(status, b"no healthy upstream", {"content-type": "text/plain"})]
    with pytest.raises(kind, match="no healthy upstream") as caught:
        ask("predict", "m", [{}])
    assert (caught.value.status, caught.value.kind) == (status, "")


def test_members_that_a_newer_service_adds_are_left_alone(ask, script) -> None:
    told = {"base": -1.0, "contributions": {}, "features": {}, "unit": "log-odds", "method": "new"}
    script.answers = [(200, {**ANSWER, "new": 1, "predictions": [{**ANSWER["predictions"][0], "new": 1, "explanation": told}]}, {})]
    assert ask("predict", "m", [{}]).predictions[0].explanation == Explanation(-1.0, {}, {}, "log-odds")
    script.answers = [(422, {"detail": "no", "errors": [{"input": 0, "field": "x", "detail": "is required", "new": 1}, "text"]}, {})]
    with pytest.raises(InvalidInputError) as caught:
        ask("predict", "m", [{}])
    assert caught.value.faults == (InputFault("is required", 0, "x"),)


@pytest.mark.parametrize("told", [{"detail": "no", "errors": None}, {"detail": "no", "errors": {}}, ["no"], None])
def test_a_refusal_without_a_list_of_faults_is_one_without_faults(ask, script, told) -> None:
    script.answers = [(422, told, {})]
    with pytest.raises(InvalidInputError) as caught:
        ask("predict", "m", [{}])
    assert caught.value.faults == ()


@pytest.mark.parametrize("told", [{}, [], {**ANSWER, "predictions": None}, {**ANSWER, "predictions": [1]}, {**ANSWER, "predictions": [{}]}])
def test_a_success_that_is_no_prediction_is_an_error_of_the_service(ask, script, told) -> None:
    script.answers = [(200, told, {})]
    with pytest.raises(PredictionServiceError, match="/v1/models/m/predict"):
        ask("predict", "m", [{}])
    with pytest.raises(PredictionServiceError):
        ask("models")


def test_a_body_that_cannot_be_decompressed_is_an_error_of_the_service(ask, script) -> None:
    script.answers = [(200, b"no gzip", {"content-encoding": "gzip"})]
    with pytest.raises(PredictionServiceError, match="decompressed"):
        ask("predict", "m", [{}])
    assert ask("ready") is False


# --- what is asked with ------------------------------------------------------------------------------------------------------


def test_a_key_read_from_a_file_may_end_in_a_line_break(ask, script) -> None:
    assert ask("predict", "m", [{}], api_key="secret\n").version == 3
    assert script.headers[-1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["sec\nret", "s\u00e9cret", "sec ret", "secret\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(ask, key) -> None:
    with pytest.raises(ValueError, match="api_key") as caught:
        ask("predict", "m", [{}], api_key=key)
    assert key not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_password_in_the_address_is_not_shown(ask) -> None:
    with pytest.raises(ServiceUnreachableError) as caught:
        ask("models", at="http://user:pwsecret@127.0.0.1:9")
    assert "127.0.0.1:9" in str(caught.value)
    assert "pwsecret" not in str(caught.value)
    with pytest.raises(ServiceUnavailableError) as late:
        ask("wait_until_ready", 0.01, at="http://user:pwsecret@127.0.0.1:9")
    assert "pwsecret" not in str(late.value)


def test_values_as_they_come_out_of_a_frame_can_be_sent(ask, script) -> None:
    frame = pd.DataFrame({"when": pd.to_datetime(["2013-09-01T10:30:00.5Z", None]), "n": np.array([1, 2]), "x": [0.5, np.nan]})
    ask("predict", "m", [*frame.to_dict("records"), {"when": np.datetime64("2013-09-01"), "n": np.int32(3), "x": np.float32(1.5)}])
    assert script.bodies[-1]["inputs"] == [
        {"when": "2013-09-01T10:30:00.500000+00:00", "n": 1, "x": 0.5},
        {"when": None, "n": 2, "x": None},
        {"when": "2013-09-01T00:00:00", "n": 3, "x": 1.5},
    ]


def test_a_value_that_cannot_be_sent_is_named(ask, script) -> None:
    with pytest.raises(InvalidInputError, match="input 1, field 'x': a value of type complex") as caught:
        ask("predict", "m", [{"x": 1}, {"x": 1j}])
    assert caught.value.faults == (InputFault("a value of type complex cannot be sent as JSON", 1, "x"),)
    assert (caught.value.status, script.bodies) == (None, [])


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"x": 1}, "not a dict: put the one input into a list: [row]"),
        (pd.DataFrame({"x": [1]}), 'not a DataFrame: give frame.to_dict("records")'),
        (pl.DataFrame({"x": [1]}), "not a DataFrame: give frame.to_dicts()"),
        ([{"x": 1}, 7], "not a list of int: a list of one object for each prediction"),
        ("x", "not a str: a list of one object for each prediction"),
        ([{"x": 1}, {"x": float("inf")}], "input 1, field 'x': an infinite number cannot be sent as JSON"),
        ([{"x": np.float32("-inf")}], "input 0, field 'x': an infinite number cannot be sent as JSON"),
        ([{"features": {"y": 1.0, "x": np.float64("inf")}}], "input 0, field 'features': an infinite number cannot be sent as JSON"),
        ([{"x": 2**70}], "input 0, field 'x': a value of type int cannot be sent as JSON: Integer exceeds 64-bit range"),
        ([{"x": "\ud800"}], "a value of type str cannot be sent as JSON: str is not valid UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_told_with_what_to_do(inputs: Any, told: str) -> None:
    with PredictionClient("http://127.0.0.1:9") as client, pytest.raises(InvalidInputError) as caught:
        client.predict("m", inputs)
    assert told in str(caught.value)


def test_a_time_limit_of_nothing_is_refused(ask, script) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        ask("predict", "m", [{}], asked={"timeout_s": 0})
    assert script.bodies == []


def test_a_model_s_name_stays_one_part_of_the_address(ask, script) -> None:
    ask("predict", "a/b?c", [{}])
    assert script.paths == ["/v1/models/a%2Fb%3Fc/predict"]
