"""Reading stored feature values for a batch: one bounded round trip, and a plain answer where the store is away.

Belongs here: time limit, failures and their log lines. Does not belong here: the codec, what a missing value means for a model.
"""

import asyncio
from collections.abc import Sequence
from itertools import groupby

import structlog
from redis.exceptions import RedisError

from mlplatform.feature_store.commands import AsyncClient
from mlplatform.feature_store.reader import OnlineReader, Request
from serving_app.features import Found, Unreadable

log = structlog.get_logger(__name__)


class OnlineFeatures:
    """Reads through one asyncio client with `decode_responses=False`."""

    def __init__(self, redis: AsyncClient, timeout_s: float) -> None:
        self._redis = redis
        self._timeout_s = timeout_s
        self._away = False
        self._unreadable: set[str] = set()
        # A reader remembers which generation of each view is read.
        self._readers: dict[str, OnlineReader] = {}

    async def read(self, project: str, requests: Sequence[Request]) -> list[Found] | None:
        """One value per request; None for all where the store did not answer within the time limit."""
        if not requests:
            return []
        reader = self._readers.get(project)
        if reader is None:
            reader = self._readers[project] = OnlineReader(self._redis, project)
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    found: list[Found] = [*await reader.read(requests)]
                except ValueError:
                    found = await self._read_by_view(reader, requests)
        except (RedisError, OSError, TimeoutError) as error:
            if not self._away:
                log.error("online_store_away", error=repr(error))
            self._away = True
            return None
        if self._away:
            log.info("online_store_back")
        self._away = False
        return found

    async def _read_by_view(self, reader: OnlineReader, requests: Sequence[Request]) -> list[Found]:
        """A view whose stored values have other features than the model was trained with must not take the others with it."""
        found: list[Found] = []
        for name, group in groupby(requests, key=lambda request: request[0].name):
            one_view = list(group)
            try:
                found += await reader.read(one_view)
                self._unreadable.discard(name)
            except ValueError as error:
                if name not in self._unreadable:
                    log.error("view_unreadable", view=name, error=str(error))
                self._unreadable.add(name)
                found += [Unreadable.VALUE] * len(one_view)
        return found
