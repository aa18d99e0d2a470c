"""The published keys of an OpenID provider: read from its address or a file, and read again.

Belongs here: when to read, what a failed read means (the keys before stay). Does not belong here: what is done with keys (`tokens`).
"""

import asyncio
import time
from pathlib import Path

import httpx
import orjson
import structlog

from serving_app.protection.tokens import TokenVerifier

log = structlog.get_logger(__name__)

_REFRESH_S = 300.0
_LEAST_PAUSE_S = 10.0  # tokens with made-up key names must not send us to the provider again and again
_LOOK_S = 1.0
_TIMEOUT_S = 5.0
_LARGEST = 1_000_000


def is_address(source: str) -> bool:
    return source.startswith(("https://", "http://"))


class ProviderKeys:
    """`source`: an https address of a JSON Web Key Set, or a file with one."""

    def __init__(self, source: str, verifier: TokenVerifier) -> None:
        self._source = source
        self._verifier = verifier
        self._fault = ""

    async def follow(self) -> None:
        """Reads at once and then every five minutes; every ten seconds while a token names an unknown key or nothing was read yet."""
        while True:
            read_at = time.monotonic()
            await self.read()
            while time.monotonic() - read_at < (_LEAST_PAUSE_S if self._verifier.wanted or not self._verifier.ready else _REFRESH_S):
                await asyncio.sleep(_LOOK_S)

    async def read(self) -> bool:
        """True where it worked. A fault is told in the log once, as long as it stays the same."""
        try:
            document = orjson.loads(await self._fetch())
            keys = self._verifier.take_keys(document if isinstance(document, dict) else {})
        except (httpx.HTTPError, OSError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
            if fault != self._fault:
                log.error("provider_keys_unread", reason=fault, keeping_those_before=self._verifier.ready)
            self._fault, self._verifier.wanted = fault, False
            return False
        if self._fault:
            log.info("provider_keys_read", keys=keys)
        self._fault = ""
        return True

    async def _fetch(self) -> bytes:
        if not is_address(self._source):
            return Path(self._source).read_bytes()
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client, client.stream("GET", self._source) as answer:
            if not answer.is_success:  # httpx's own exception shows the address, which may carry a password
                raise ValueError(f"the provider answered {answer.status_code}")
            parts, size = [], 0
            async for part in answer.aiter_bytes():
                size += len(part)
                if size > _LARGEST:
                    raise ValueError("the provider's document is too long")
                parts.append(part)
        return b"".join(parts)
