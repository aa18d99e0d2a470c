"""The gate as ASGI, with an application of the test's own: time limits, places in the work, and what the answers look like."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving_app.around import Around
from serving_app.middleware import RequestContext
from serving_app.problems import ProblemError
from serving_app.protection.admission import Admission
from serving_app.protection.deadlines import Deadlines
from serving_app.protection.gate import Gate
from serving_app.protection.guard import Guard

App = Callable[[Any, Any, Any], Awaitable[None]]


class Answer(list[dict[str, Any]]):
    @property
    def status(self) -> int:
        return int(self[0]["status"])

    @property
    def problem(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self[1]["body"])
        return body

    def header(self, name: bytes) -> bytes | None:
        return dict(self[0]["headers"]).get(name)


class Service:
    """A request context around an application, its deadlines swept every few milliseconds."""

    def __init__(self, app: App, cap: int = 10, body_s: float = 0.05, answer_s: float = 0.1) -> None:
        self.admission = Admission(cap, 0.02)
        self.deadlines = Deadlines(body_s, answer_s)
        around = Around.make()
        self.protection = around.protection
        self.protection.gate = Gate(Guard(self.admission, None), self.deadlines)
        self._context = RequestContext(app, around)

    async def ask(self, *messages: dict[str, Any], method: str = "POST", path: str = "/x", kind: str = "http") -> Answer:
        answer = Answer()
        left = list(messages)

        async def receive() -> dict[str, Any]:
            return left.pop(0) if left else await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            answer.append(message)

        scope = {"type": kind, "method": method, "path": path, "headers": [], "client": None}
        await self._context(scope, receive, send)
        return answer

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            import time

            async def sweep() -> None:
                while True:
                    await asyncio.sleep(0.005)
                    self.deadlines.sweep(time.monotonic())

            task = asyncio.create_task(sweep())
            try:
                return await work()
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        return asyncio.run(main())


WHOLE = {"type": "http.request", "body": b"{}", "more_body": False}
PART = {"type": "http.request", "body": b"{", "more_body": True}


async def respond(send: Any, status: int = 200, body: bytes = b"ok") -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await respond(send)


def test_a_body_that_does_not_come_ends_in_408_and_holds_no_place_meanwhile() -> None:
    service = Service(echo)

    async def work() -> Answer:
        task = asyncio.create_task(service.ask(PART))
        await asyncio.sleep(0.02)
        assert (service.admission.in_work, service.admission.held_bytes) == (0, 1)
        return await task

    answer = service.run(work)
    assert (answer.status, answer.problem["type"]) == (408, "urn:mlplatform:problem:body-too-slow")
    assert answer.header(b"connection") == b"close"
    assert (service.admission.in_work, service.admission.held_bytes) == (0, 0)


def test_an_answer_that_does_not_come_ends_in_504_and_gives_its_place_back() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(30)

    service = Service(slow)
    answer = service.run(lambda: service.ask(WHOLE))
    assert (answer.status, answer.problem["type"]) == (504, "urn:mlplatform:problem:too-slow")
    assert service.admission.in_work == 0


def test_an_answer_that_stops_half_way_is_not_answered_twice() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(30)

    service = Service(half)
    assert [m["type"] for m in service.run(lambda: service.ask(WHOLE))] == ["http.response.start"]


def test_the_servers_own_cancellation_is_no_timeout() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(30)

    service = Service(slow, answer_s=60)

    async def work() -> None:
        task = asyncio.create_task(service.ask(WHOLE))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    service.run(work)
    assert service.admission.in_work == 0


def test_no_more_than_the_places_there_are_work_at_once_and_the_rest_is_told_when_to_come_again() -> None:
    most = 0

    async def work_a_while(scope: Any, receive: Any, send: Any) -> None:
        nonlocal most
        await receive()
        most = max(most, service.admission.in_work)
        await asyncio.sleep(0.02)
        await respond(send)

    service = Service(work_a_while, cap=3, answer_s=5)

    async def work() -> list[Answer]:
        return list(await asyncio.gather(*(service.ask(WHOLE) for _ in range(10))))

    answers = service.run(work)
    assert sorted(a.status for a in answers) == [200] * 3 + [503] * 7
    assert most == 3
    assert {a.header(b"retry-after") for a in answers if a.status == 503} == {b"1"}
    assert service.admission.in_work == 0


def test_bodies_together_are_bounded() -> None:
    service = Service(echo, body_s=5, answer_s=5)
    service.admission._buffer_bytes = 5

    async def work() -> list[int]:
        big = {"type": "http.request", "body": b"123456", "more_body": True}
        return [(await service.ask(big)).status, (await service.ask(WHOLE)).status]

    assert service.run(work) == [503, 200]
    assert service.admission.held_bytes == 0


def test_health_is_answered_while_everything_else_is_refused() -> None:
    service = Service(echo, cap=1)
    service.admission.enter()

    async def work() -> list[int]:
        return [(await service.ask(WHOLE, path=path, method="GET")).status for path in ("/health/live", "/v1/models")]

    assert service.run(work) == [200, 503]


def test_what_nobody_foresaw_is_answered_without_its_trace_and_gives_its_place_back() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise RuntimeError("a password")

    service = Service(broken)
    answer = service.run(lambda: service.ask(WHOLE))
    assert answer.status == 500
    assert "password" not in answer[1]["body"].decode()
    assert service.admission.in_work == 0


def test_head_is_answered_like_get_without_the_body() -> None:
    async def get(scope: Any, receive: Any, send: Any) -> None:
        assert scope["method"] == "GET"
        await respond(send)

    service = Service(get)
    answer = service.run(lambda: service.ask(method="HEAD"))
    assert (answer.status, answer[1]["body"]) == (200, b"")


def test_a_websocket_is_closed_and_a_service_that_is_not_open_answers_nothing() -> None:
    service = Service(echo)
    assert service.run(lambda: service.ask(kind="websocket")) == [{"type": "websocket.close", "code": 1008}]
    service.protection.gate = None
    answer = service.run(lambda: service.ask(WHOLE))
    assert (answer.status, answer.problem["type"]) == (503, "urn:mlplatform:problem:not-running")


def test_the_application_can_answer_what_the_gate_raises_from_its_body() -> None:
    seen: list[int] = []

    async def careful(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            await receive()
        except ProblemError as problem:
            seen.append(problem.status)
            raise

    service = Service(careful)
    assert service.run(lambda: service.ask(PART)).status == 408
    assert seen == [408]


def test_a_scrape_is_answered_where_every_place_is_taken() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    service = Service(app, cap=1)
    assert service.admission.enter()

    async def work() -> tuple[int, int]:
        scraped = await service.ask(method="GET", path="/metrics")
        return scraped.status, (await service.ask(method="GET", path="/v1/models")).status

    assert service.run(work) == (200, 503)
