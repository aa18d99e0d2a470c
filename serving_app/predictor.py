"""A prediction request's way from bytes to bytes, whichever route it came by.

Belongs here: the order of the steps, the answer, its log record and its counts. Does not belong here: each step's work, HTTP.
"""

import time
from typing import Any

import orjson

from serving_app.batcher import Batcher, Scored
from serving_app.inputs import ParsedInputs
from serving_app.metrics import Metrics
from serving_app.model_watcher import ModelWatcher
from serving_app.prediction_log import LogEntry, PredictionLog
from serving_app.problems import FieldError, ProblemError, invalid_input, unavailable
from serving_app.router import Choice, ModelRouter


class Predictor:
    """Used from one event loop."""

    def __init__(
        self,
        router: ModelRouter,
        watcher: ModelWatcher,
        batcher: Batcher,
        prediction_log: PredictionLog,
        metrics: Metrics,
        rows_limit: int,
    ) -> None:
        self._router = router
        self._watcher = watcher
        self._batcher = batcher
        self._log = prediction_log
        self._metrics = metrics
        self._rows_limit = rows_limit

    def choose(self, model: str) -> Choice:
        """The version that answers. Raises ProblemError: 404 for a model that is not served, 503 for one not loaded yet."""
        choice = self._router.choose(model)
        if choice is None:
            raise unknown_model(self._router, self._watcher, model)
        return choice

    async def answer(self, choice: Choice, body: bytes, request_id: str, started: float) -> bytes:
        """The body of the answer to a body of our own protocol. `started` is perf_counter's when the request came. Raises ProblemError."""
        parsed = choice.handle.parser.parse(inputs_of(body), self._rows_limit)
        scored = await self._batcher.submit(choice.handle, parsed)
        if scored.assembled.refused and (refused := scored.refused()):
            raise _refusal(refused)
        return self._tell(choice, request_id, parsed, scored, started)

    def count(self, model: str, choice: Choice | None, status: int, started: float) -> None:
        """Counts a request that was answered, with success or not. A name nobody serves is no label: a caller could make thousands."""
        if choice is None:
            self._metrics.requests.add(("unknown", "", "", str(status)))
            return
        labels = choice.labels
        self._metrics.requests.add((*labels, str(status)))
        self._metrics.seconds.observe(labels, time.perf_counter() - started)

    def _tell(self, choice: Choice, request_id: str, parsed: ParsedInputs, scored: Scored, started: float) -> bytes:
        """The body of the answer; the same rows go to the prediction log."""
        handle, variant = choice.handle, choice.variant
        threshold, version, name = handle.contract.threshold, handle.version, handle.name
        rows = scored.rows(handle.view_names)
        told: list[dict[str, Any]] = [
            {
                "request_id": request_id,
                **row,
                "decision": None if threshold is None else row["prediction"] >= threshold,
                "model_version": version,
                "variant": variant,
            }
            for row in rows
        ]
        body = orjson.dumps({"model": name, "version": version, "threshold": threshold, "predictions": told})
        self._metrics.predictions.add(choice.labels, len(rows))
        common = {
            "request_id": request_id,
            "requested_at": scored.requested_at,
            "model": name,
            "version": version,
            "variant": variant,
            "contract_digest": handle.digest,
            "latency_ms": round((time.perf_counter() - started) * 1000, 3),
        }
        self._log.offer(LogEntry(name, common, rows, parsed.received, scored.matrix))
        return body


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
