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
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

_RETRIED = frozenset({429, 503})
_LONGEST_PAUSE_S = 5.0
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
    """The service answered 429 or 503, after all retries: not ready, overloaded, or a feature it refuses to do without is missing."""


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
class Prediction:
    """The answer for one input. `imputed` names the views whose values were replaced by defaults; ages are in seconds."""

    request_id: str
    input_index: int
    prediction: float
    decision: bool | None
    model_version: int
    variant: str
    feature_ages_s: Mapping[str, float | None]
    imputed: tuple[str, ...]


@dataclass(frozen=True)
class PredictResult:
    """The answer to one request; `predictions` in the order of its inputs."""

    model: str
    version: int
    threshold: float | None
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` in all; pauses double from `pause_s`, with jitter, and never undercut the service's Retry-After.

    Retried are connections that failed and answers 429 and 503. A request that ran into its time limit is not: the service may
    still be working on it.
    """

    attempts: int = 4
    pause_s: float = 0.1

    def pause(self, attempt: int, retry_after_s: float = 0.0) -> float:
        """Seconds to wait after the given attempt (1, 2, …)."""
        doubled = self.pause_s * float(2 ** (attempt - 1))
        return min(_LONGEST_PAUSE_S, max(retry_after_s, doubled * random.uniform(0.5, 1.0)))  # noqa: S311 - spreads load, guards nothing


class _Protocol:
    """What both clients share: addresses, bodies, and the meaning of answers."""

    def __init__(self, retry: RetryPolicy) -> None:
        self.retry = retry

    @staticmethod
    def body(inputs: Sequence[Mapping[str, Any]]) -> bytes:
        """Timestamps may be datetimes with a zone; numbers must be finite (the service refuses null where a field is required)."""
        return orjson.dumps({"inputs": [dict(row) for row in inputs]})

    @staticmethod
    def read(response: httpx.Response) -> Any:
        """The answer's JSON, or the exception it stands for."""
        try:
            told = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise PredictionServiceError(f"{response.url} did not answer JSON", status=response.status_code) from error
        if response.is_success:
            return told
        detail = str(told.get("detail", response.reason_phrase)) if isinstance(told, dict) else response.reason_phrase
        about = {
            "status": response.status_code,
            "kind": str(told.get("type", "")).rpartition(":")[2] if isinstance(told, dict) else "",
            "request_id": response.headers.get("x-request-id", ""),
        }
        if response.status_code in _RETRIED:
            raise ServiceUnavailableError(detail, **about)
        if response.status_code in (401, 403):
            raise NotAllowedError(detail, **about)
        if response.status_code == 404:
            raise UnknownModelError(detail, **about)
        if response.status_code in (413, 415, 422):
            raise InvalidInputError(detail, tuple(InputFault(**error) for error in told.get("errors", [])), **about)
        raise PredictionServiceError(detail, **about)

    def unready(self, response: httpx.Response) -> str:
        """The reason the service gives for not being ready; '' where it is."""
        if response.is_success:
            return ""
        try:
            self.read(response)
        except PredictionServiceError as error:
            return str(error)
        return f"status {response.status_code}"

    @staticmethod
    def result(told: Mapping[str, Any]) -> PredictResult:
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
            )
            for p in told["predictions"]
        )
        return PredictResult(told["model"], told["version"], told["threshold"], predictions)

    def pause_before_retry(self, attempt: int, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait before the next attempt; None where the outcome stands."""
        if attempt >= self.retry.attempts:
            return None
        if isinstance(outcome, httpx.Response):
            if outcome.status_code not in _RETRIED:
                return None
            said = outcome.headers.get("retry-after", "0")
            return self.retry.pause(attempt, float(said) if said.isdigit() else 0.0)
        # A connection that was never made, or one that the service closed between two requests.
        return self.retry.pause(attempt) if isinstance(outcome, _LOST) else None


def _credential(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _unreachable(url: str, error: httpx.TransportError) -> ServiceUnreachableError:
    return ServiceUnreachableError(f"no answer from the prediction service at {url}: {type(error).__name__}: {error}")


class PredictionClient:
    """Blocking client; one per application, usable from several threads. Close it, or use it as a context manager."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 5.0, retry: RetryPolicy | None = None) -> None:
        """`api_key`: an API key or a token, where the service asks for one."""
        self._url = url.rstrip("/")
        self._protocol = _Protocol(retry or RetryPolicy())
        self._http = httpx.Client(base_url=self._url, timeout=timeout_s, headers=_credential(api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(self, model: str, inputs: Sequence[Mapping[str, Any]]) -> PredictResult:
        """Predictions for the inputs, in their order. Raises the errors of this module."""
        request = self._http.build_request(
            "POST", f"/v1/models/{model}/predict", content=self._protocol.body(inputs), headers={"content-type": "application/json"}
        )
        return self._protocol.result(self._protocol.read(self._send(request)))

    def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        models: list[dict[str, Any]] = self._protocol.read(self._send(self._http.build_request("GET", "/v1/models")))["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        told: dict[str, Any] = self._protocol.read(self._send(self._http.build_request("GET", f"/v1/models/{name}")))
        return told

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

    def _unready(self) -> str:
        try:
            return self._protocol.unready(self._http.get("/health/ready"))
        except httpx.TransportError as error:
            return f"no answer ({type(error).__name__})"

    def _send(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while True:
            attempt += 1
            try:
                outcome: httpx.Response | httpx.TransportError = self._http.send(request)
            except httpx.TransportError as error:
                outcome = error
            pause = self._protocol.pause_before_retry(attempt, outcome)
            if pause is not None:
                time.sleep(pause)
            elif isinstance(outcome, httpx.Response):
                return outcome
            else:
                raise _unreachable(self._url, outcome) from outcome


class AsyncPredictionClient:
    """The same for asyncio applications."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 5.0, retry: RetryPolicy | None = None) -> None:
        """`api_key`: an API key or a token, where the service asks for one."""
        self._url = url.rstrip("/")
        self._protocol = _Protocol(retry or RetryPolicy())
        self._http = httpx.AsyncClient(base_url=self._url, timeout=timeout_s, headers=_credential(api_key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(self, model: str, inputs: Sequence[Mapping[str, Any]]) -> PredictResult:
        """Predictions for the inputs, in their order. Raises the errors of this module."""
        request = self._http.build_request(
            "POST", f"/v1/models/{model}/predict", content=self._protocol.body(inputs), headers={"content-type": "application/json"}
        )
        return self._protocol.result(self._protocol.read(await self._send(request)))

    async def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        models: list[dict[str, Any]] = self._protocol.read(await self._send(self._http.build_request("GET", "/v1/models")))["models"]
        return models

    async def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        told: dict[str, Any] = self._protocol.read(await self._send(self._http.build_request("GET", f"/v1/models/{name}")))
        return told

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

    async def _unready(self) -> str:
        try:
            return self._protocol.unready(await self._http.get("/health/ready"))
        except httpx.TransportError as error:
            return f"no answer ({type(error).__name__})"

    async def _send(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while True:
            attempt += 1
            try:
                outcome: httpx.Response | httpx.TransportError = await self._http.send(request)
            except httpx.TransportError as error:
                outcome = error
            pause = self._protocol.pause_before_retry(attempt, outcome)
            if pause is not None:
                await asyncio.sleep(pause)
            elif isinstance(outcome, httpx.Response):
                return outcome
            else:
                raise _unreachable(self._url, outcome) from outcome
