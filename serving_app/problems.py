"""Errors as clients see them: problem details (RFC 9457), never a stack trace.

Belongs here: the kinds of problem, their status codes and the handlers that write them. Does not belong here: deciding when one occurs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    408: "Request too slow",
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
# mlflow/exceptions.py: its names for what went wrong.
_MLFLOW_CODES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
}
_NO_MORE: Mapping[str, str] = {}


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


def not_running() -> ProblemError:
    return unavailable("not-running", "the service starts or stops")


def bad_request(problem: ProblemError) -> ProblemError:
    """The same refusal with the status 400, which other protocols give where ours says 422."""
    return replace(problem, status=400) if problem.status == 422 else problem


def dialect(scope: Mapping[str, Any], status: int, detail: str) -> dict[str, str]:
    """Members that a problem carries besides its own, because clients of the path's protocol look for them: `error` (Open
    Inference Protocol), `error_code` and `message` (MLflow). RFC 9457, 3.2, allows both in one document."""
    path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": detail}
    if path.startswith("/v1/models/") and path.endswith("/invocations"):
        return {"error_code": _MLFLOW_CODES.get(status, "INTERNAL_ERROR" if status >= 500 else "BAD_REQUEST"), "message": detail}
    return {}


UNFORESEEN = ProblemError(500, "internal-error", "the service failed on this request; its log holds the cause under this request id")


def problem_body(
    status: int, kind: str, detail: str, errors: tuple[FieldError, ...] = (), request_id: str = "", more: Mapping[str, str] = _NO_MORE
) -> bytes:
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
    return orjson.dumps({**body, **more})


def problem_response(problem: ProblemError, request: Request) -> Response:
    more = dialect(request.scope, problem.status, problem.detail)
    body = problem_body(problem.status, problem.kind, problem.detail, problem.errors, _request_id(request), more)
    return Response(body, status_code=problem.status, media_type=MEDIA_TYPE, headers=dict(problem.headers))


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


def no_parameters(request: Request) -> None:
    """For addresses that take no query parameter: one that is silently ignored is taken for one that works. Raises a 422 problem."""
    if unknown := sorted(set(request.query_params)):
        raise invalid_input([_unknown_parameter(name) for name in unknown[:10]])


def _parameter(told: Mapping[str, Any]) -> FieldError:
    """What pydantic found of a request's parameters, with their place and name in the text."""
    place, *names = (str(part) for part in told["loc"])
    name = ".".join(names)
    if told["type"] == "extra_forbidden" and place == "query":
        return _unknown_parameter(name)
    return FieldError(f"{place} parameter '{name[:64]}': {told['msg']}", field=f"{place}.{name}")


def _unknown_parameter(name: str) -> FieldError:
    return FieldError(f"query parameter '{name[:64]}' is not known here", field=f"query.{name[:64]}")


def install(app: FastAPI) -> None:
    """Registers the handlers of errors within the application; `middleware` answers what fails in front of it."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return problem_response(error, request)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
        headers = dict(error.headers or {})
        path, detail = request.url.path[:64], str(error.detail)
        if error.status_code == 404:
            detail = f"there is nothing at {path}; /openapi.json lists the addresses"
        elif error.status_code == 405:
            detail = f"{path} takes {headers.get('Allow', 'another method')}, not {request.method[:16]}"
        return problem_response(ProblemError(error.status_code, kind, detail, headers=headers), request)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_response(invalid_input([_parameter(told) for told in error.errors()]), request)

    async def on_unforeseen(request: Request, error: Exception) -> Response:
        return problem_response(UNFORESEEN, request)  # raised on afterwards, to the log

    app.add_exception_handler(Exception, on_unforeseen)
    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
