"""Who asks: what a caller may do, and the ring of API keys that recognizes one.

Belongs here: the credential in a request's headers, keys compared in constant time, the file read again when it changes. Does not
belong here: the form of keys and file (`mlplatform.access_keys`), tokens (`tokens`), what to answer (`guard`).
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path

import structlog

from mlplatform.access_keys import EVERY_MODEL, AccessKey, KeysFileError, hash_secret, read, taken_apart
from serving_app.protection.limits import DailyQuota, TokenBucket
from serving_app.protection.needs import Need

log = structlog.get_logger(__name__)

_NOBODYS = hash_secret("")  # compared with where the id is unknown, so that both refusals take the same time


@dataclass(slots=True, eq=False)
class Caller:
    """Someone recognized. `models` None: every model. The limits are counted on, and shared by all of the caller's requests."""

    id: str
    actions: frozenset[str]
    models: frozenset[str] | None = None
    bucket: TokenBucket | None = None
    quota: DailyQuota | None = None

    def may(self, need: Need) -> bool:
        if need.kind == "about":
            return True
        if need.kind == "predict":
            return "predict" in self.actions and (self.models is None or need.model in self.models)
        if need.kind == "unknown":
            return self.models is None
        return need.kind in self.actions


class Unrecognized(str):
    """Why a credential was not accepted, fit for the client: it tells nothing that the client did not send. `caller`: whose it was, for
    the service's own log."""

    caller: str | None = None

    def of(self, caller: Caller) -> "Unrecognized":
        told = Unrecognized(self)
        told.caller = caller.id
        return told


INVALID = Unrecognized("the credential is not valid")
EXPIRED = Unrecognized("the credential has expired")
NOT_YET = Unrecognized("the credential is not valid yet")
REVOKED = Unrecognized("the credential was revoked")
MISSING = Unrecognized("send a credential: `Authorization: Bearer …` or `X-API-Key: …`")
AMBIGUOUS = Unrecognized("send one credential, not several")


def credential(headers: Iterable[tuple[bytes, bytes]]) -> str | Unrecognized:
    """The one credential in the headers of a request (names in lower case, as ASGI gives them)."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            if scheme.lower() != b"bearer":
                return INVALID
            value = given.strip()  # noqa: PLW2901  # the credential without its scheme
        elif name != b"x-api-key":
            continue
        if found is not None:
            return AMBIGUOUS
        found = value
    if found is None:
        return MISSING
    # A str subclass would answer for INVALID; plain text only. Latin-1 decodes every byte, and no key matches the odd ones.
    return found.decode("latin-1") or INVALID


@dataclass(slots=True, eq=False)
class _Held:
    caller: Caller
    begins: float
    ends: float
    revoked: bool
    secrets: list[tuple[str, float]]  # hash, until


class KeyRing:
    """The keys of a file. A file that turns unreadable leaves the keys as they were, and is told in the log."""

    def __init__(self, path: Path) -> None:
        """Raises KeysFileError: a service that is to ask for keys does not start without them."""
        self._path = path
        self._held: dict[str, _Held] = {}
        self._seen: tuple[int, int, int] | None = None
        self._fault = ""
        self._take(read(path).keys)
        self._seen = _look(path)

    @property
    def callers(self) -> list[Caller]:
        return [held.caller for held in self._held.values()]

    def refresh(self) -> bool:
        """Reads the file again where it was changed; True where that changed the keys."""
        seen = _look(self._path)
        if seen is not None and seen == self._seen:
            return False
        try:
            keys = read(self._path).keys
        except KeysFileError as error:
            if str(error) != self._fault:  # once, not every second
                self._fault = str(error)
                log.error("keys_unreadable", reason=self._fault, keeping=len(self._held))
            return False
        self._take(keys)
        self._seen, self._fault = seen, ""
        log.info("keys_read", keys=len(keys))
        return True

    def recognize(self, text: str, wall_s: float) -> Caller | Unrecognized:
        """The caller whose key this is. `wall_s`: Unix time."""
        parts = taken_apart(text)
        if parts is None:
            return INVALID
        held = self._held.get(parts[0])
        digest = hash_secret(parts[1])
        matched = False
        for known, until in held.secrets if held else ((_NOBODYS, -inf),):
            matched |= hmac.compare_digest(known, digest) and wall_s < until
        if held is None or not matched:
            return INVALID
        if held.revoked:
            return REVOKED.of(held.caller)
        if wall_s < held.begins:
            return NOT_YET.of(held.caller)
        return held.caller if wall_s < held.ends else EXPIRED.of(held.caller)

    def _take(self, keys: Iterable[AccessKey]) -> None:
        """Limits go on counting where they did not change: a rotation gives nobody a fresh quota."""
        before = self._held
        self._held = {key.id: _hold(key, before.get(key.id)) for key in keys}


def _hold(key: AccessKey, before: _Held | None) -> _Held:
    old = before.caller if before else None
    bucket = None
    if key.rate_per_s is not None:
        burst = key.burst or max(1, int(key.rate_per_s))
        same = old is not None and old.bucket is not None and (old.bucket.rate_per_s, old.bucket.burst) == (key.rate_per_s, burst)
        bucket = old.bucket if same and old else TokenBucket(key.rate_per_s, burst)
    quota = None
    if key.daily_quota is not None:
        quota = old.quota if old and old.quota else DailyQuota(key.daily_quota)
        quota.limit = key.daily_quota
    caller = Caller(key.id, frozenset(key.actions), None if EVERY_MODEL in key.models else frozenset(key.models), bucket, quota)
    return _Held(
        caller,
        begins=_seconds(key.not_before, -inf),
        ends=_seconds(key.expires_at, inf),
        revoked=key.revoked_at is not None,
        secrets=[(s.sha256, _seconds(s.until, inf)) for s in key.secrets],
    )


def _seconds(at: datetime | None, otherwise: float) -> float:
    return at.timestamp() if at is not None else otherwise


def _look(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; the file is replaced, so its number changes even within one tick of its time."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
