"""What stands around every request: made with the application, set when it starts, shared by both ways in (`middleware`, `hot`).

Belongs here: holding the parts together, and what both ways do alike. Does not belong here: a part's own work.
"""

import itertools
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from serving_app.drain import Drain
from serving_app.protection.service import Protection
from serving_app.request_log import RequestLog
from serving_app.traces import RequestTrace, Traces

# What a refusal for load takes, so that a thousand impatient callers make ten thousand of them a second at most: one that asks again at
# once would have the event loop busy with refusals, and those in work would wait for them.
REFUSED_AFTER_S = 0.1

Fields = list[tuple[bytes, bytes]]
# Unless a route says otherwise, as the documentation's page does.
_NO_STORE = (b"cache-control", b"no-store")
CLOSE = (b"connection", b"close")


class RequestIds:
    """64 random bits for this process and a count: unique like a random id, without asking the system each time.

    Always our own: prediction records are told apart by it, so a caller's repeated id must not reach them.
    """

    def __init__(self) -> None:
        self._process = secrets.token_hex(8)
        self._count = itertools.count(1)

    def next(self) -> str:
        return f"{self._process}{next(self._count):016x}"


class Around(NamedTuple):
    protection: Protection
    traces: Traces
    requests: RequestLog
    drain: Drain
    ids: RequestIds

    @classmethod
    def make(cls) -> "Around":
        return cls(Protection(), Traces(), RequestLog(), Drain(), RequestIds())

    def turned_away(self, status: int, kind: str, client: tuple[str, int] | None) -> None:
        """A connection that is answered and closed before there was a request on it."""
        self.protection.turned_away(kind)
        self.requests.turned_away(status, kind, client)

    def fields(self, given: Sequence[tuple[bytes, bytes]], trace: RequestTrace | None) -> Fields:
        """The header fields of an answer: its own, and those that every answer has, but for the request's id."""
        fields = [*given, *self.protection.headers]
        if trace is not None:
            fields.append((b"traceparent", trace.header))
        if self.drain.begun:
            fields.append(CLOSE)
        if not any(name == b"cache-control" for name, _ in fields):
            fields.append(_NO_STORE)
        return fields
