"""A typed client of the prediction service for applications: `PredictionClient` and its asyncio twin.

Belongs here: requests, retries and time limits. Does not belong here: answers and exceptions (`client_answers`, whose names stand here
too), and anything of the platform or the service (an application that copies these two files needs httpx and orjson, nothing else).

    with PredictionClient("http://127.0.0.1:8000") as client:
        answer = client.predict("flight_disruption", [{"carrier": "UA", …}])
        answer.predictions[0].prediction
"""

import asyncio
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import orjson

from mlplatform.client_answers import (
    RETRIED,
    Explanation,
    InputFault,
    InvalidInputError,
    NotAllowedError,
    Prediction,
    PredictionServiceError,
    PredictResult,
    ServiceUnavailableError,
    ServiceUnreachableError,
    UnknownModelError,
    result_of,
    retry_after_s,
    told_of,
)

__all__ = [
    "AsyncPredictionClient",
    "Explanation",
    "InputFault",
    "InvalidInputError",
    "NotAllowedError",
    "PredictResult",
    "Prediction",
    "PredictionClient",
    "PredictionServiceError",
    "RetryPolicy",
    "ServiceUnavailableError",
    "ServiceUnreachableError",
    "UnknownModelError",
]

_READY_PAUSE_S = 0.1
_LOST = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)


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
        if timeout_s <= 0:
            raise ValueError("timeout_s must be more than 0 seconds")
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

    def pause(self, outcome: httpx.Response | httpx.RequestError) -> float | None:
        """Seconds to wait before the next attempt; None where the outcome stands."""
        if isinstance(outcome, httpx.Response):
            again, told = outcome.status_code in RETRIED, retry_after_s(outcome)
        else:  # a connection that was never made, or one that the service closed between two requests
            again, told = isinstance(outcome, _LOST), 0.0
        if not again or self._made >= self._retry.attempts:
            return None
        pause = self._retry.pause(self._made, told)
        return pause if time.monotonic() + pause < self._until else None


def _predicting(
    http: httpx.Client | httpx.AsyncClient, model: str, inputs: Sequence[Mapping[str, Any]], explain: bool, features: bool
) -> httpx.Request:
    asked = {"explain": explain, "features": features}
    return http.build_request(
        "POST",
        f"/v1/models/{quote(model, safe='')}/predict",
        params={name: "true" for name, wanted in asked.items() if wanted},
        content=_body(_rows(inputs)),
        headers={"content-type": "application/json"},
    )


def _rows(inputs: object) -> list[Mapping[str, Any]]:
    """Raises InvalidInputError for what is no list of objects, with what to do about the usual ones."""
    if isinstance(inputs, Sequence) and all(isinstance(row, Mapping) for row in inputs):
        return [dict(row) for row in inputs]
    given, mend = type(inputs).__name__, "a list of one object for each prediction"
    if isinstance(inputs, Mapping):
        mend = "put the one input into a list: [row]"
    elif hasattr(inputs, "to_dicts"):
        mend = "give frame.to_dicts()"
    elif hasattr(inputs, "to_dict"):
        mend = 'give frame.to_dict("records")'
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        given = "list of " + next(type(row).__name__ for row in inputs if not isinstance(row, Mapping))
    raise InvalidInputError(f"inputs must be a list of objects, not a {given}: {mend}", (), kind="unsendable")


def _body(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Values may be NumPy's and pandas' as they come out of a frame. Raises InvalidInputError that names a value JSON has no form for."""
    faults: tuple[InputFault, ...] = tuple(_infinite(rows))
    if not faults:
        try:
            return orjson.dumps({"inputs": rows}, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            faults = tuple(_unsendable(rows)) or (InputFault(str(error)),)
    first = faults[0]
    where = "" if first.input is None else f"input {first.input}, field '{first.field}': "
    raise InvalidInputError(f"{where}{first.detail}", faults, kind="unsendable")


def _infinite(rows: Sequence[Mapping[str, Any]]) -> Iterator[InputFault]:
    """orjson writes null for them, which is a missing value; what is not a number at all (NaN) means just that."""
    for index, row in enumerate(rows):
        for name, value in row.items():
            if any(map(_is_infinite, value.values())) if isinstance(value, Mapping) else _is_infinite(value):
                yield InputFault("an infinite number cannot be sent as JSON", index, str(name))


def _is_infinite(value: object) -> bool:
    """Of a Python float, or a scalar of NumPy's."""
    if not isinstance(value, float) and not (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0):
        return False
    try:
        return math.isinf(value)  # type: ignore[arg-type]  # what has a dtype may be a number
    except TypeError:
        return False


def _plain(value: object) -> Any:
    """What orjson asks about: pandas' times among others, which are datetimes of a class of their own (their missing one too)."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds") if value == value else None  # noqa: PLR0124 - NaT differs from itself
    raise TypeError


def _unsendable(rows: Sequence[Mapping[str, Any]]) -> Iterator[InputFault]:
    for index, row in enumerate(rows):
        for name, value in row.items():
            try:
                orjson.dumps({name: value}, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
            except TypeError as error:
                # An integer of more than 64 bits, half of a surrogate pair: orjson says so.
                why = "" if str(error).startswith("Type is not") else f": {error}"
                yield InputFault(f"a value of type {type(value).__name__} cannot be sent as JSON{why}", index, str(name))


def _credential(api_key: str) -> dict[str, str]:
    """Raises ValueError, which does not show the key."""
    key = api_key.strip()  # as it comes out of a file
    if any(not "!" <= character <= "~" for character in key):
        raise ValueError("api_key holds a character that an HTTP header cannot carry")
    return {"authorization": f"Bearer {key}"} if key else {}


def _shown(url: str) -> str:
    """The address without user and password, for messages."""
    return str(httpx.URL(url).copy_with(userinfo=b"", query=None))


def _settled(url: str, outcome: httpx.Response | httpx.RequestError) -> httpx.Response:
    if isinstance(outcome, httpx.Response):
        return outcome
    if isinstance(outcome, httpx.DecodingError):
        raise PredictionServiceError(f"the answer of {_shown(url)} cannot be decompressed: {outcome}") from outcome
    raise ServiceUnreachableError(
        f"no answer from the prediction service at {_shown(url)}: {type(outcome).__name__}: {outcome}"
    ) from outcome


def _listed(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = told.get("models")
    if not isinstance(models, list):
        raise PredictionServiceError("the answer holds no list of models", status=200)
    return models


class PredictionClient:
    """Blocking client; one per application, usable from several threads. Close it, or use it as a context manager."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 5.0, retry: RetryPolicy | None = None) -> None:
        """`api_key`: an API key or a token, where the service asks for one. `timeout_s`: of one attempt; `retry` limits all of them.
        Raises ValueError for a key that no header can carry."""
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
        request = _predicting(self._http, model, inputs, explain, features)
        return result_of(self._send(request, timeout_s, deadline_s))

    def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        return _listed(self._get("/v1/models"))

    def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        return self._get(f"/v1/models/{quote(name, safe='')}")

    def ready(self) -> bool:
        """Whether the service would answer predictions now; False also where nothing answers. Never retries."""
        return not self._unready()

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns once the service is ready; raises ServiceUnavailableError with its reasons where it isn't in time."""
        deadline = time.monotonic() + timeout_s
        while reason := self._unready():
            if time.monotonic() >= deadline:
                raise ServiceUnavailableError(
                    f"the prediction service at {_shown(self._url)} was not ready within {timeout_s:g} s: {reason}"
                )
            time.sleep(_READY_PAUSE_S)

    def _get(self, path: str) -> dict[str, Any]:
        return told_of(self._send(self._http.build_request("GET", path)))

    def _unready(self) -> str:
        try:
            told_of(self._http.get("/health/ready"))
        except PredictionServiceError as error:
            return str(error)
        except httpx.RequestError as error:
            return f"no answer ({type(error).__name__})"
        return ""

    def _send(self, request: httpx.Request, timeout_s: float | None = None, deadline_s: float | None = None) -> httpx.Response:
        attempts = _Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s, deadline_s)
        while True:
            attempts.next(request)
            try:
                outcome: httpx.Response | httpx.RequestError = self._http.send(request)
            except httpx.RequestError as error:
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
        request = _predicting(self._http, model, inputs, explain, features)
        return result_of(await self._send(request, timeout_s, deadline_s))

    async def models(self) -> list[dict[str, Any]]:
        """What is served, as `GET /v1/models` tells it."""
        return _listed(await self._get("/v1/models"))

    async def model(self, name: str) -> dict[str, Any]:
        """One model's fields, views, versions and an example, as `GET /v1/models/{model}` tells it."""
        return await self._get(f"/v1/models/{quote(name, safe='')}")

    async def ready(self) -> bool:
        """Whether the service would answer predictions now; False also where nothing answers. Never retries."""
        return not await self._unready()

    async def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Returns once the service is ready; raises ServiceUnavailableError with its reasons where it isn't in time."""
        deadline = time.monotonic() + timeout_s
        while reason := await self._unready():
            if time.monotonic() >= deadline:
                raise ServiceUnavailableError(
                    f"the prediction service at {_shown(self._url)} was not ready within {timeout_s:g} s: {reason}"
                )
            await asyncio.sleep(_READY_PAUSE_S)

    async def _get(self, path: str) -> dict[str, Any]:
        return told_of(await self._send(self._http.build_request("GET", path)))

    async def _unready(self) -> str:
        try:
            told_of(await self._http.get("/health/ready"))
        except PredictionServiceError as error:
            return str(error)
        except httpx.RequestError as error:
            return f"no answer ({type(error).__name__})"
        return ""

    async def _send(self, request: httpx.Request, timeout_s: float | None = None, deadline_s: float | None = None) -> httpx.Response:
        attempts = _Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s, deadline_s)
        while True:
            try:
                async with asyncio.timeout(attempts.next(request)):
                    outcome: httpx.Response | httpx.RequestError = await self._http.send(request)
            except httpx.RequestError as error:
                outcome = error
            except TimeoutError:
                outcome = httpx.ReadTimeout("the answer took longer than the time limit", request=request)
            pause = attempts.pause(outcome)
            if pause is None:
                return _settled(self._url, outcome)
            await asyncio.sleep(pause)
