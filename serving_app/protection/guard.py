"""May this request be answered? One synchronous question per request.

Belongs here: the order of the checks and the refusals. Does not belong here: the checks themselves, sending an answer.
Order: who asks, what he may, whether the service can take it, how much of it he has left. So a request that is refused for load costs
its caller nothing, and a stranger learns nothing of the load.
"""

import ipaddress
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from serving_app.problems import OVERLOADED, ProblemError, unavailable
from serving_app.protection.admission import Admission
from serving_app.protection.callers import MISSING, Caller, Unrecognized, credential
from serving_app.protection.needs import Need, need_of

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Near = Literal["trusted", "loopback", "far"]
Recognize = Callable[[str, float], Caller | Unrecognized | ProblemError]

_KEPT = 1024  # paths and addresses remembered; both come from outside, so the memory for them has an end
_ALL = frozenset({"predict", "metrics", "admin"})
_NOT_FOR_THIS = "the credential is valid, but not for this"
_REALM = 'Bearer realm="predictions"'
_HARMLESS = ("GET", "HEAD", "OPTIONS")
_TELLING = frozenset({b"host", b"forwarded", b"x-forwarded-for", b"x-real-ip"})
_HERE = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Allowed:
    """A request that may go on. `exempt`: it takes no place in the admission, and no time limit holds for it."""

    caller: Caller
    exempt: bool = False


_HEALTH = Allowed(Caller("health", frozenset()), exempt=True)
_UNASKED = Allowed(Caller("unasked", frozenset()))
_ONLY_HERE = (
    "without authentication the service answers callers on its own machine only: set MLPLATFORM_SERVING_AUTH to keys or jwt, or, "
    "behind a proxy that authenticates, MLPLATFORM_SERVING_TRUSTED_PROXIES"
)
OPEN = Allowed(Caller("open", _ALL))


class Guard:
    """`recognize` None: open to callers on this machine and to `trusted` networks, closed to all others."""

    def __init__(
        self,
        admission: Admission,
        recognize: Recognize | None,
        trusted: Sequence[Network] = (),
        metrics_open: bool = False,
        count: Callable[[str], None] = lambda reason: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.admission = admission
        self._recognize = recognize
        self._trusted = trusted
        self._metrics_open = metrics_open
        self._count = count
        self._wall = wall
        self._needs: dict[str, Need] = {}
        self._near: dict[str, Near] = {}
        self._hosts: set[bytes] = set()
        self._allowed: dict[Caller, Allowed] = {}

    def check(self, scope: Mapping[str, Any], now: float) -> Allowed | ProblemError:
        """`scope`: of ASGI, type http; whoever is recognized stands in its state from then on, refused or not. `now`: monotonic seconds."""
        need = self._need(scope)
        if need.kind == "health":
            return _HEALTH
        found = self._who(scope, need)
        if isinstance(found, ProblemError):
            return found
        caller = found.caller
        scope["state"]["caller"] = caller.id
        if self.admission.full and need.kind != "metrics":  # under load the figures are what one wants
            self.admission.refuse()
            return self.overloaded()
        if caller.bucket is not None and (wait := caller.bucket.take(now)):
            return self._refuse("rate-limited", 429, "the key's rate of requests is used up", {"Retry-After": str(ceil(wait))})
        if caller.quota is not None and (wait := caller.quota.take(self._wall())):
            return self._refuse("quota-used-up", 429, "the key's requests of this day (UTC) are used up", {"Retry-After": str(ceil(wait))})
        # Else the gate would ask it for a place of its own.
        return replace(found, exempt=True) if need.kind == "metrics" else found

    def overloaded(self) -> ProblemError:
        return self.counted(unavailable(OVERLOADED, "the service has more requests than it can answer in time: come again later"))

    def counted(self, refused: ProblemError) -> ProblemError:
        """The same, counted among the refusals: for what a request is refused for only after it was let in."""
        self._count(refused.kind)
        return refused

    def _need(self, scope: Mapping[str, Any]) -> Need:
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root):  # as Starlette's routes see it
            path = path[len(root) :]
        need = self._needs.get(path)
        if need is None:
            need = need_of(path)
            if len(self._needs) >= _KEPT:
                self._needs.clear()
            self._needs[path] = need
        return need

    def _who(self, scope: Mapping[str, Any], need: Need) -> Allowed | ProblemError:
        if self._recognize is None:
            if self._is_near(scope):
                return OPEN
            return self._refuse("open-only-here", 403, _ONLY_HERE)
        if need.kind in ("page", "hook") or (need.kind == "metrics" and self._metrics_open):
            return _UNASKED
        text = credential(scope["headers"])
        found = text if isinstance(text, Unrecognized) else self._recognize(text, self._wall())
        if isinstance(found, Caller):
            scope["state"]["caller"] = found.id
            return self._remember(found) if found.may(need) else self._refuse("not-allowed", 403, _NOT_FOR_THIS)
        if isinstance(found, ProblemError):
            return self.counted(found)
        scope["state"]["caller"] = found.caller  # who still sends a key that was revoked
        # RFC 6750, 3.1: no error code where no credential was sent.
        challenge = _REALM if found is MISSING else f'{_REALM}, error="invalid_token"'
        return self._refuse("not-authenticated", 401, str(found), {"WWW-Authenticate": challenge})

    def _is_near(self, scope: Mapping[str, Any]) -> bool:
        """A Unix socket has no client address; the rights of its file say who may connect."""
        client = scope.get("client")
        if client is None:
            return True
        host: str = client[0]
        near = self._near.get(host)
        if near is None:
            near = nearness(host, self._trusted)
            if len(self._near) >= _KEPT:
                self._near.clear()
            self._near[host] = near
        return near == "trusted" or (near == "loopback" and not self._speaks_for_others(scope["headers"]))

    def _speaks_for_others(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """A request that comes over loopback, but not from here: a proxy nobody declared passes it on, or a web page whose name was made
        to point here (DNS rebinding) sends it.
        """
        for name, value in headers:
            if name in _TELLING and (name != b"host" or value not in self._hosts):
                if name != b"host" or not _HERE.fullmatch(value):
                    return True
                if len(self._hosts) >= _KEPT:
                    self._hosts.clear()
                self._hosts.add(value)
        return False

    def _remember(self, caller: Caller) -> Allowed:
        allowed = self._allowed.get(caller)
        if allowed is None:
            if len(self._allowed) >= _KEPT:
                self._allowed.clear()
            allowed = self._allowed[caller] = Allowed(caller)
        return allowed

    def _refuse(self, kind: str, status: int, detail: str, headers: Mapping[str, str] | None = None) -> ProblemError:
        return self.counted(ProblemError(status, kind, detail, headers=headers or {}))


def has_no_body(scope: Mapping[str, Any]) -> bool:
    return scope["method"] in _HARMLESS


def nearness(host: str, trusted: Sequence[Network]) -> Near:
    """Where a connection comes from: one of the networks declared, this machine's loopback, or elsewhere."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "far"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if any(address in network for network in trusted):
        return "trusted"
    return "loopback" if address.is_loopback else "far"
