"""A lease in Redis: of several processes one holds it, for a few seconds at a time, and everybody can see which.

Belongs here: taking, renewing, giving back, telling the holder. Does not belong here: what the holder may do alone.

The server's clock decides, in one script, so that the clocks of the machines do not matter. A lease keeps *most* work from being
done twice; it cannot stop a process that was halted between looking and writing (Kleppmann, "How to do distributed
locking", 2016), so what is written must be safe without it. The key stays after its end: it tells who was last, and a
holder whose lease ran out learns whether anybody held it in between.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from redis.exceptions import RedisError

from mlplatform.feature_store.commands import Client

# KEYS: the lease. ARGV: token, holder, note, milliseconds, '1' to renew only. Gives {1, number}, or {0, holder}.
_TAKE = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'token', 'until', 'number', 'holder', 'since')
local mine = held[1] == ARGV[1]
if not mine and (ARGV[5] == '1' or (held[1] and tonumber(held[2]) > now)) then return {0, held[4] or ''} end
local number, since = held[3], held[5]
if not mine then number, since = (tonumber(held[3]) or 0) + 1, string.format('%.0f', now) end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'holder', ARGV[2], 'note', ARGV[3], 'since', since,
  'until', string.format('%.0f', now + ARGV[4]), 'number', number)
return {1, tonumber(number)}
"""
_RELEASE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'until', '0')
return 1
"""

_LEFT_MS = """
local t = redis.call('TIME')
return (tonumber(redis.call('HGET', KEYS[1], 'until')) or 0) - (t[1] * 1000 + math.floor(t[2] / 1000))
"""


class LeaseHeldError(RuntimeError):
    """Somebody else holds it; names the holder."""

    def __init__(self, key: str, holder: str) -> None:
        super().__init__(f"{key} is held by {holder}")
        self.holder = holder


class LeaseLostError(RuntimeError):
    """This process held it and may not go on: it ran out, or somebody else has it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, or held it last where `left_s` is 0. `number` counts the holders so far."""

    name: str
    note: Mapping[str, Any]
    number: int
    since: datetime
    left_s: float

    @property
    def holds(self) -> bool:
        return self.left_s > 0


def this_process() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"


class Lease:
    """One process's side of a lease of `ttl_s` seconds. `note`: what others should know of the holder, JSON-able.

    A thread renews it three times as often as needed, so that one long step does not lose it; a process that is halted or cut
    off from Redis does, and one that has neither taken nor checked it for `hung_s`. Once released it is not taken again.
    """

    def __init__(self, client: Client, key: str, ttl_s: float, hung_s: float = 900.0) -> None:
        self.key, self.ttl_s, self.hung_s = key, ttl_s, hung_s
        self._used = time.monotonic()
        self.note: Mapping[str, Any] = {}
        self.name = this_process()
        self._client = client
        self._token = secrets.token_hex(16)
        self._until = float("-inf")  # of the monotonic clock: before it nobody else can hold the lease
        self._number: int | None = None
        self._renewing: threading.Thread | None = None
        self._ended = threading.Event()

    def take(self) -> int:
        """Takes the lease or renews it. Returns its number: the same one as long as nobody else held it.

        Raises LeaseHeldError, RedisError.
        """
        self._used = time.monotonic()
        self._number = self._ask(renew=False)
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name=f"renew {self.key}", daemon=True)
            self._renewing.start()
        return self._number

    def check(self) -> None:
        """Raises LeaseLostError where somebody else may hold it by now. Asks nobody."""
        self._used = time.monotonic()
        if self._used >= self._until:
            raise LeaseLostError(f"{self.key} is no longer this process's: it was not renewed for {self.ttl_s:g} s, or taken over")

    def release(self) -> None:
        """Gives it back, so that whoever waits need not wait for its end. Raises RedisError."""
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join()
            self._until = float("-inf")
            cast(Any, self._client).eval(_RELEASE, 1, self.key, self._token)

    def _ask(self, *, renew: bool) -> int:
        asked = time.monotonic()  # before: the server counts from when it answered
        arguments = (self._token, self.name, json.dumps(self.note), int(self.ttl_s * 1000), "1" if renew else "0")
        mine, told = cast(Any, self._client).eval(_TAKE, 1, self.key, *arguments)
        if not mine:
            self._until = float("-inf")
            raise LeaseHeldError(self.key, _text(told) or "nobody known")
        self._until = asked + self.ttl_s
        return int(told)

    def _renew(self) -> None:
        while not self._ended.wait(self.ttl_s / 3):
            if self._until == float("-inf") or time.monotonic() - self._used > self.hung_s:
                continue  # not held: taking it is `take`'s; or nobody works under it
            try:
                self._ask(renew=True)
            except (RedisError, OSError, LeaseHeldError):
                continue  # `check` tells when the time is over


def holder_of(client: Client, key: str) -> Holder | None:
    """Who holds the lease, or held it last; None where nobody ever did. Raises RedisError."""
    asker = cast(Any, client)
    fields = {_text(name): _text(value) for name, value in asker.hgetall(key).items()}
    if not fields:
        return None
    left_ms = asker.eval(_LEFT_MS, 1, key)
    since = datetime.fromtimestamp(int(fields["since"]) / 1000, UTC)
    return Holder(fields["holder"], json.loads(fields["note"]), int(fields["number"]), since, max(0.0, left_ms / 1000))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
