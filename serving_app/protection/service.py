"""The protection of one application: made from its settings, kept up to date while it runs.

Belongs here: putting the parts together, and the work beside the requests. Does not belong here: a rule.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError

from mlplatform.access_keys import KeysFileError
from serving_app.protection.admission import Admission
from serving_app.protection.callers import KeyRing
from serving_app.protection.counters import Refusals, loop_delays
from serving_app.protection.deadlines import Deadlines
from serving_app.protection.gate import Gate
from serving_app.protection.guard import Guard, Recognize
from serving_app.protection.provider_keys import ProviderKeys, is_address
from serving_app.protection.quotas import Pipelines, QuotaExchange
from serving_app.protection.tokens import TokenRules, TokenVerifier
from serving_app.settings import ServingSettings
from serving_app.tallies import TallyHistogram

_HEARTBEAT_S = 0.01
_UPKEEP_S = 1.0
# OWASP's REST Security Cheat Sheet.
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"))
_HSTS = (b"strict-transport-security", b"max-age=31536000")

log = structlog.get_logger(__name__)


class Protection:
    """Made with the application, open while it runs. `gate` is None before and after: then nothing is answered. `turned_away` counts
    connections refused before there was a request, by reason."""

    def __init__(self) -> None:
        self.turned_away: Callable[[str], None] = lambda reason: None
        self.gate: Gate | None = None
        self.origins: tuple[str, ...] = ()
        self.headers: tuple[tuple[bytes, bytes], ...] = _HEADERS

    @asynccontextmanager
    async def open(self, settings: ServingSettings, redis: Pipelines, registry: CollectorRegistry) -> AsyncIterator[None]:
        """Raises KeysFileError where keys are to be asked for and there are none."""
        admission = Admission(settings.serving_in_work, settings.serving_queue_target_s, buffer_bytes=settings.serving_buffer_limit)
        refusals = Refusals(registry, admission)
        work: list[Coroutine[Any, Any, None]] = []
        recognize: Recognize | None = None
        if settings.serving_auth == "keys":
            ring = KeyRing(settings.keys_file)
            recognize = ring.recognize
            work.append(_keep(ring, QuotaExchange(redis)))
        elif settings.serving_auth == "jwt":
            verifier = TokenVerifier(_rules(settings))
            recognize = verifier.recognize
            work.append(ProviderKeys(settings.serving_jwt_keys, verifier).follow())
        guard = Guard(admission, recognize, settings.trusted_networks, settings.serving_metrics_open, refusals.count)
        work.append(_watch_loop(admission, loop_delays(registry)))  # not before all that may raise: a coroutine made is to be run
        deadlines = Deadlines(settings.serving_body_timeout_s, settings.serving_request_timeout_s)
        self.origins = settings.cors_origins
        self.headers = (*_HEADERS, _HSTS) if settings.serving_tls_certificate else _HEADERS
        work.append(_sweep(deadlines))
        tasks = [asyncio.create_task(each) for each in work]
        self.gate = Gate(guard, deadlines)
        self.turned_away = refusals.count_connection
        try:
            yield
        finally:
            self.gate = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class CredentialsError(Exception):
    """What callers are to be recognized by cannot be read; the message names the file, and what to do."""


def check_credentials(settings: ServingSettings) -> None:
    """Raises CredentialsError where a file is missing or spoilt that a start needs. A provider's address may be away for a while."""
    if settings.serving_auth == "keys":
        try:
            KeyRing(settings.keys_file)
        except KeysFileError as error:
            raise CredentialsError(f"{error}; `mlplatform keys create NAME --file {settings.keys_file}` makes one") from error
    elif settings.serving_auth == "jwt" and not is_address(settings.serving_jwt_keys):
        path = Path(settings.serving_jwt_keys)
        try:
            document = json.loads(path.read_bytes())
            TokenVerifier(_rules(settings)).take_keys(document if isinstance(document, dict) else {})
        except OSError as error:
            why = f"cannot be read: {error.strerror or type(error).__name__}"
        except ValueError as error:
            why = f"is no JSON Web Key Set: {error}"
        else:
            return
        raise CredentialsError(f"MLPLATFORM_SERVING_JWT_KEYS: the file {path} {why}")


def _rules(settings: ServingSettings) -> TokenRules:
    return TokenRules(
        settings.serving_jwt_issuer,
        settings.serving_jwt_audience,
        settings.jwt_algorithms,
        settings.serving_jwt_leeway_s,
        settings.serving_jwt_rate_per_s,
    )


async def _watch_loop(admission: Admission, delays: TallyHistogram) -> None:
    """Tells the admission and Prometheus what a request waits before its own code runs, by going the same way: due at some moment, met
    in the turn of the event loop that is free then, run in the turn after (uvicorn reads a request in one and starts its task in the
    next).
    """
    while True:
        due = time.monotonic() + _HEARTBEAT_S
        await asyncio.sleep(_HEARTBEAT_S)
        await asyncio.sleep(0)
        now = time.monotonic()
        delay_s = max(0.0, now - due)
        admission.observe(delay_s, now, time.process_time())
        delays.observe((), delay_s)


async def _sweep(deadlines: Deadlines) -> None:
    while True:
        await asyncio.sleep(deadlines.every_s)
        deadlines.sweep(time.monotonic())


async def _keep(ring: KeyRing, exchange: QuotaExchange) -> None:
    """Keys and quotas, once a second. Redis away is no reason to stop: the next exchange makes up for it."""
    failing = False
    while True:
        await asyncio.sleep(_UPKEEP_S)
        ring.refresh()
        try:
            await exchange.exchange(ring.callers)
            failing = False
        except (RedisError, OSError, TimeoutError) as error:
            if not failing:
                log.warning("quotas_not_exchanged", reason=type(error).__name__)
            failing = True
