"""A prediction request's way from bytes to bytes, whichever route it came by.

Belongs here: the order of the steps, the answer, its log record and its counts. Does not belong here: each step's work, HTTP.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
import structlog
from starlette.requests import ClientDisconnect

from mlplatform.contracts import PINNED_VARIANT
from serving_app.batcher import Batcher, Scored, Waiting
from serving_app.features import FunctionOutputError
from serving_app.inputs import ParsedInputs
from serving_app.log_records import log_entry
from serving_app.metrics import Metrics
from serving_app.model_handle import VersionRef
from serving_app.model_watcher import ModelWatcher
from serving_app.prediction_log import PredictionLog
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable
from serving_app.router import Choice, ModelRouter
from serving_app.shadow import Shadow
from serving_app.traces import RequestTrace

LEFT = 499  # the code under which nginx counts a caller who left: nobody's fault

log = structlog.get_logger(__name__)


class Exchange:
    """One request and what became of it: counted when the `with` block ends, however it ends."""

    __slots__ = ("_metrics", "choice", "model", "pinned", "request_id", "started", "trace")

    def __init__(self, model: str, state: Mapping[str, Any], metrics: Metrics) -> None:
        self.model = model
        self.request_id: str = state.get("request_id", "")
        self.trace: RequestTrace | None = state.get("trace")
        self.started = time.perf_counter()
        self.choice: Choice | None = None
        self.pinned = False  # the caller named the version, so no other is chosen
        self._metrics = metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.end(200)
        elif isinstance(error, ProblemError):
            self.end(error.status)
        else:
            self.end(LEFT if isinstance(error, ClientDisconnect) else 500)

    def end(self, code: int) -> None:
        """Counts the request under the HTTP status it ended with."""
        status = str(code)
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


class Answer(NamedTuple):
    """A scored request, and by which version."""

    choice: Choice
    scored: Scored


class Question(NamedTuple):
    """A request as it goes to the batcher. `asked`: by `time.perf_counter`."""

    choice: Choice
    parsed: ParsedInputs
    asked: float


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

    def exchange(self, model: str, state: Mapping[str, Any]) -> Exchange:
        """`state`: of the request, with its `request_id` and, where it is sampled, its `trace`."""
        return Exchange(model, state, self._metrics)

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
        question = self.question(exchange, inputs)
        try:
            scored = await self._batcher.submit(question.choice.handle, question.parsed)
        except FunctionOutputError as error:
            raise self.fault(question, error) from error
        return self.answered(exchange, question, scored)

    def ask(self, exchange: Exchange, inputs: object, waiting: Waiting) -> Question:
        """As `answer`, for who waits without a task: `waiting` is told what was scored, for `answered`, or what went wrong, for `fault`.
        Raises ProblemError for what is wrong with the inputs themselves."""
        question = self.question(exchange, inputs)
        self._batcher.enqueue(question.choice.handle, question.parsed, waiting)
        return question

    def question(self, exchange: Exchange, inputs: object) -> Question:
        """The checked inputs and the version that will answer them. Raises ProblemError."""
        choice = exchange.choice or self.choose(exchange)
        if self._router.sticky(exchange.model) and not exchange.pinned:
            # The first input's entity stands for the request: all its answers come from one version.
            entity = self._router.entity(exchange.model, inputs[0] if isinstance(inputs, list) and inputs else None)
            choice = exchange.choice = self._router.choose(exchange.model, entity) or choice
        return Question(choice, choice.handle.parser.parse(inputs, self._rows_limit), time.perf_counter())

    def answered(self, exchange: Exchange, question: Question, scored: Scored) -> Answer:
        """Logs and counts what was scored. Raises ProblemError where a feature is missing that the model does not predict without."""
        choice, parsed, asked = question
        self._metrics.stages.observe(choice.handle.stages["wait"], time.perf_counter() - asked)
        if exchange.trace is not None:
            exchange.trace.note(choice, scored)
        if scored.batch.assembled.refused and (refused := scored.refused()):
            raise _refusal(refused)
        self._metrics.predictions.add(choice.labels, parsed.rows)
        self._log.offer(log_entry(choice, exchange.request_id, parsed, scored, exchange.ms()))
        if not exchange.pinned:  # a shadow is compared with what the rules chose
            self._shadow.offer(exchange.model, parsed, exchange.request_id)
        return Answer(choice, scored)

    def fault(self, question: Question, error: Exception) -> Exception:
        """What a caller is told of an error in scoring: a problem that names the function, where it is one's; else the error itself.
        A function's author is who can mend it, so its trace is logged, once for each version and fault."""
        if not isinstance(error, FunctionOutputError):
            return error
        handle = question.choice.handle
        fault = handle.ref, str(error)
        if fault not in self._told:
            self._told.add(fault)
            log.error("feature_function_failed", model=handle.name, version=handle.version, exc_info=error)
        return ProblemError(500, "feature-function-failed", f"a request-time feature cannot be computed for these inputs: {error}")


def answer_body(answer: Answer, request_id: str, more: Sequence[Mapping[str, Any]] | None = None) -> bytes:
    """The answer in our own protocol; `more` holds members to add to each input's part of it."""
    handle = answer.choice.handle
    before = b'{"request_id":"%b","input_index":' % request_id.encode()
    rows = [b"%b%d,%b,%b" % (before, index, text, answer.choice.answered) for index, text in enumerate(answer.scored.answered)]
    if more is not None:
        rows = [b"%b,%b" % (row, orjson.dumps(added)[1:-1]) if added else row for row, added in zip(rows, more, strict=True)]
    return b'{%b,"predictions":[%b}]}' % (handle.told, b"},".join(rows))


def unknown_model(router: ModelRouter, watcher: ModelWatcher, model: str) -> ProblemError:
    """404 that says what there is; 503 for a model that should be here and is not loaded (yet), and for any while nobody has said what
    there is: unknown is not missing."""
    if not watcher.known:
        return unavailable("not-ready", f"which models are served here is not known yet: {watcher.unknown_because()}")
    if watcher.expects(model):
        return unavailable("model-not-loaded", f"model '{model}' is not loaded; /health/ready says why")
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
