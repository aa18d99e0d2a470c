"""What surrounds every request: its id, its log line, security headers, and the answer to what nobody foresaw.

Belongs here: concerns of all routes alike, as plain ASGI (no per-request objects). Does not belong here: anything about models.
"""

import itertools
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_app.problems import MEDIA_TYPE, problem_body

_FAILED = "the service failed on this request; its log holds the cause under this request id"
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]

log = structlog.get_logger(__name__)


class RequestContext:
    """Gives each request an id (header `X-Request-ID`, `request.state.request_id`) and logs answers that are not a success."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # 64 random bits for this process and a count: unique like a random id, without asking the system each time.
        self._process = secrets.token_hex(8)
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Always our own: prediction records are told apart by it, so a caller's repeated id must not reach them.
        request_id = f"{self._process}{next(self._count):016x}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode()), *_HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the outermost place that can still answer; the trace goes to the log, never to the client
            log.exception("request_failed", path=scope["path"], request_id=request_id)
            if not status:
                await _send_failure(send_with_id, request_id)
        if status >= 400:
            _log_answer(scope, status, request_id, time.perf_counter() - started)


async def _send_failure(send: Send, request_id: str) -> None:
    body = problem_body(500, "internal-error", _FAILED, request_id=request_id)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log_answer(scope: Scope, status: int, request_id: str, seconds: float) -> None:
    given = dict(scope["headers"]).get(b"x-request-id", b"")[:64].decode("ascii", "replace")
    log.warning(
        "request_refused" if status < 500 else "request_unanswered",
        method=scope["method"],
        path=scope["path"],
        status=status,
        request_id=request_id,
        client_request_id=given or None,
        ms=round(seconds * 1000, 2),
    )
