"""Errors as clients see them: problem details (RFC 9457), never a stack trace.

Belongs here: the kinds of problem, their status codes and the handlers that write them. Does not belong here: deciding when one occurs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
OVERLOADED = "overloaded"  # the kind of the problem a request gets that is turned away for load
_TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Body too slow",
    413: "Body too large",
    414: "Address too long",
    415: "Unsupported media type",
    422: "Invalid input",
    429: "Too many requests",
    431: "Header fields too large",
    500: "Internal error",
    503: "Unavailable",
    504: "Too slow",
}


@dataclass(frozen=True)
class FieldError:
    """What is wrong with one field of one input; `input` is its index, None where the whole body is meant."""

    detail: str
    input: int | None = None
    field: str | None = None


@dataclass
class ProblemError(Exception):
    """An answer other than success. `kind` is the last part of the problem's type, stable for programs to match on."""

    status: int
    kind: str
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail


def invalid_input(errors: list[FieldError]) -> ProblemError:
    """422 naming each input and field at fault."""
    first = errors[0]
    where = "" if first.input is None else f"input {first.input}" + (f", field '{first.field}'" if first.field else "") + ": "
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ProblemError(422, "invalid-input", f"{where}{first.detail}{more}", errors=tuple(errors))


def unavailable(kind: str, detail: str, errors: tuple[FieldError, ...] = (), retry_after_s: int = 1) -> ProblemError:
    """503 with a hint when to come again."""
    return ProblemError(503, kind, detail, errors=errors, headers={"Retry-After": str(retry_after_s)})


def problem_body(status: int, kind: str, detail: str, errors: tuple[FieldError, ...] = (), request_id: str = "") -> bytes:
    body: dict[str, Any] = {
        "type": f"urn:mlplatform:problem:{kind}",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
    }
    if request_id:
        body["request_id"] = request_id
    if errors:
        body["errors"] = [
            {k: v for k, v in (("input", e.input), ("field", e.field), ("detail", e.detail)) if v is not None} for e in errors
        ]
    return orjson.dumps(body)


def problem_response(problem: ProblemError, request_id: str = "") -> Response:
    body = problem_body(problem.status, problem.kind, problem.detail, problem.errors, request_id)
    return Response(body, status_code=problem.status, media_type=MEDIA_TYPE, headers=dict(problem.headers))


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


def install(app: FastAPI) -> None:
    """Registers the handlers of foreseen errors; `middleware` answers what nobody foresaw."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return problem_response(error, _request_id(request))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
        headers = dict(error.headers or {})
        return problem_response(ProblemError(error.status_code, kind, str(error.detail), headers=headers), _request_id(request))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [FieldError(detail=str(e["msg"]), field=".".join(map(str, e["loc"]))) for e in error.errors()]
        return problem_response(invalid_input(found), _request_id(request))

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
