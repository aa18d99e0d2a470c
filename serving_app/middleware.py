"""What surrounds every request: its id, its log line, security headers, the protection, and the answer to what nobody foresaw.

Belongs here: concerns of all routes alike, as plain ASGI (no per-request objects). Does not belong here: anything about models, and
who may ask what (`protection`).
"""

import itertools
import secrets
import time

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_app.problems import MEDIA_TYPE, UNFORESEEN, ProblemError, dialect, problem_body
from serving_app.protection.limits import TokenBucket
from serving_app.protection.service import Protection

# Unless a route says otherwise, as the documentation's page does.
_NO_STORE = (b"cache-control", b"no-store")
_LOGGED_PER_S = 50  # refusals written down; under a flood the log would cost more than the answers

log = structlog.get_logger(__name__)


class RequestContext:
    """Gives each request an id (header `X-Request-ID`, `request.state.request_id`), lets it through the protection's gate, and logs
    answers that are not a success.
    """

    def __init__(self, app: ASGIApp, protection: Protection) -> None:
        self._app = app
        # 64 random bits for this process and a count: unique like a random id, without asking the system each time.
        self._process = secrets.token_hex(8)
        self._count = itertools.count(1)
        self._protection = protection
        self._cors: CORSMiddleware | None = None
        self._lines = TokenBucket(_LOGGED_PER_S, _LOGGED_PER_S)
        self._unlogged = 0

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
                allow_headers=("Authorization", "X-API-Key", "Content-Type", "X-Request-ID"),
                expose_headers=("X-Request-ID", "Retry-After"),
            )
        await self._cors(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Always our own: prediction records are told apart by it, so a caller's repeated id must not reach them.
        request_id = f"{self._process}{next(self._count):016x}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0
        head = scope["method"] == "HEAD"
        if head:  # RFC 9110, 9.3.2: the same answer as to GET, without its content; the server sees its own scope and keeps to HEAD
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *self._protection.headers,
                ]
                for name, _ in headers:
                    if name == b"cache-control":
                        break
                else:
                    headers.append(_NO_STORE)
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            gate = self._protection.gate
            if gate is None:
                raise ProblemError(503, "not-running", "the service starts or stops", headers={"Retry-After": "1"})
            await gate.passing(self._app, scope, receive, send_with_id)
        except ProblemError as problem:  # of the gate: the application answers its own
            if not status:
                await _send_problem(scope, send_with_id, problem, request_id)
        except Exception:  # the outermost place that can still answer; the trace goes to the log, never to the client
            log.exception("request_failed", path=scope["path"], request_id=request_id)
            if not status:
                await _send_problem(scope, send_with_id, UNFORESEEN, request_id)
        if status >= 400:
            self._log_answer(scope, status, request_id, time.monotonic() - started)

    def _log_answer(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        if self._lines.take(time.monotonic()):
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        given = dict(scope["headers"]).get(b"x-request-id", b"")[:64].decode("ascii", "replace")
        log.warning(
            "request_refused" if status < 500 else "request_unanswered",
            method=scope["method"],
            path=scope["path"],
            status=status,
            request_id=request_id,
            client_request_id=given or None,
            caller=scope["state"].get("caller"),
            ms=round(seconds * 1000, 2),
            **({"lines_left_out": unlogged} if unlogged else {}),
        )


async def _send_problem(scope: Scope, send: Send, problem: ProblemError, request_id: str) -> None:
    more = dialect(scope, problem.status, problem.detail)
    body = problem_body(problem.status, problem.kind, problem.detail, problem.errors, request_id, more)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
