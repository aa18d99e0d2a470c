"""The gate every request passes: asked, admitted, watched, and let out again.

Belongs here: the ASGI side of guard, admission and deadlines. Does not belong here: their rules, the problem's form.
"""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_app.problems import ProblemError
from serving_app.protection.deadlines import Deadlines, Late, Running
from serving_app.protection.guard import Guard, has_no_body


def too_slow() -> ProblemError:
    return ProblemError(504, "too-slow", "the answer took longer than the service allows a request")


def body_too_slow() -> ProblemError:
    return ProblemError(408, "body-too-slow", "the body did not arrive in time", headers={"Connection": "close"})


class Gate:
    """The checks of one running application. `passing` is what the application's own code runs behind."""

    def __init__(self, guard: Guard, deadlines: Deadlines) -> None:
        self.guard = guard
        self.deadlines = deadlines

    async def passing(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ProblemError where the request is refused or too slow; the caller answers it if nothing was answered yet."""
        now = time.monotonic()
        allowed = self.guard.check(scope, now)
        if isinstance(allowed, ProblemError):
            raise allowed
        if allowed.exempt:
            await app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        running = Body(task, now, receive, self.guard)
        if has_no_body(scope) and not running.work():
            raise self.guard.overloaded()
        self.deadlines.open.add(running)
        try:
            await app(scope, running.receive, send)
        except asyncio.CancelledError:
            if running.late is not Late.ANSWER:  # the server's own: it shuts down
                raise
            task.uncancel()
            raise self.guard.counted(too_slow()) from None
        finally:
            self.deadlines.open.discard(running)
            running.done()


class Body(Running):
    """A request under way, and its body on the way to the application: it takes its place in the work once it is there whole.

    A caller that sends slowly holds no place, so a thousand of them keep nobody out.
    """

    __slots__ = ("_admission", "_guard", "_held", "_receive", "_task", "_whole", "_working_since")

    def __init__(self, task: "asyncio.Task[object]", started: float, receive: Receive, guard: Guard) -> None:
        super().__init__(started, reading=False)
        self._task = task
        self._receive = receive
        self._guard = guard
        self._admission = guard.admission
        self._held = 0
        self._whole = False
        self._working_since = 0.0  # monotonic seconds; 0.0 while it holds no place

    def work(self) -> bool:
        if not self._admission.enter():
            return False
        self._working_since = time.monotonic()
        return True

    def done(self) -> None:
        if self._working_since:
            self._admission.leave(time.monotonic() - self._working_since)
        if self._held:
            self._admission.release(self._held)

    def stop(self, why: Late) -> None:
        """The task gets its CancelledError once; `late` tells it from the server's own."""
        super().stop(why)
        self._task.cancel()

    async def receive(self) -> Message:
        """Raises ProblemError (408, 503) as any code of the application might, so that its handlers answer and count it."""
        if self._whole:  # only asking whether the client is still there
            return await self._receive()
        self.reading = True
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if self.late is not Late.BODY:
                raise
            self._task.uncancel()
            raise self._guard.counted(body_too_slow()) from None
        size = len(message.get("body", b""))
        self._held += size
        if not self._admission.hold(size):
            raise self._guard.overloaded()
        if not message.get("more_body", False):
            self.reading = False
            self._whole = True
            if not self._working_since and not self.work():
                raise self._guard.overloaded()
        return message
