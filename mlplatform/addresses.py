"""Addresses as messages, links, logs and urllib may carry them.

Belongs here: taking secrets out of an address, to leave them out or to send them as a header. Does not belong here: making or checking
addresses (`settings`).
"""

from base64 import b64encode
from urllib.parse import unquote, urlsplit, urlunsplit


def without_password(address: str) -> str:
    """An address fit for a message: user and password, and a query that may carry a token, are left out."""
    parts = urlsplit(address)
    if not parts.scheme or not parts.netloc:
        return address.split("?", 1)[0]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def with_credentials_apart(address: str) -> tuple[str, dict[str, str]]:
    """The address without user and password, and the header that carries them (RFC 7617): urllib takes them for a part of the host."""
    parts = urlsplit(address)
    given, at, host = parts.netloc.rpartition("@")
    if not at:
        return address, {}
    user, _, password = given.partition(":")
    token = b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"authorization": f"Basic {token}"}
