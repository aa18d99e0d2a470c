"""Reading stored feature values for a batch: one bounded round trip, and the declared fallback where the store is away.

Belongs here: time limit, circuit breaker, cache, failures and their log lines. Does not belong here: the codec, what a missing
value means for a model.

The breaker (M. Nygard, "Release It!", 2007, ch. 5): after a read that failed, no other waits for the store until a pause is
over; then one read tries, and its success closes the breaker. So a dead store costs a request nothing but its first time-out.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import structlog
from redis.exceptions import RedisError

from mlplatform.feature_store.codec import Block, empty_block
from mlplatform.feature_store.commands import AsyncClient
from mlplatform.feature_store.reader import Asked, OnlineReader
from serving_app.feature_cache import FeatureCache
from serving_app.features import Found, KeyPlan
from serving_app.problems import unavailable

Fallback = Literal["cache", "defaults", "refuse"]

_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

log = structlog.get_logger(__name__)


class OnlineFeatures:
    """Reads through one asyncio client with `decode_responses=False`; `cache` None: nothing is remembered; `timeout_s` None: the
    client keeps a time limit itself.

    `fallback` is what is given while the store is away: what the cache holds, nothing (so that the model's defaults stand in),
    or no answer at all.
    """

    def __init__(
        self,
        redis: AsyncClient,
        timeout_s: float | None,
        fallback: Fallback = "defaults",
        cache: FeatureCache | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._timeout_s = timeout_s
        self._fallback = fallback
        self._cache = cache
        self._monotonic = monotonic
        self._unreadable: set[str] = set()
        # A reader remembers which generation of each view is read.
        self._readers: dict[str, OnlineReader] = {}
        self._pause_s = 0.0  # 0: the store answers
        self._again_at = 0.0
        self.reads = {"store": 0, "cache": 0, "fallback": 0}  # by where the values came from

    @property
    def away(self) -> bool:
        """Whether the store did not answer the last read."""
        return self._pause_s > 0

    async def read(self, project: str, plan: KeyPlan) -> list[Found]:
        """What was found for each view asked for. Raises ProblemError (503) where the store is away and the fallback is to refuse."""
        if not plan.asked:
            return []
        now = self._monotonic()
        if self._cache is not None and (held := self._cache.fresh(project, plan.asked, now)) is not None:
            self.reads["cache"] += 1
            return [Found(block) for block in held]
        if now < self._again_at:
            return self._instead(project, plan.asked)
        # Whoever comes while this one tries goes to the fallback at once.
        self._again_at = now + self._pause_s
        try:
            # With the time of before the read: what comes back may have been written over since then.
            decode = None if self._cache is None else partial(self._cache.decode, project, now)
            reading = self._reader(project).blocks(plan.asked, decode)
            blocks = await (reading if self._timeout_s is None else asyncio.wait_for(reading, self._timeout_s))
        except (RedisError, OSError, TimeoutError) as error:
            self._lost(error)
            return self._instead(project, plan.asked)
        self.answered()
        self.reads["store"] += 1
        return [self._found(asked, block) for asked, block in zip(plan.asked, blocks, strict=True)]

    def _reader(self, project: str) -> OnlineReader:
        reader = self._readers.get(project)
        if reader is None:
            reader = self._readers[project] = OnlineReader(self._redis, project)
        return reader

    def _found(self, asked: Asked, block: Block | ValueError) -> Found:
        """A view whose stored values have other features than the model was trained with must not take the others with it."""
        layout, entities = asked
        if isinstance(block, ValueError):
            if layout.name not in self._unreadable:
                log.error("view_unreadable", view=layout.name, error=str(block))
            self._unreadable.add(layout.name)
            return Found(empty_block(len(entities), len(layout.features)), "unreadable")
        if self._unreadable and layout.name in self._unreadable:
            log.info("view_readable_again", view=layout.name)
            self._unreadable.discard(layout.name)
        return Found(block)

    def _instead(self, project: str, asked: Sequence[Asked]) -> list[Found]:
        self.reads["fallback"] += 1
        if self._fallback == "refuse":
            raise unavailable("online-store-away", "the online store does not answer, and this service is set to refuse then")
        if self._fallback == "defaults" or self._cache is None:
            return [Found(empty_block(len(entities), len(layout.features)), "unreachable") for layout, entities in asked]
        return [Found(block, "unreachable") for block in self._cache.last(project, asked)]

    def _lost(self, error: Exception) -> None:
        if not self.away:
            log.error("online_store_away", error=repr(error))
        self._pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, self._pause_s * 2))
        self._again_at = self._monotonic() + self._pause_s

    def answered(self) -> None:
        """The store has answered, a read or whoever asked whether it is there: the next read goes to it."""
        if self.away:
            log.info("online_store_back")
        self._pause_s = self._again_at = 0.0
