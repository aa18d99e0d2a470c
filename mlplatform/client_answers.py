"""What a request to the prediction service comes to: the typed answer, or an exception of one family.

Belongs here: both, and reading them from an HTTP answer, whoever gave it. Does not belong here: asking (`client`).

Applications import these names from `mlplatform.client`. What a newer service adds to an answer is left alone, so that it may be
updated before its callers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

RETRIED = frozenset({429, 503})
_SHOWN = 200  # characters of an answer that is not ours


class PredictionServiceError(Exception):
    """Base of all errors of this module. `request_id` finds the request in the service's logs, where it got that far."""

    def __init__(self, message: str, *, status: int | None = None, kind: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.request_id = request_id


class ServiceUnreachableError(PredictionServiceError):
    """No answer came, after all retries."""


class ServiceUnavailableError(PredictionServiceError):
    """The service answered 429 or 503, after all retries the deadline left time for: not ready, overloaded, a rate or quota used up, or
    a feature missing that it refuses to do without. `retry_after_s`: when it said to come again; 0 where it did not."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0, **about: Any) -> None:
        super().__init__(message, **about)
        self.retry_after_s = retry_after_s


class NotAllowedError(PredictionServiceError):
    """The service asks for a key or token (status 401), or the one sent is not for this (403). Retrying cannot help."""


class UnknownModelError(PredictionServiceError):
    """The service does not serve a model of this name."""


@dataclass(frozen=True)
class InputFault:
    """What is wrong with one field: `input` is the index in the request; None where the whole request is meant."""

    detail: str
    input: int | None = None
    field: str | None = None


class InvalidInputError(PredictionServiceError):
    """The inputs were refused: by the service, or (`status` None) because they cannot be sent. `faults` names each input and field.
    Retrying the same request cannot help."""

    def __init__(self, message: str, faults: tuple[InputFault, ...], **about: Any) -> None:
        super().__init__(message, **about)
        self.faults = faults


@dataclass(frozen=True)
class Explanation:
    """`base` and all `contributions` add up to the margin, in `unit`; `features`: the values used, None where missing."""

    base: float
    contributions: Mapping[str, float]
    features: Mapping[str, float | None]
    unit: str


@dataclass(frozen=True)
class Prediction:
    """The answer for one input. `imputed` names the views whose values were replaced by defaults; ages are in seconds; `shortfalls`
    says why a view had no value as it should be. `features` and `explanation` are there where they were asked for."""

    request_id: str
    input_index: int
    prediction: float
    decision: bool | None
    model_version: int
    variant: str
    feature_ages_s: Mapping[str, float | None]
    imputed: tuple[str, ...]
    shortfalls: Mapping[str, str]
    features: Mapping[str, float | None] | None = None
    explanation: Explanation | None = None
    quantiles: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PredictResult:
    """The answer to one request; `predictions` in the order of its inputs."""

    model: str
    version: int
    threshold: float | None
    predictions: tuple[Prediction, ...]


def told_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a success; raises the exception that any other answer stands for. The status says which: a proxy in front
    of the service answers in its own words."""
    try:
        told = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        told = None
    if response.is_success:
        if not isinstance(told, dict):
            raise PredictionServiceError(f"{response.url.path} did not answer a JSON object", status=response.status_code)
        return told
    raise _refusal(response, told if isinstance(told, dict) else {})


def _refusal(response: httpx.Response, told: Mapping[str, Any]) -> PredictionServiceError:
    status = response.status_code
    detail = str(told.get("detail") or _in_own_words(response))
    about = {
        "status": status,
        "kind": str(told.get("type", "")).rpartition(":")[2],
        "request_id": response.headers.get("x-request-id", ""),
    }
    if status in RETRIED:
        return ServiceUnavailableError(detail, retry_after_s=retry_after_s(response), **about)
    if status in (401, 403):
        return NotAllowedError(detail, **about)
    if status == 404:
        return UnknownModelError(detail, **about)
    if status in (413, 415, 422):
        return InvalidInputError(detail, _faults(told.get("errors")), **about)
    return PredictionServiceError(detail, **about)


def _in_own_words(response: httpx.Response) -> str:
    plain = response.headers.get("content-type", "").startswith("text/plain")
    said = response.text.strip()[:_SHOWN] if plain else ""
    return said or response.reason_phrase or f"status {response.status_code}"


def _faults(errors: object) -> tuple[InputFault, ...]:
    found = [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else []
    return tuple(InputFault(str(each.get("detail", "")), each.get("input"), each.get("field")) for each in found)


def retry_after_s(response: httpx.Response) -> float:
    """RFC 9110, 10.2.3: seconds, or a date, which proxies send; 0 where the answer says neither."""
    said = response.headers.get("retry-after", "")
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # nothing of the kind, or a date without a zone
        return 0.0


def result_of(response: httpx.Response) -> PredictResult:
    """The predictions of an answer. Raises PredictionServiceError, also where a success lacks what every answer has."""
    told = told_of(response)
    try:
        return _result(told)
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{response.url.path} answered something that is no prediction: {error!r}"
        raise PredictionServiceError(why, status=response.status_code) from error


def _result(told: Mapping[str, Any]) -> PredictResult:
    predictions = tuple(
        Prediction(
            request_id=p["request_id"],
            input_index=p["input_index"],
            prediction=p["prediction"],
            decision=p["decision"],
            model_version=p["model_version"],
            variant=p["variant"],
            feature_ages_s=p["feature_ages_s"],
            imputed=tuple(p["imputed"]),
            shortfalls=p["shortfalls"],
            features=p.get("features"),
            explanation=_explanation(p.get("explanation")),
            quantiles=p.get("quantiles"),
        )
        for p in told["predictions"]
    )
    return PredictResult(told["model"], told["version"], told["threshold"], predictions)


def _explanation(told: Mapping[str, Any] | None) -> Explanation | None:
    return None if told is None else Explanation(told["base"], told["contributions"], told["features"], told["unit"])
