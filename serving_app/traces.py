"""Traces in OpenTelemetry's form, where MLPLATFORM_SERVING_OTLP_URL names a collector: a span for each sampled request, and one for each of
its stages.

Belongs here: which requests are sampled, what a span says, W3C's `traceparent` in and out. Does not belong here: counting, logging.
OpenTelemetry's SDK is imported when a service with that setting starts, and not otherwise; spans are sent from a thread of its own, and
what cannot be sent is dropped there.

W3C Trace Context, Level 1 (https://www.w3.org/TR/trace-context-1/): a caller's trace goes on, and its flag decides whether the request is
sampled. A request without one begins a trace, which is sampled with the probability of the setting.
"""

import asyncio
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from starlette.types import Scope

from mlplatform.addresses import without_password
from serving_app.batcher import Scored
from serving_app.router import Choice

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_STAGES = ("features", "assemble", "predict")
_PATH = "/v1/traces"  # of OTLP over HTTP
_EXPORT_S = 3.0  # for one attempt, its repetitions included
_CLOSE_S = 2.0  # for the last spans, at the end of the process
_PARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_PREDICT = "/v1/models/{model}/predict"

log = structlog.get_logger(__name__)


class Parent(NamedTuple):
    """What a caller's `traceparent` says; the ids as they stand there, in hexadecimal digits."""

    trace_id: str
    span_id: str
    sampled: bool


def parent_of(headers: Sequence[tuple[bytes, bytes]]) -> Parent | None:
    """The caller's span; None where the request names none, more than one, or not in W3C's form."""
    found = [value for name, value in headers if name == b"traceparent"]
    match = _PARENT.fullmatch(found[0]) if len(found) == 1 else None
    # A later version may have more fields; this one has not.
    if match is None or (match[1] == b"00" and match[5]):
        return None
    return Parent(match[2].decode(), match[3].decode(), bool(int(match[4], 16) & 1))


class RequestTrace:
    """One request's place in a trace. `span` None: it is not sampled, and only its ids are passed on."""

    __slots__ = ("_began", "_began_ns", "_scored", "_span", "_tracer", "span_id", "trace_id")

    def __init__(self, trace_id: str, span_id: str, tracer: "Tracer", span: "Span | None" = None) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self._tracer = tracer
        self._span = span
        self._scored: Scored | None = None
        self._began_ns, self._began = time.time_ns(), time.perf_counter()

    @property
    def header(self) -> bytes:
        """`traceparent` as an answer carries it."""
        return f"00-{self.trace_id}-{self.span_id}-{'00' if self._span is None else '01'}".encode()

    def note(self, choice: Choice, scored: Scored) -> None:
        """What became of the request."""
        if self._span is None:
            return
        model, version, variant = choice.labels
        told = {"mlplatform.model": model, "mlplatform.version": version, "mlplatform.variant": variant}
        self._span.set_attributes(told | {"mlplatform.inputs": scored.end - scored.start})
        self._scored = scored

    def end(self, scope: Scope, status: int, request_id: str) -> None:
        """`status` 0: nobody was there to be answered any more."""
        if self._span is None:
            return
        route, method = _route(scope), scope["method"]
        self._span.update_name(f"{method} {route}" if route else method)
        told: dict[str, Any] = {"http.request.method": method, "mlplatform.request_id": request_id}
        caller = scope["state"].get("caller")
        told |= ({"http.route": route} if route else {}) | ({"mlplatform.caller": caller} if caller else {})
        told |= {"http.response.status_code": status} if status else {}
        if status >= 500 or not status:
            from opentelemetry.trace import StatusCode

            told["error.type"] = str(status or 499)
            self._span.set_status(StatusCode.ERROR)
        self._span.set_attributes(told)
        self._add_stages()
        self._span.end()

    def _add_stages(self) -> None:
        if self._scored is None or self._span is None:
            return
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(self._span)
        rows = len(self._scored.batch.assembled.matrix)
        moments = [self._began_ns + int((moment - self._began) * 1e9) for moment in self._scored.batch.moments]
        for stage, start, end in zip(_STAGES, moments, moments[1:], strict=False):
            # A batch's stage: the same work stands in the traces of all its requests.
            self._tracer.start_span(stage, inside, attributes={"mlplatform.batch_inputs": rows}, start_time=start).end(end)


class Traces:
    """Made with the application; `on` while it runs and a collector is named."""

    def __init__(self) -> None:
        self._tracer: Tracer | None = None
        self._share = 0.0

    @property
    def on(self) -> bool:
        return self._tracer is not None

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> RequestTrace:
        assert self._tracer is not None
        parent = parent_of(headers)
        if not (random.random() < self._share if parent is None else parent.sampled):  # noqa: S311 - a sample, no secret
            ours = f"{random.getrandbits(64) or 1:016x}"
            return RequestTrace(parent.trace_id if parent else f"{random.getrandbits(128) or 1:032x}", ours, self._tracer)
        span = _started(self._tracer, parent)
        ids = span.get_span_context()
        return RequestTrace(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", self._tracer, span)

    @asynccontextmanager
    async def open(self, url: str, share: float, revision: str) -> AsyncIterator[None]:
        """Raises RuntimeError where OpenTelemetry is not installed."""
        if not url:
            yield
            return
        provider = _provider(url, revision)
        self._share = share
        self._tracer = provider.get_tracer("mlplatform.serving")
        try:
            yield
        finally:
            self._tracer = None
            # A collector that hangs must not hold up the end of the process; a daemon's thread does not.
            last = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
            last.start()
            await asyncio.to_thread(last.join, _CLOSE_S)
            if last.is_alive():
                log.warning("traces_lost_at_shutdown", collector=without_password(url))


def _provider(url: str, revision: str) -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    except ImportError as error:
        raise RuntimeError(f"MLPLATFORM_SERVING_OTLP_URL is set, but OpenTelemetry is not installed ({error}): mlplatform[otel]") from error
    about = {"service.name": "mlplatform-serving"} | ({"service.version": revision} if revision else {})
    # Which requests are sampled is decided before there is a span: an unsampled request costs no object of the SDK.
    provider = TracerProvider(ALWAYS_ON, Resource.create(about), shutdown_on_exit=False)
    endpoint = url.rstrip("/").removesuffix(_PATH) + _PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_S)))
    return provider


def _started(tracer: "Tracer", parent: Parent | None) -> "Span":
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context

    above = Context()  # and not the current one: whatever else uses OpenTelemetry in this process is no part of the request
    if parent is not None:
        ids = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=TraceFlags(1))
        above = set_span_in_context(NonRecordingSpan(ids), above)
    return tracer.start_span("request", above, SpanKind.SERVER)


def _route(scope: Scope) -> str:
    """The route's template; '' where no route took the request. The hot route answers before one is looked for."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    path: str = scope["path"]
    return _PREDICT if path.startswith("/v1/models/") and path.endswith("/predict") and path.count("/") == 4 else ""
