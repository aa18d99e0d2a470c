"""A typed client of the prediction service for applications: `PredictionClient` and its asyncio twin.

Belongs here: requests, retries, time limits and exceptions of the REST API. Does not belong here: anything of the platform or the
service (an application that copies this one file needs httpx and orjson, nothing else).

    with PredictionClient("http://127.0.0.1:8000") as client:
        answer = client.predict("flight_disruption", [{"carrier": "UA", …}])
        answer.predictions[0].prediction
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

_RETRIED = frozenset({429, 503})
_READY_PAUSE_S = 0.1
_LOST = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)


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
    """The service refused the inputs; `faults` names each input and field. Retrying the same request cannot help."""

    def __init__(self, message: str, faults: tuple[InputFault, ...], *, status: int, kind: str, request_id: str) -> None:
        super().__init__(message, status=status, kind=kind, request_id=request_id)
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
    says why a view had no value as it should be. `quantiles` by name, where the model answers them: `prediction` is then their
    median. `features` and `explanation` are there where they were asked for."""

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


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` in all, within `deadline_s` from the call on; pauses double from `pause_s`. They never undercut the service's
    Retry-After, and are spread, so that callers refused together do not come back together.

    Retried are connections that failed and answers 429 and 503. A request that ran into its time limit is not: the service may
    still be working on it. Nor is one whose pause would end after the deadline: its refusal is raised at once.
    """

    attempts: int = 4
    pause_s: float = 0.1
    deadline_s: float = 15.0

    def pause(self, attempt: int, retry_after_s: float = 0.0) -> float:
        """Seconds to wait after the given attempt (1, 2, …)."""
        doubled = self.pause_s * float(2 ** (attempt - 1))
        return max(retry_after_s * random.uniform(1.0, 1.25), doubled * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, guards nothing


class _Attempts:
    """The attempts of one call: how long each may take, and whether there is another."""

    def __init__(self, retry: RetryPolicy, timeout_s: float, deadline_s: float | None) -> None:
        self._retry = retry
        self._timeout_s = timeout_s
        self._until = time.monotonic() + (retry.deadline_s if deadline_s is None else deadline_s)
        self._made = 0

    def next(self, request: httpx.Request) -> float:
        """Takes note of one more attempt; returns the seconds it may take, and tells the request (each of its steps may take as long)."""
        self._made += 1
        limit = max(0.001, min(self._timeout_s, self._until - time.monotonic()))
        request.extensions["timeout"] = httpx.Timeout(limit).as_dict()
        return limit

    def pause(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait before the next attempt; None where the outcome stands."""
        if isinstance(outcome, httpx.Response):
            again, told = outcome.status_code in _RETRIED, _retry_after_s(outcome)
        else:  # a connection that was never made, or one that the service closed between two requests
            again, told = isinstance(outcome, _LOST), 0.0
        if not again or self._made >= self._retry.attempts:
            return None
        pause = self._retry.pause(self._made, told)
        return pause if time.monotonic() + pause < self._until else None


def _retry_after_s(response: httpx.Response) -> float:
    """RFC 9110, 10.2.3: seconds, or a date, which proxies send."""
    said = response.headers.get("retry-after", "")
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # nothing of the kind, or a date without a zone
        return 0.0


def _predicting(http: httpx.Client | httpx.AsyncClient, model: str, inputs: Sequence[Mapping[str, Any]], **asked: bool) -> httpx.Request:
    """Timestamps may be datetimes with a zone; numbers must be finite (the service refuses null where a field is required)."""
    return http.build_request(
        "POST",
        f"/v1/models/{model}/predict",
        params={name: "true" for name, wanted in asked.items() if wanted},
        content=orjson.dumps({"inputs": [dict(row) for row in inputs]}),
        headers={"content-type": "application/json"},
    )


def _read(response: httpx.Response) -> Any:
    """The answer's JSON, or the exception it stands for."""
    try:
        told = orjson.loads(response.content)
    except orjson.JSONDecodeError as error:
        raise PredictionServiceError(f"{response.url} did not answer JSON", status=response.status_code) from error
    if response.is_success:
        return told
    told = told if isinstance(told, dict) else {}  # of a proxy it may be anything
    detail = str(told.get("detail", response.reason_phrase))
    about = {
        "status": response.status_code,
        "kind": str(told.get("type", "")).rpartition(":")[2],
        "request_id": response.headers.get("x-request-id", ""),
    }
    if response.status_code in _RETRIED:
        raise ServiceUnavailableError(detail, retry_after_s=_retry_after_s(response), **about)
    if response.status_code in (401, 403):
        raise NotAllowedError(detail, **about)
    if response.status_code == 404:
        raise UnknownModelError(detail, **about)
    if response.status_code in (413, 415, 422):
        raise InvalidInputError(detail, tuple(InputFault(**error) for error in told.get("errors", [])), **about)
    raise PredictionServiceError(detail, **about)


_ALWAYS = ("request_id", "input_index", "prediction", "decision", "model_version", "variant", "feature_ages_s", "shortfalls")


def _result(told: Mapping[str, Any]) -> PredictResult:
    predictions = tuple(
        Prediction(
            **{name: p[name] for name in _ALWAYS},
            imputed=tuple(p["imputed"]),
            features=p.get("features"),
            explanation=Explanation(**p["explanation"]) if "explanation" in p else None,
            quantiles=p.get("quantiles"),
        )
        for p in told["predictions"]
    )
    return PredictResult(told["model"], told["version"], told["threshold"], predictions)


def _credential(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _settled(url: str, outcome: httpx.Response | httpx.TransportError) -> httpx.Response:
    if isinstance(outcome, httpx.Response):
        return outcome
    raise ServiceUnreachableError(f"no answer from the prediction service at {url}: {type(outcome).__name__}: {outcome}") from outcome


class PredictionClient:
    """Blocking client; one per application, usable from several threads. Close it, or use it as a context manager."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 5.0, retry: RetryPolicy | None = None) -> None:
        """`api_key`: an API key or a token, where the service asks for one. `timeout_s`: of one attempt; `retry` limits all of them."""
        self._url = url.rstrip("/")
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=self._url, timeout=timeout_s, headers=_credential(api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        explain: bool = False,
        features: bool = False,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
    ) -> PredictResult:
        """Predictions for the inputs, in their order. Raises the errors of this module.

        An input may bring features along under `features`: they stand in for what would be looked up or computed. `explain` asks for
        each prediction's `explanation`, `features` for the values used. `timeout_s` is of one attempt, `deadline_s` of the call.
        """
        request = _predicting(self._http, model, inputs, explain=explain, features=features)
        return _result(_read(self._send(request, timeout_s, deadline_s)))

    def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        return list(self._get("/v1/models")["models"])

    def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        return dict(self._get(f"/v1/models/{name}"))

    def ready(self) -> bool:
        """Whether the service would answer predictions now; False also where nothing answers. Never retries."""
        return not self._unready()

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns once the service is ready; raises ServiceUnavailableError with its reasons where it isn't in time."""
        deadline = time.monotonic() + timeout_s
        while reason := self._unready():
            if time.monotonic() >= deadline:
                raise ServiceUnavailableError(f"the prediction service at {self._url} was not ready within {timeout_s:g} s: {reason}")
            time.sleep(_READY_PAUSE_S)

    def _get(self, path: str) -> Any:
        return _read(self._send(self._http.build_request("GET", path)))

    def _unready(self) -> str:
        try:
            _read(self._http.get("/health/ready"))
        except PredictionServiceError as error:
            return str(error)
        except httpx.TransportError as error:
            return f"no answer ({type(error).__name__})"
        return ""

    def _send(self, request: httpx.Request, timeout_s: float | None = None, deadline_s: float | None = None) -> httpx.Response:
        attempts = _Attempts(self._retry, timeout_s or self._timeout_s, deadline_s)
        while True:
            attempts.next(request)
            try:
                outcome: httpx.Response | httpx.TransportError = self._http.send(request)
            except httpx.TransportError as error:
                outcome = error
            pause = attempts.pause(outcome)
            if pause is None:
                return _settled(self._url, outcome)
            time.sleep(pause)


class AsyncPredictionClient:
    """The same for asyncio applications."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 5.0, retry: RetryPolicy | None = None) -> None:
        self._url = url.rstrip("/")
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(base_url=self._url, timeout=timeout_s, headers=_credential(api_key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        explain: bool = False,
        features: bool = False,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
    ) -> PredictResult:
        """As `PredictionClient.predict`."""
        request = _predicting(self._http, model, inputs, explain=explain, features=features)
        return _result(_read(await self._send(request, timeout_s, deadline_s)))

    async def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        return list((await self._get("/v1/models"))["models"])

    async def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        return dict(await self._get(f"/v1/models/{name}"))

    async def ready(self) -> bool:
        """Whether the service would answer predictions now; False also where nothing answers. Never retries."""
        return not await self._unready()

    async def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns once the service is ready; raises ServiceUnavailableError with its reasons where it isn't in time."""
        deadline = time.monotonic() + timeout_s
        while reason := await self._unready():
            if time.monotonic() >= deadline:
                raise ServiceUnavailableError(f"the prediction service at {self._url} was not ready within {timeout_s:g} s: {reason}")
            await asyncio.sleep(_READY_PAUSE_S)

    async def _get(self, path: str) -> Any:
        return _read(await self._send(self._http.build_request("GET", path)))

    async def _unready(self) -> str:
        try:
            _read(await self._http.get("/health/ready"))
        except PredictionServiceError as error:
            return str(error)
        except httpx.TransportError as error:
            return f"no answer ({type(error).__name__})"
        return ""

    async def _send(self, request: httpx.Request, timeout_s: float | None = None, deadline_s: float | None = None) -> httpx.Response:
        attempts = _Attempts(self._retry, timeout_s or self._timeout_s, deadline_s)
        while True:
            try:
                async with asyncio.timeout(attempts.next(request)):
                    outcome: httpx.Response | httpx.TransportError = await self._http.send(request)
            except httpx.TransportError as error:
                outcome = error
            except TimeoutError:
                outcome = httpx.ReadTimeout("the answer took longer than the time limit", request=request)
            pause = attempts.pause(outcome)
            if pause is None:
                return _settled(self._url, outcome)
            await asyncio.sleep(pause)
