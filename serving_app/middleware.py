"""What surrounds every request: its id, its trace, its log line, its headers, the protection, and the answer to what nobody foresaw.

Belongs here: concerns of all routes alike, as plain ASGI (no per-request objects). Does not belong here: anything about models, and
who may ask what (`protection`).
"""

import asyncio
import time

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_app.around import REFUSED_AFTER_S, Around
from serving_app.problems import MEDIA_TYPE, OVERLOADED, UNFORESEEN, ProblemError, dialect, not_running, problem_body
from serving_app.request_log import ids

log = structlog.get_logger(__name__)


class RequestContext:
    """Gives each request an id (header `X-Request-ID`, `request.state.request_id`), lets it through the protection's gate, and tells
    its trace and the log how it ended. Once the service is to end, every answer says that its connection is closed.
    """

    def __init__(self, app: ASGIApp, around: Around) -> None:
        self._app = app
        self._around = around
        self._protection = around.protection
        self._cors: CORSMiddleware | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # a WebSocket: there is none here, and the gate would not see it
            await send({"type": "websocket.close", "code": 1008})
        elif self._protection.origins:
            await self._with_cors(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _with_cors(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Outside the gate: a browser's preflight carries no credential, and a page should be able to read why it was refused."""
        if self._cors is None:
            self._cors = CORSMiddleware(
                self._serve,
                allow_origins=self._protection.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("Authorization", "X-API-Key", "Content-Type", "X-Request-ID", "traceparent"),
                expose_headers=("X-Request-ID", "Retry-After", "traceparent"),
            )
        await self._cors(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        around = self._around
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = around.ids.next()
        started = time.monotonic()
        trace = state["trace"] = around.traces.begin(scope["headers"]) if around.traces.on else None
        status = 0
        head = scope["method"] == "HEAD"
        if head:  # RFC 9110, 9.3.2: the same answer as to GET, without its content; the server sees its own scope and keeps to HEAD
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = around.fields([*message.get("headers", ()), (b"x-request-id", request_id.encode())], trace)
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            gate = self._protection.gate
            if gate is None:
                raise not_running()
            await gate.passing(self._app, scope, receive, send_with_id)
        except ProblemError as problem:  # of the gate: the application answers its own
            if problem.kind == OVERLOADED:
                await asyncio.sleep(REFUSED_AFTER_S)
            if not status:
                await _send_problem(scope, send_with_id, problem, request_id)
        except Exception:  # the outermost place that can still answer; the trace goes to the log, never to the client
            log.exception("request_failed", path=scope["path"], **ids(scope, request_id, "" if trace is None else trace.trace_id))
            if not status:
                await _send_problem(scope, send_with_id, UNFORESEEN, request_id)
        finally:
            if trace is not None:
                trace.end(scope, status, request_id)
            around.requests.ended(scope, status, time.monotonic() - started, request_id, "" if trace is None else trace.trace_id)


async def _send_problem(scope: Scope, send: Send, problem: ProblemError, request_id: str) -> None:
    more = dialect(scope, problem.status, problem.detail)
    body = problem_body(problem.status, problem.kind, problem.detail, problem.errors, request_id, more)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
