"""Peers without a model: what uvicorn alone, and FastAPI on it, can answer on this machine.

Belongs here: two applications, made by `uvicorn --factory`. Does not belong here: starting them (`contenders`).
"""

from typing import Any

from fastapi import FastAPI

_BODY = b'{"ok":true}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


def fastapi() -> FastAPI:
    """A route that returns a dict, as in FastAPI's own first steps."""
    app = FastAPI()

    @app.get("/hello")
    async def hello() -> dict[str, bool]:
        return {"ok": True}

    return app


def asgi() -> Any:
    """No framework: an ASGI function that answers everything with the same bytes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for done in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": done})
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _BODY})

    return app
