"""The log's lines about requests, as a process writes them: who asked, under which ids, how it ended, and no value of an input."""

import json
from typing import Any

import httpx

ROW = {"shop": "s3cr3t", "customer": 7654321, "placed_at": "2013-09-01T10:30:00Z", "price": 98765.4375, "items": 3, "channel": "wh1sper"}
PATH = "/v1/models/basket/predict"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def lines(process: Any) -> list[dict[str, Any]]:
    return [line for text in process.log.read_text().splitlines() if (line := json.loads(text)).get("path") == PATH]


def ask(process: Any, **changes: Any) -> httpx.Response:
    headers = {"x-request-id": "theirs-1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}
    return httpx.post(f"{process.url}{PATH}", json={"inputs": [ROW | changes]}, headers=headers)


def test_an_answer_given_in_time_has_no_line_and_one_that_was_slow_or_refused_has(make_model, run_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    quick, slow = run_service(), run_service(MLPLATFORM_SERVING_SLOW_S="0.000001")
    answered: dict[str, list[httpx.Response]] = {}
    for name, process in (("quick", quick), ("slow", slow)):
        process.wait_ready()
        answered[name] = [ask(process, customer=7), ask(process, customer=-1), ask(process, customer=7, items=13)]
        assert [answer.status_code for answer in answered[name]] == [200, 422, 500]
        process.stop()
    assert [line["event"] for line in lines(quick)] == ["request_refused", "request_unanswered"]
    told = lines(slow)
    assert [line["event"] for line in told] == ["request_slow", "request_refused", "request_unanswered"]
    for line, answer in zip(told, answered["slow"], strict=True):
        assert {name: line[name] for name in ("method", "status", "request_id", "client_request_id", "trace_id", "caller", "level")} == {
            "method": "POST",
            "status": answer.status_code,
            "request_id": answer.headers["x-request-id"],
            "client_request_id": "theirs-1",
            "trace_id": TRACE,
            "caller": "open",
            "level": "warning",
        }
        assert line["ms"] > 0
    for process in (quick, slow):
        text = process.log.read_text()
        assert not [value for value in ("s3cr3t", "7654321", "wh1sper", "98765.4375") if value in text]
        assert text.count("feature_function_failed") == 1  # with its trace, which holds the code's lines and no values
