"""Addresses as messages, links and logs may carry them.

Belongs here: taking secrets out of an address. Does not belong here: making or checking addresses (`settings`).
"""

from urllib.parse import urlsplit, urlunsplit


def without_password(address: str) -> str:
    """An address fit for a message: user and password, and a query that may carry a token, are left out."""
    parts = urlsplit(address)
    if not parts.scheme or not parts.netloc:
        return address.split("?", 1)[0]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
