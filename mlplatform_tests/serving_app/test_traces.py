"""Traces at a real collector's door: an HTTP server that reads OTLP as the protocol defines it."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from serving_app.traces import parent_of

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Receives `POST /v1/traces`; keeps each span with its resource's attributes. `status` other than 200 refuses what comes."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.status, self.wait_s, self.asked = 200, 0.0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

                outer.asked += 1
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                time.sleep(outer.wait_s)
                if self.path == "/v1/traces" and outer.status == 200:
                    for resource in sent.resource_spans:
                        outer.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
                        outer.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds between two sendings
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def start(make_model, open_service, tmp_path, collector) -> Any:
    make_model(3).into_cache(tmp_path)
    return lambda **settings: open_service(**({"serving_otlp_url": collector.url, "serving_trace_share": 1.0} | settings))


def received(collector: Collector, trace_id: str, spans: int) -> dict[str, Any]:
    """The trace's spans by name."""
    deadline = time.monotonic() + 10
    while len(found := [s for s in collector.spans if s.trace_id.hex() == trace_id]) < spans:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return {span.name: span for span in found}


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def ask(client: httpx.Client, parent: str | None = None, path: str = PATH, body: Any = None) -> httpx.Response:
    headers = {} if parent is None else {"traceparent": parent}
    return client.post(path, json={"inputs": [ROW]} if body is None else body, headers=headers)


@pytest.mark.parametrize("path", [PATH, PATH + "?explain=false"])
def test_a_callers_trace_goes_on_through_the_request_and_its_stages(start, collector, path) -> None:
    answer = ask(start(), f"00-{TRACE}-{SPAN}-01", path)
    assert answer.status_code == 200
    version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "01")
    spans = received(collector, TRACE, 4)
    assert set(spans) == {"POST /v1/models/{model}/predict", "features", "assemble", "predict"}
    request = spans.pop("POST /v1/models/{model}/predict")
    assert (request.span_id.hex(), request.parent_span_id.hex()) == (span_id, SPAN)
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{model}/predict",
        "http.response.status_code": 200,
        "mlplatform.request_id": answer.headers["x-request-id"],
        "mlplatform.caller": "open",
        "mlplatform.model": "basket",
        "mlplatform.version": "3",
        "mlplatform.variant": "champion",
        "mlplatform.inputs": 1,
    }
    moments = [request.start_time_unix_nano]
    for stage in ("features", "assemble", "predict"):
        assert spans[stage].parent_span_id.hex() == span_id
        assert attributes(spans[stage]) == {"mlplatform.batch_inputs": 1}
        moments += [spans[stage].start_time_unix_nano, spans[stage].end_time_unix_nano]
    # The stages follow each other within the request; the parts of a microsecond are lost on the way to the Unix epoch.
    assert moments == sorted(moments)
    assert moments[-1] <= request.end_time_unix_nano + 1000
    assert collector.services == {"mlplatform-serving"}


def test_the_callers_flag_decides_and_without_one_the_setting(start, collector) -> None:
    client = start(serving_trace_share=0.0)
    unsampled = ask(client, f"00-{TRACE}-{SPAN}-00").headers["traceparent"]
    assert unsampled.startswith(f"00-{TRACE}-")
    assert unsampled.endswith("-00")
    assert SPAN not in unsampled
    begun = ask(client).headers["traceparent"]
    assert begun.endswith("-00")
    sampled = ask(client, f"00-{'1' * 32}-{SPAN}-01").headers["traceparent"]
    received(collector, sampled.split("-")[1], 4)
    assert {s.trace_id.hex() for s in collector.spans} == {"1" * 32}


def test_the_share_of_traced_requests_is_the_settings(start) -> None:
    random.seed(20131)
    client = start(serving_trace_share=0.25)
    traced = sum(client.get("/health/live").headers["traceparent"].endswith("-01") for _ in range(400))
    assert 60 <= traced <= 140  # six standard deviations around 100


def test_failures_are_marked_and_refused_input_is_not(start, collector) -> None:
    client = start()
    refused = ask(client, f"00-{'2' * 32}-{SPAN}-01", body={"inputs": [ROW | {"price": "secret-value"}]})
    away = ask(client, f"00-{'3' * 32}-{SPAN}-01", path="/v1/models/stranger/predict")
    absent = client.get("/nowhere/secret-value", headers={"traceparent": f"00-{'4' * 32}-{SPAN}-01"})
    assert (refused.status_code, away.status_code, absent.status_code) == (422, 404, 404)
    [first] = received(collector, "2" * 32, 1).values()
    assert attributes(first)["http.response.status_code"] == 422
    assert first.status.code == 0
    assert set(received(collector, "4" * 32, 1)) == {"GET"}  # no route, so no name that a caller could choose
    assert "secret-value" not in str(collector.spans)


def test_a_collector_that_refuses_hangs_or_goes_touches_no_request_and_not_the_end(make_model, run_service, tmp_path, collector) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_OTLP_URL=collector.url, MLPLATFORM_SERVING_TRACE_SHARE="1", OTEL_BSP_SCHEDULE_DELAY="20")
    process.wait_ready()
    with httpx.Client(base_url=process.url) as client:
        collector.status = 500
        assert all(ask(client).status_code == 200 for _ in range(50))
        collector.status, collector.wait_s, before = 200, 60.0, collector.asked
        while collector.asked == before:
            assert ask(client).status_code == 200
        assert all(ask(client).status_code == 200 for _ in range(50))
        collector.close()
        assert all(ask(client).status_code == 200 for _ in range(50))
    assert process.stop() == 0
    lines = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
    assert [line for line in lines if line["event"] == "prediction_log_closed"]
    assert not [line for line in lines if line.get("path") == PATH]


def test_switched_off_nothing_is_imported_nothing_is_answered_and_a_log_line_still_names_the_callers_trace(
    make_model, run_service, tmp_path
) -> None:
    make_model().into_cache(tmp_path)
    process = run_service()
    process.wait_ready()
    answer = httpx.post(f"{process.url}{PATH}", json={"inputs": []}, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert "traceparent" not in answer.headers
    process.stop()
    [line] = [json.loads(line) for line in process.log.read_text().splitlines() if "request_refused" in line]
    assert (line["trace_id"], line["request_id"]) == (TRACE, answer.headers["x-request-id"])
    # (redis-py imports the SDK's metrics by itself, where they are installed.)
    ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter")
    code = f"import sys, serving_app.main; print([name for name in sys.modules if name.startswith({ours!r})])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}x-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0g",
        f" 00-{TRACE}-{SPAN}-01",
    ],
)
def test_what_is_no_traceparent_is_none(value) -> None:
    assert parent_of([(b"traceparent", value.encode())]) is None


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known_and_two_are_none() -> None:
    later = (b"traceparent", f"cc-{TRACE}-{SPAN}-03-more".encode())
    assert parent_of([later]) == (TRACE, SPAN, True)
    assert parent_of([later, later]) is None
