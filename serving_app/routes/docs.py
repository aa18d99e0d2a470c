"""The API's own page, which works without any network: plain HTML and script served from here.

Belongs here: handing out the page. Does not belong here: the OpenAPI document (`schemas`). FastAPI's stock page loads
Swagger UI from a CDN, and no installed package ships its files.
"""

from functools import lru_cache
from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse

router = APIRouter(include_in_schema=False)

_POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'"
_KINDS = {"docs.html": "text/html; charset=utf-8", "docs.css": "text/css; charset=utf-8", "docs.js": "text/javascript; charset=utf-8"}


@router.get("/")
async def root() -> RedirectResponse:
    return RedirectResponse("docs")


@router.get("/docs")
async def page() -> Response:
    return _file("docs.html")


@router.get("/docs.css")
async def styles() -> Response:
    return _file("docs.css")


@router.get("/docs.js")
async def script() -> Response:
    return _file("docs.js")


def _file(name: str) -> Response:
    return Response(_content(name), headers={"content-type": _KINDS[name], "content-security-policy": _POLICY, "cache-control": "no-cache"})


@lru_cache(maxsize=len(_KINDS))
def _content(name: str) -> bytes:
    return (files("serving_app") / "static" / name).read_bytes()
