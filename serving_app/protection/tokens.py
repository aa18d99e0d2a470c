"""Tokens of an OpenID provider (JWT, RFC 7519), checked with the provider's published keys.

Belongs here: what a token must carry, its scopes, tokens remembered once checked. Does not belong here: where the provider's keys come
from (`provider_keys`). PyJWT and cryptography are imported when a service is started that asks for tokens.

As RFC 8725 (JSON Web Token Best Current Practices) asks: the algorithms are ours and not the token's choice (3.1; only those with a
public key, so `none` and HMAC with a public key as the secret are out), issuer and audience are checked (3.8, 3.9).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serving_app.problems import ProblemError, unavailable
from serving_app.protection.callers import EXPIRED, INVALID, NOT_YET, Caller, Unrecognized
from serving_app.protection.limits import TokenBucket

_LONGEST = 8192
_KEPT = 4096
_ACTIONS = ("predict", "metrics", "admin")


@dataclass(frozen=True)
class TokenRules:
    """`leeway_s`: how far the provider's clock may be from ours. `rate_per_s` 0.0: no limit per subject."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    leeway_s: float = 30.0
    rate_per_s: float = 0.0


class TokenVerifier:
    """Recognizes the bearer of a token. Signatures cost a hundred times what the rest does: a checked token is remembered until it expires
    or the provider's keys change.
    """

    def __init__(self, rules: TokenRules) -> None:
        import jwt

        self._jwt = jwt
        self._rules = rules
        self._keys: dict[str, Any] | None = None
        self._checked: dict[bytes, tuple[Caller, float, float]] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self.wanted = False  # a token names a key that is not here: time to ask the provider

    @property
    def ready(self) -> bool:
        return self._keys is not None

    def take_keys(self, document: Mapping[str, Any]) -> int:
        """A JSON Web Key Set (RFC 7517). Returns how many keys can be used; raises ValueError, and keeps those before, where none can."""
        usable = {}
        given = document.get("keys")
        for entry in given if isinstance(given, list) else ():
            if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
                continue
            try:
                key = self._jwt.PyJWK.from_dict(entry)
            except (self._jwt.PyJWTError, ValueError, TypeError):  # of a kind not known here; the others count
                continue
            if key.algorithm_name in self._rules.algorithms:
                usable[str(entry.get("kid", ""))] = key
        if not usable:
            raise ValueError("the provider's document has no key for the algorithms " + ", ".join(self._rules.algorithms))
        if self._keys is None or {n: k.key for n, k in usable.items()} != {n: k.key for n, k in self._keys.items()}:
            self._checked.clear()
        self._keys, self.wanted = usable, False
        return len(usable)

    def recognize(self, text: str, wall_s: float) -> Caller | Unrecognized | ProblemError:
        """The bearer. `wall_s`: Unix time. 503 while the provider's keys were never read: unknown is not invalid."""
        if self._keys is None:
            return unavailable("provider-unknown", "the keys of the identity provider have not been read yet")
        if len(text) > _LONGEST:
            return INVALID
        digest = hashlib.sha256(text.encode()).digest()
        known = self._checked.get(digest)
        if known is None:
            found = self._check(text)
            if isinstance(found, Unrecognized):
                return found
            if len(self._checked) >= _KEPT:
                self._checked.clear()
            known = self._checked[digest] = found
        caller, begins, ends = known
        leeway = self._rules.leeway_s
        if wall_s >= ends + leeway:
            del self._checked[digest]
            return EXPIRED
        return caller if wall_s >= begins - leeway else NOT_YET

    def _check(self, text: str) -> tuple[Caller, float, float] | Unrecognized:
        assert self._keys is not None
        rules = self._rules
        try:
            name = str(self._jwt.get_unverified_header(text).get("kid", ""))
            key = self._keys.get(name)
            if key is None:
                self.wanted = True
                return INVALID
            # Times are checked by whoever remembers the token: each time, and by the clock given.
            claims = self._jwt.decode(
                text,
                key=key,
                algorithms=[key.algorithm_name],
                audience=rules.audience,
                issuer=rules.issuer,
                options={"require": ["exp", "iss", "aud", "sub"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
            )
            begins, ends = float(claims.get("nbf", 0)), float(claims["exp"])
        except (self._jwt.PyJWTError, ValueError, TypeError):
            return INVALID
        if not isinstance(claims["sub"], str):
            return INVALID
        actions, models = understood(claims)
        return Caller(claims["sub"][:128], actions, models, self._bucket(claims["sub"])), begins, ends

    def _bucket(self, subject: str) -> TokenBucket | None:
        """One per subject, not per token: a second token gives nobody a second rate."""
        rate = self._rules.rate_per_s
        if not rate:
            return None
        if subject not in self._buckets:
            if len(self._buckets) >= _KEPT:
                self._buckets.clear()
            self._buckets[subject] = TokenBucket(rate, max(1, int(rate)))
        return self._buckets[subject]


def understood(claims: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str] | None]:
    """Actions and models (None: every one) of a token's scopes: `predict` (every model), `predict:MODEL`, `metrics`, `admin`.

    Scopes stand in `scope`, separated by spaces (RFC 9068, 2.2.3), or in the list or text `scp` some providers write.
    """
    given = claims.get("scope", claims.get("scp", ""))
    scopes: Iterable[Any] = given.split() if isinstance(given, str) else given if isinstance(given, list) else ()
    texts = [scope for scope in scopes if isinstance(scope, str)]
    models = {scope.partition(":")[2] for scope in texts if scope.startswith("predict:")} - {""}
    actions = frozenset(a for a in _ACTIONS if a in texts) | ({"predict"} if models else frozenset())
    return actions, None if "predict" in texts or "*" in models else frozenset(models)
