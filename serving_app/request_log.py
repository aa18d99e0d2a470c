"""The log's lines about requests: those that were refused, failed or slow. There is none for an answer given in time.

Belongs here: which requests get a line, what it says, and how many lines a second. Does not belong here: the log's form (`logs`).
A line tells who asked, under which ids, how it ended and how long it took; never a value of an input.
"""

import time
from typing import Any

import structlog
from starlette.types import Scope

from serving_app.protection.limits import TokenBucket
from serving_app.traces import parent_of

_LINES_PER_S = 50  # under a flood the log would cost more than the answers

log = structlog.get_logger(__name__)


class RequestLog:
    """`slow_s`: a request that takes longer gets a line, whatever its answer."""

    def __init__(self) -> None:
        self.slow_s = float("inf")
        self._lines = TokenBucket(_LINES_PER_S, _LINES_PER_S)
        self._left_out = 0

    def ended(self, scope: Scope, status: int, seconds: float, request_id: str, trace_id: str) -> None:
        """`status` 0: the caller left before there was an answer; `trace_id` '' where the service traces nothing itself."""
        if status < 400 and seconds <= self.slow_s:
            return
        event = "request_slow" if status < 400 else "request_refused" if status < 500 else "request_unanswered"
        self._write(
            event,
            method=scope["method"],
            path=scope["path"],
            status=status or 499,
            ms=round(seconds * 1000, 2),
            **ids(scope, request_id, trace_id),
        )

    def turned_away(self, status: int, kind: str, client: tuple[str, int] | None) -> None:
        """A connection that was closed before there was a request: all that is known of the caller is the address."""
        self._write("connection_refused", status=status, reason=kind, client=None if client is None else client[0])

    def _write(self, event: str, **told: Any) -> None:
        if self._lines.take(time.monotonic()):
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        log.warning(event, **told, **({"lines_left_out": left_out} if left_out else {}))


def ids(scope: Scope, request_id: str, trace_id: str) -> dict[str, str | None]:
    """Under which names the request is known here, to its caller, and in the caller's trace."""
    parent = None if trace_id else parent_of(scope["headers"])
    given = dict(scope["headers"]).get(b"x-request-id", b"")[:64].decode("ascii", "replace")
    return {
        "request_id": request_id,
        "trace_id": trace_id or (parent.trace_id if parent else None),
        "client_request_id": given or None,
        "caller": scope["state"].get("caller"),
    }
