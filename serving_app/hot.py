"""The hot route: a plain `POST /v1/models/{model}/predict`, answered where its bytes arrive, without a task and without ASGI.

Belongs here: which requests are plain, and HTTP around `Predictor` for them. Does not belong here: everything else, which goes on to
the application, where the same route is declared (`routes.predict`): that documents this one and answers what this one leaves alone.

A task, its messages and FastAPI's own way through routing, dependencies and response classes cost more than the prediction does. Here
a request is one object: to uvicorn's protocol the cycle of its connection, to the deadlines a running request, to the batcher the one
who waits. It passes the same guard and admission, in the same order, as `middleware` and `protection.gate` have it.
"""

import asyncio
import time
from typing import Any, NamedTuple, Protocol

import structlog
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving_app.around import CLOSE, REFUSED_AFTER_S, Around, Fields
from serving_app.batcher import Scored
from serving_app.predictor import LEFT, Exchange, Predictor, Question, answer_body, inputs_of
from serving_app.problems import MEDIA_TYPE, OVERLOADED, UNFORESEEN, ProblemError, problem_body
from serving_app.protection.deadlines import Late, Running
from serving_app.protection.gate import Gate, body_too_slow, too_slow
from serving_app.request_log import ids
from serving_app.traces import RequestTrace

_BEFORE, _AFTER = b"/v1/models/", b"/predict"
_JSON = b"application/json"
_GIVEN: Fields = [(b"content-type", _JSON)]
# Beyond this the protocol stops reading until the application asks for more; here nobody asks.
_LARGEST_BODY = 65_536
# Fields that want more than an answer to a body of known length. `origin`: a browser's, who may have to be told what it may read.
_NOT_PLAIN = frozenset({b"expect", b"transfer-encoding", b"upgrade", b"origin", b"content-encoding"})

# Heads that are remembered, and the longest; both come from outside, so the memory for them has an end.
_KEPT, _LONGEST_HEAD = 256, 2_048
# Fields with another value in each request: a head with one never comes again.
_ONCE = frozenset({b"traceparent", b"tracestate", b"baggage", b"x-request-id"})

log = structlog.get_logger(__name__)


class Head(NamedTuple):
    """What a request's head said, where it said that the request is plain. `headers`: not to be changed, later requests share them."""

    model: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body_bytes: int


class Connection(Protocol):
    """What a request needs of uvicorn's protocol."""

    transport: Any
    server_state: Any

    def on_response_complete(self) -> None: ...


class _Unheard:
    """In place of the event that uvicorn sets for a waiting task: there is none."""

    def set(self) -> None:
        return


class HotRoute:
    """`running`: the application's predictor and its limit of a body in bytes; None before it has started, and after it has ended."""

    def __init__(self, around: Around) -> None:
        self.around = around
        self.running: tuple[Predictor, int] | None = None
        self._plain: tuple[Any, bytes] = (None, b"")
        self._heads: dict[bytes, Head] = {}

    def begin(self, connection: Connection, url: bytes, scope: Scope, keep_alive: bool) -> "HotRequest | None":
        """The request whose head has arrived, or None where the application shall answer it. `scope`: ASGI's, of a POST in HTTP/1.1; it
        holds `headers`, `client`, `root_path` and `state`, and is the request's own from now on."""
        model = url[len(_BEFORE) : -len(_AFTER)]
        if not (url.startswith(_BEFORE) and url.endswith(_AFTER)) or not model.isascii() or b"/" in model or b"%" in model or b"?" in model:
            return None
        running, gate = self.running, self.around.protection.gate
        if running is None or gate is None:
            return None
        size = 0
        for name, value in scope["headers"]:
            if name == b"content-length":
                size = int(value) if value.isdigit() else 0
            elif (name == b"content-type" and value != _JSON) or name in _NOT_PLAIN:
                return None
        if not 0 < size <= min(running[1], _LARGEST_BODY):
            return None
        return HotRequest(self, connection, scope, gate, running[0], model.decode(), keep_alive)

    def remember(self, data: bytes, request: "HotRequest") -> None:
        """Takes note of a head whose request was let in. `data`: what one read brought, from a message's begin on; `request`: the last one
        whose head was in it.

        A caller sends the same head again and again, on every connection: reading it anew costs a twentieth of the whole request. Nothing
        that is decided for each request is remembered: who asks, and whether he may, is asked anew.
        """
        end, headers, size = data.find(b"\r\n\r\n"), request.scope["headers"], len(request.body)
        if not request.let_in or not request.keep_alive or len(data) != end + 4 + size or not 0 < end <= _LONGEST_HEAD:
            return  # refused; or more than one request, or less than one
        # Line ends before a head belong to no request.
        if not data.startswith(b"POST ") or any(name in _ONCE for name, _ in headers):
            return
        if len(self._heads) >= _KEPT:
            self._heads.clear()
        self._heads[data[:end]] = Head(request.model, request.scope["path"], headers, size)

    def known(self, data: bytes) -> Head | None:
        """The head that `data` begins with, where the rest is exactly its body."""
        end = data.find(b"\r\n\r\n")
        head = self._heads.get(data[:end]) if end > 0 else None
        return head if head is not None and len(data) == end + 4 + head.body_bytes else None

    def again(self, connection: Connection, head: Head, scope: Scope) -> "HotRequest | None":
        """As `begin`, for a head that is known."""
        running, gate = self.running, self.around.protection.gate
        if running is None or gate is None:
            return None
        return HotRequest(self, connection, scope, gate, running[0], head.model, keep_alive=True)

    def head(self, status: int, given: Fields, defaults: Fields, trace: RequestTrace | None) -> bytes:
        """Status line and header fields, but those of one answer alone. `defaults`: uvicorn's own (the date), a new list each second."""
        return STATUS_LINE[status] + _lines([*defaults, *self.around.fields(given, trace)])

    def plain_head(self, defaults: Fields) -> bytes:
        """The same for most answers, put together once a second."""
        if self._plain[0] is not defaults:
            self._plain = defaults, self.head(200, _GIVEN, defaults, None)
        return self._plain[1]


class HotRequest(Running):
    """One request from its head to its answer. Nothing here raises: httptools would take it for a fault of the caller's."""

    __slots__ = (
        "_admission",
        "_around",
        "_connection",
        "_exchange",
        "_gate",
        "_held",
        "_predictor",
        "_question",
        "_route",
        "_trace",
        "_working_since",
        "body",
        "disconnected",
        "keep_alive",
        "model",
        "more_body",
        "request_id",
        "response_complete",
        "scope",
    )
    message_event = _Unheard()

    def __init__(
        self,
        route: HotRoute,
        connection: Connection,
        scope: Scope,
        gate: Gate,
        predictor: Predictor,
        model: str,
        keep_alive: bool,
    ) -> None:
        super().__init__(time.monotonic(), reading=True)
        self._route = route
        self._around = around = route.around
        self._connection = connection
        self.scope = scope
        self._gate = gate
        self._admission = gate.guard.admission
        self._predictor = predictor
        self._question: Question | None = None
        self._exchange: Exchange | None = None
        self._held = 0
        self._working_since = 0.0  # monotonic seconds; 0.0 while it holds no place in the work
        self.body = b""
        self.keep_alive = keep_alive
        self.model = model
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        state = scope["state"]
        self.request_id: str = around.ids.next()
        state["request_id"] = self.request_id
        self._trace: RequestTrace | None = around.traces.begin(scope["headers"]) if around.traces.on else None
        state["trace"] = self._trace
        allowed = gate.guard.check(scope, self.started)
        if isinstance(allowed, ProblemError):
            self._refuse(allowed)
            return
        self._exchange = predictor.exchange(model, state)
        gate.deadlines.open.add(self)

    @property
    def let_in(self) -> bool:
        """Whether the guard let it pass."""
        return self._exchange is not None

    # --- of uvicorn's protocol --------------------------------------------------------------------------------------

    def more(self, part: bytes) -> None:
        """A part of the body."""
        self.body = self.body + part if self.body else part

    def whole(self) -> None:
        """The body has arrived."""
        self.more_body = self.reading = False
        if self._exchange is None or self.done():  # refused already
            return
        if not self._admission.enter():
            self._refuse(self._gate.guard.overloaded())
            return
        self._working_since = time.monotonic()
        self._held = len(self.body)
        if not self._admission.hold(self._held):
            self._refuse(self._gate.guard.overloaded())
            return
        try:
            self._predictor.choose(self._exchange)
            self._question = self._predictor.ask(self._exchange, inputs_of(self.body), self)
        except Exception as error:  # noqa: BLE001 - see the class
            self._fail(error)

    def lost(self) -> None:
        """The caller left."""
        if self.more_body and not self.response_complete:
            self._end(0)

    # --- of the deadlines -------------------------------------------------------------------------------------------

    def stop(self, why: Late) -> None:
        super().stop(why)
        self._fail(self._gate.guard.counted(body_too_slow() if why is Late.BODY else too_slow()))

    # --- of the batcher ---------------------------------------------------------------------------------------------

    def done(self) -> bool:
        return self.response_complete or self.late is not None

    def set_result(self, scored: Scored) -> None:
        assert self._exchange is not None
        assert self._question is not None
        try:
            body = answer_body(self._predictor.answered(self._exchange, self._question, scored), self.request_id)
        except Exception as error:  # noqa: BLE001 - see the class
            self._fail(error)
        else:
            self._answer(200, _GIVEN, body)

    def set_exception(self, error: Exception) -> None:
        assert self._question is not None
        self._fail(self._predictor.fault(self._question, error))

    # --- the answer -------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, ProblemError):
            trace_id = "" if self._trace is None else self._trace.trace_id
            log.error("request_failed", path=self.scope["path"], **ids(self.scope, self.request_id, trace_id), exc_info=error)
            error = UNFORESEEN
        body = problem_body(error.status, error.kind, error.detail, error.errors, self.request_id)
        more = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        self._answer(error.status, [(b"content-type", MEDIA_TYPE.encode()), *more], body)

    def _refuse(self, problem: ProblemError) -> None:
        if problem.kind == OVERLOADED:
            asyncio.get_running_loop().call_later(REFUSED_AFTER_S, self._fail, problem)
        else:
            self._fail(problem)

    def _answer(self, status: int, given: Fields, body: bytes) -> None:
        if self.response_complete:
            return
        route, connection, trace = self._route, self._connection, self._trace
        defaults = connection.server_state.default_headers
        if given is _GIVEN and status == 200 and trace is None and self.keep_alive and not self._around.drain.begun:
            head = route.plain_head(defaults)
        else:
            if CLOSE in given or self._around.drain.begun:
                self.keep_alive = False
            elif not self.keep_alive:
                given = [*given, CLOSE]
            head = route.head(status, given, defaults, trace)
        transport = connection.transport
        if not transport.is_closing():
            transport.write(b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (head, self.request_id.encode(), len(body), body))
            if not self.keep_alive:
                transport.close()
        self._end(status)
        connection.on_response_complete()

    def _end(self, status: int) -> None:
        """`status` 0: nobody was there to be answered any more."""
        self.response_complete = True
        self._gate.deadlines.open.discard(self)
        now = time.monotonic()
        if self._working_since:
            self._admission.leave(now - self._working_since)
        if self._held:
            self._admission.release(self._held)
        if self._exchange is not None:
            self._exchange.end(status or LEFT)
        trace = self._trace
        if trace is not None:
            trace.end(self.scope, status, self.request_id)
        self._around.requests.ended(self.scope, status, now - self.started, self.request_id, "" if trace is None else trace.trace_id)


def _lines(fields: Fields) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])
