"""A prediction request's way from bytes to bytes, whichever route it came by.

Belongs here: the order of the steps, the answer, its log record and its counts. Does not belong here: each step's work, HTTP.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson
import structlog
from starlette.requests import ClientDisconnect

from mlplatform.contracts import PINNED_VARIANT
from serving_app import traces
from serving_app.batcher import Batcher, Scored
from serving_app.features import FunctionOutputError
from serving_app.log_records import log_entry
from serving_app.metrics import Metrics
from serving_app.model_handle import VersionRef
from serving_app.model_watcher import ModelWatcher
from serving_app.prediction_log import PredictionLog
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable
from serving_app.router import Choice, ModelRouter
from serving_app.shadow import Shadow

log = structlog.get_logger(__name__)


class Exchange:
    """One request and what became of it: counted when the `with` block ends, however it ends."""

    __slots__ = ("_metrics", "choice", "model", "pinned", "request_id", "started")

    def __init__(self, model: str, request_id: str, metrics: Metrics) -> None:
        self.model = model
        self.request_id = request_id
        self.started = time.perf_counter()
        self.choice: Choice | None = None
        self.pinned = False  # the caller named the version, so no other is chosen
        self._metrics = metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            status = "200"
        elif isinstance(error, ProblemError):
            status = str(error.status)
        else:  # a caller who left is nobody's fault; the code is nginx's for this
            status = "499" if isinstance(error, ClientDisconnect) else "500"
        if self.choice is None:
            # A name that nobody serves is no label: a caller could make thousands.
            self._metrics.requests.add(("unknown", "", "", status))
            return
        labels = self.choice.labels
        self._metrics.requests.add((*labels, status))
        self._metrics.seconds.observe(labels, self.ms() / 1000)

    def ms(self) -> float:
        """Milliseconds since the request came."""
        return (time.perf_counter() - self.started) * 1000


@dataclass(frozen=True)
class Answer:
    """A scored request: `rows` as `Scored.rows` gives them."""

    choice: Choice
    scored: Scored
    rows: list[dict[str, Any]]


class Predictor:
    """Used from one event loop."""

    def __init__(
        self,
        router: ModelRouter,
        watcher: ModelWatcher,
        batcher: Batcher,
        prediction_log: PredictionLog,
        shadow: Shadow,
        metrics: Metrics,
        rows_limit: int,
    ) -> None:
        self._router = router
        self._watcher = watcher
        self._batcher = batcher
        self._log = prediction_log
        self._shadow = shadow
        self._metrics = metrics
        self._rows_limit = rows_limit
        self._told: set[tuple[VersionRef, str]] = set()

    def exchange(self, model: str, request_id: str) -> Exchange:
        return Exchange(model, request_id, self._metrics)

    def choose(self, exchange: Exchange) -> Choice:
        """The version that will answer, as far as it is known before the body. Raises ProblemError: 404 for a model that is
        not served, 503 for one not loaded yet."""
        choice = self._router.choose(exchange.model)
        if choice is None:
            raise unknown_model(self._router, self._watcher, exchange.model)
        exchange.choice = choice
        return choice

    def pin(self, exchange: Exchange, version: str) -> Choice:
        """The version that the caller named. Raises ProblemError as `choose` does, and 404 for a version that is not in memory."""
        self.choose(exchange)
        slot = self._router.slot(exchange.model)
        held = {} if slot is None else {str(handle.version): handle for _, handle in slot.held()}
        if version not in held:
            exchange.choice = None
            raise ProblemError(
                404,
                "version-not-loaded",
                f"version '{version[:64]}' of '{exchange.model}' is not in memory; those that answer: {', '.join(sorted(held, key=int))}",
            )
        exchange.pinned = True
        exchange.choice = Choice(held[version], PINNED_VARIANT)
        return exchange.choice

    async def respond(self, exchange: Exchange, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """The body of the answer to a body of our own protocol. Raises ProblemError."""
        self.choose(exchange)
        answer = await self.answer(exchange, inputs_of(await read()))
        return answer_body(answer, exchange.request_id)

    async def answer(self, exchange: Exchange, inputs: object) -> Answer:
        """Predicts, logs, counts. `inputs` as they stand in a body of our own protocol. Raises ProblemError."""
        choice = exchange.choice or self.choose(exchange)
        if self._router.sticky(exchange.model) and not exchange.pinned:
            # The first input's entity stands for the request: all its answers come from one version.
            entity = self._router.entity(exchange.model, inputs[0] if isinstance(inputs, list) and inputs else None)
            choice = exchange.choice = self._router.choose(exchange.model, entity) or choice
        parsed = choice.handle.parser.parse(inputs, self._rows_limit)
        asked = time.perf_counter()
        try:
            scored = await self._batcher.submit(choice.handle, parsed)
        except FunctionOutputError as error:
            raise self._function_failed(choice, error) from error
        self._metrics.stages.observe(choice.handle.stages["wait"], time.perf_counter() - asked)
        traces.note(choice, scored)
        if scored.assembled.refused and (refused := scored.refused()):
            raise _refusal(refused)
        rows = scored.rows(choice.handle.view_names)
        self._metrics.predictions.add(choice.labels, len(rows))
        self._log.offer(log_entry(choice, exchange.request_id, parsed, scored, rows, exchange.ms()))
        if not exchange.pinned:  # a shadow is compared with what the rules chose
            self._shadow.offer(exchange.model, parsed, exchange.request_id)
        return Answer(choice, scored, rows)

    def _function_failed(self, choice: Choice, error: FunctionOutputError) -> ProblemError:
        """500 that names the function: its author is who can mend it. Its trace is logged once for each version and fault."""
        fault = choice.handle.ref, str(error)
        if fault not in self._told:
            self._told.add(fault)
            log.error("feature_function_failed", model=choice.handle.name, version=choice.handle.version, exc_info=error)
        return ProblemError(500, "feature-function-failed", f"a request-time feature cannot be computed for these inputs: {error}")


def answer_body(answer: Answer, request_id: str, more: Sequence[Mapping[str, Any]] | None = None) -> bytes:
    """The answer in our own protocol; `more` holds members to add to each input's part of it."""
    handle, variant = answer.choice.handle, answer.choice.variant
    threshold, version = handle.contract.threshold, handle.version
    told: list[dict[str, Any]] = [
        {
            "request_id": request_id,
            **row,
            "decision": None if threshold is None else row["prediction"] >= threshold,
            "model_version": version,
            "variant": variant,
        }
        for row in answer.rows
    ]
    if names := handle.contract.quantile_names:
        told = [{**row, "quantiles": dict(zip(names, row["quantiles"], strict=True))} for row in told]
    if more is not None:
        told = [{**row, **added} for row, added in zip(told, more, strict=True)]
    return orjson.dumps({"model": handle.name, "version": version, "threshold": threshold, "predictions": told})


def unknown_model(router: ModelRouter, watcher: ModelWatcher, model: str) -> ProblemError:
    """404 that says what there is; 503 for a model that should be here and is not loaded (yet)."""
    if model in watcher.missing() or model in watcher.refusals:
        return ProblemError(503, "model-not-loaded", f"model '{model}' is not loaded; /health/ready says why", headers={"Retry-After": "1"})
    served = ", ".join(router.names()) or "none"
    return ProblemError(404, "model-not-found", f"no model '{model[:64]}' is served here; served: {served}")


def inputs_of(body: bytes) -> object:
    """What stands under `inputs` in a body of our own protocol. Raises a 422 problem."""
    try:
        sent = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid_input([FieldError(f"the body is not JSON: {error}")]) from None
    if not isinstance(sent, dict) or "inputs" not in sent:
        raise invalid_input([FieldError("the body must be an object with the key 'inputs'", field="inputs")])
    if len(sent) > 1:
        unknown = sorted(sent.keys() - {"inputs"})
        raise invalid_input(
            [FieldError("is not known here: the body has one key, 'inputs'", field=str(name)[:64]) for name in unknown[:10]]
        )
    return sent["inputs"]


def _refusal(refused: list[tuple[int, str, Any]]) -> ProblemError:
    errors = tuple(FieldError(f"the view '{view}' has no usable value ({why})", input=row) for row, view, why in refused[:100])
    return unavailable(
        "features-unavailable", f"the model does not predict without these features: input {errors[0].input}: {errors[0].detail}", errors
    )
