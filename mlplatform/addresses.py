"""Addresses as messages, links, logs and urllib may carry them.

Belongs here: taking secrets out of an address. Does not belong here: making or checking addresses (`settings`).
"""

from base64 import b64encode
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request


def without_password(address: str) -> str:
    """An address fit for a message: user and password, and a query that may carry a token, are left out."""
    parts = urlsplit(address)
    if not parts.scheme or not parts.netloc:
        return address.split("?", 1)[0]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def request_of(address: str) -> Request:
    """A GET of an http address for urllib, which takes a user and password in it for a part of the host's name."""
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return Request(address)  # noqa: S310 - whoever opens it sees to the scheme
    name, _, password = user.partition(":")
    secret = b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    bare = urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))
    return Request(bare, headers={"Authorization": f"Basic {secret}"})  # noqa: S310 - as above
