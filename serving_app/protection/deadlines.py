"""Time limits of requests under way: for the body to arrive, and for the whole answer.

Belongs here: which request is late for what, and stopping it. Does not belong here: what is answered then.
One look at all open requests from time to time stands for a timer per request, which would cost more than the rest of the protection.
"""

from enum import Enum


class Late(Enum):
    BODY = "body"
    ANSWER = "answer"


class Running:
    """One request under way. `started`: monotonic seconds. `reading`: its body has not arrived whole. `late`: why it was stopped, None
    while it was not."""

    __slots__ = ("late", "reading", "started")

    def __init__(self, started: float, reading: bool) -> None:
        self.started = started
        self.reading = reading
        self.late: Late | None = None

    def stop(self, why: Late) -> None:
        """Ends the request; its own way does the rest."""
        self.late = why


class Deadlines:
    """Limits in seconds, from the request's first line on; checked by `sweep`, so up to one sweep later. `open`: what is under way."""

    def __init__(self, body_s: float, answer_s: float) -> None:
        self._body_s = body_s
        self._answer_s = answer_s
        self.open: set[Running] = set()

    @property
    def every_s(self) -> float:
        """How often to sweep, so that limits are kept within a quarter of the shorter one."""
        return min(0.5, self._body_s / 4, self._answer_s / 4)

    def sweep(self, now: float) -> None:
        """Stops what is late, each once."""
        for running in tuple(self.open):
            age = now - running.started
            if running.late is not None:
                continue
            if running.reading and age > self._body_s:
                running.stop(Late.BODY)
            elif age > self._answer_s:
                running.stop(Late.ANSWER)
