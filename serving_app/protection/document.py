"""What the OpenAPI document says of the protection: credentials, and the answers any operation may give because of it.

Belongs here: additions to the finished document. Does not belong here: the operations (`schemas`).
"""

from typing import Any

from serving_app.problems import MEDIA_TYPE
from serving_app.protection.needs import need_of

_PROBLEM = {"$ref": "#/components/schemas/ProblemDetail"}
_RETRY = {
    "Retry-After": {"description": "Seconds to wait before the same request may succeed", "schema": {"type": "integer", "minimum": 0}}
}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to authenticate (RFC 6750)", "schema": {"type": "string"}}}
_ALLOW = {"Allow": {"description": "The methods it takes (RFC 9110)", "schema": {"type": "string"}}}

_EVERYWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("Not an HTTP request this service understands", {}),
    "401": ("No credential, or one that is not valid", _CHALLENGE),
    "403": ("The credential is valid, but not for this", {}),
    "405": ("The address does not take this method", _ALLOW),
    "408": ("The request did not arrive in time", {}),
    "414": ("The address is too long", {}),
    "429": ("The credential's rate or daily quota is used up", _RETRY),
    "431": ("The header fields are too long or too many", {}),
    "500": ("The service failed; its log holds the cause", {}),
    "503": ("Not ready, or more requests than can be answered in time", _RETRY),
    "504": ("The answer took longer than a request may take", {}),
}
_METHODS = ("get", "post", "put", "delete", "patch", "head", "options")


def describe(document: dict[str, Any]) -> None:
    """Adds to a document, in place. Health is exempt from credentials and limits, so there 401, 403, 429 and 504 cannot come."""
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "An API key or a token, as the service is configured"}
    schemes["key"] = {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key"}
    for path, operations in document["paths"].items():
        kind = need_of(path.replace("{model}", "m")).kind
        exempt = kind == "health"
        for method, operation in operations.items():
            if method not in _METHODS:
                continue
            # `{}`: without a credential, which is enough where the service asks for none.
            operation["security"] = [] if exempt or kind == "hook" else [{"bearer": []}, {"key": []}, {}]
            for status, (text, headers) in _EVERYWHERE.items():
                if exempt and status in ("401", "403", "429", "504"):
                    continue
                answer = operation["responses"].setdefault(status, {"description": text, "content": {MEDIA_TYPE: {"schema": _PROBLEM}}})
                if headers:
                    answer["headers"] = headers
