"""Daily quotas over all replicas, exchanged through Redis off the request path.

Belongs here: telling Redis what this process counted, learning what others did. Does not belong here: counting (`limits`).
Each process writes its own number, not an increase of a common one: a write repeated after a lost answer changes nothing.
"""

import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from serving_app.protection.callers import Caller
from serving_app.protection.limits import DAY_S, day_name

_KEPT_S = 2 * DAY_S


def quota_key(caller_id: str, day: int) -> str:
    """A Redis hash: process → requests it took on the day. It expires by itself."""
    return f"mlplatform:quota:{day_name(day)}:{caller_id}"


class Pipelines(Protocol):
    """What is asked of the client: `redis.asyncio.Redis` has it."""

    def pipeline(self, transaction: bool = ...) -> Any: ...


class QuotaExchange:
    """One per process. While Redis is away, each process knows its own requests and what the others had at the last exchange."""

    def __init__(self, redis: Pipelines) -> None:
        self._redis = redis
        self._process = uuid.uuid4().hex

    async def exchange(self, callers: Iterable[Caller]) -> None:
        """Raises RedisError, OSError or TimeoutError; then nothing is lost, the next exchange tells the same numbers or newer ones."""
        asked = [(caller.id, caller.quota, caller.quota.day, caller.quota.own) for caller in callers if caller.quota and caller.quota.own]
        if not asked:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, _, day, own in asked:
                key = quota_key(name, day)
                pipe.hset(key, self._process, str(own))
                pipe.expire(key, _KEPT_S)
                pipe.hgetall(key)
            answers = await pipe.execute()
        for (_, quota, day, _), counted in zip(asked, answers[2::3], strict=True):
            quota.counted_elsewhere(day, sum(int(n) for process, n in counted.items() if process != self._process.encode()))
