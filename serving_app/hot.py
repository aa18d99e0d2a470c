"""The hot route: `POST /v1/models/{model}/predict` answered in front of FastAPI.

Belongs here: recognising the request, and HTTP around `Predictor.answer`. Does not belong here: everything else, which goes on
to FastAPI, where the same route is declared (`routes.predict`): it documents this one and answers what this one leaves alone.

FastAPI's own way through routing, dependencies and response classes costs 50 to 65 µs a request, as much as all of ours.
"""

from collections.abc import Callable
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from serving_app.body import read_body
from serving_app.predictor import Predictor
from serving_app.problems import MEDIA_TYPE, ProblemError, problem_body

_BEFORE, _AFTER = "/v1/models/", "/predict"
_JSON = (b"content-type", b"application/json")


class HotRoute:
    """ASGI: answers plain prediction requests, hands all others to `app`.

    `predictor` gives the running application's predictor, None before it has started; `body_limit` in bytes likewise.
    """

    def __init__(self, app: ASGIApp, predictor: Callable[[], tuple[Predictor, int] | None]) -> None:
        self._app = app
        self._predictor = predictor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        running = self._predictor()
        model = path[len(_BEFORE) : -len(_AFTER)]
        if running is None or not (path.startswith(_BEFORE) and path.endswith(_AFTER)) or "/" in model or scope["query_string"]:
            await self._app(scope, receive, send)
            return
        await _answer(running[0], running[1], model, scope, receive, send)


async def _answer(predictor: Predictor, body_limit: int, model: str, scope: Scope, receive: Receive, send: Send) -> None:
    request_id: str = scope["state"]["request_id"]
    status, headers = 200, [_JSON]
    try:
        with predictor.exchange(model, request_id) as exchange:
            body = await predictor.respond(exchange, partial(read_body, scope["headers"], receive, body_limit))
    except ProblemError as problem:
        status = problem.status
        body = problem_body(status, problem.kind, problem.detail, problem.errors, request_id)
        headers = [(b"content-type", MEDIA_TYPE.encode()), *((k.lower().encode(), v.encode()) for k, v in problem.headers.items())]
    except ClientDisconnect:
        return  # nobody is left to answer
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
