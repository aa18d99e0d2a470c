"""A request's body as bytes, within its limits.

Belongs here: media type, size, reading. Does not belong here: what the bytes mean.
"""

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from serving_app.problems import ProblemError

_JSON = b"application/json"


async def read_body(headers: list[tuple[bytes, bytes]], receive: Receive, limit: int, also: tuple[bytes, ...] = ()) -> bytes:
    """The body of a JSON request, or of one of the media types in `also`, sent as it is. Raises ProblemError (413, 415),
    ClientDisconnect where the caller left."""
    for name, value in headers:
        if name == b"content-type":
            if value != _JSON and (kind := value.partition(b";")[0].strip().lower()) != _JSON and kind not in also:
                wanted = b", ".join((_JSON, *also)).decode()
                raise ProblemError(415, "unsupported-media-type", f"send {wanted}, not {value[:64].decode('latin-1')!r}")
            if value != _JSON and _charset(value.decode("latin-1")) not in ("", "utf-8", "utf8"):
                raise ProblemError(415, "unsupported-media-type", "only UTF-8 is read")
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            # RFC 9110, 15.5.16: the refusal names what is taken.
            refused = "compressed bodies are not taken"
            raise ProblemError(415, "unsupported-media-type", refused, headers={"Accept-Encoding": "identity"})
        elif name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(limit)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False) and len(body) <= limit:
        return body
    return await _read_rest(message, receive, limit)


async def _read_rest(message: Message, receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        if size > limit:  # a chunked body does not announce its size
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


def _too_large(limit: int) -> ProblemError:
    return ProblemError(413, "body-too-large", f"a body may have at most {limit} bytes", headers={"Connection": "close"})


def _charset(content_type: str) -> str:
    """The character set a content type names, lower case; '' where it names none."""
    parts = content_type.split(";")[1:]
    named = [value.strip().strip('"').lower() for name, _, value in (p.partition("=") for p in parts) if name.strip().lower() == "charset"]
    return named[0] if named else ""
