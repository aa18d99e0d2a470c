"""Running the store's protocols on any client: plain or asyncio, one server or a Redis Cluster.

Belongs here: clients by address, and what turns lists of commands into replies. Does not belong here: which commands, and in
which order: that is said once, in generators that know no client (`Steps`), by `writer`, `generations` and `reader`.
"""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.cluster import RedisCluster as AsyncCluster
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mlplatform.feature_store.pipe import Pipe

Client: TypeAlias = Redis | RedisCluster
AsyncClient: TypeAlias = AsyncRedis | AsyncCluster | Pipe
Command: TypeAlias = tuple[Any, ...]
Result = TypeVar("Result")

# A protocol: yields commands that may go out together, is sent their replies in that order, returns its result.
Steps: TypeAlias = Generator[Sequence[Command], list[Any], Result]

# One command blocks the server while it runs; more keys than this go as several.
KEYS_PER_COMMAND = 1_000


class Cluster(RedisCluster):
    """redis-py's, which leaves the connections to its nodes to the garbage collector; `close` of this one closes them."""

    def close(self) -> None:
        if getattr(self, "nodes_manager", None) is not None:  # a client that found no node is closed too
            self.disconnect_connection_pools()  # type: ignore[no-untyped-call]
        super().close()


def open_client(url: str, cluster: bool = False, **options: Any) -> Client:
    """A plain client; `rediss://` is TLS. With `cluster` the address is any node's and the database is 0."""
    return Cluster.from_url(url, **options) if cluster else Redis.from_url(url, **options)


def open_async_client(url: str, cluster: bool = False, **options: Any) -> AsyncClient:
    """As `open_client`, for asyncio."""
    if cluster:
        return AsyncCluster.from_url(url, **options)
    client: AsyncRedis = AsyncRedis.from_url(url, **options)
    return client


def is_cluster(client: Client | AsyncClient) -> bool:
    """Whether keys carry hash tags, and a command keeps to one slot."""
    return isinstance(client, RedisCluster | AsyncCluster)


def get_values(keys: Sequence[bytes], clustered: bool) -> Steps[list[bytes | None]]:
    """The strings under keys in one round trip, None where there is none; on one server in the order of the keys."""
    if clustered:
        # A key may lie anywhere: one GET each, which the client sends to its node, all together.
        return (yield [("GET", key) for key in keys])
    chunks = yield [("MGET", *keys[start : start + KEYS_PER_COMMAND]) for start in range(0, len(keys), KEYS_PER_COMMAND)]
    return chunks[0] if len(chunks) == 1 else [value for chunk in chunks for value in chunk]


def run(client: Client, steps: Steps[Result]) -> Result:
    """Drives a protocol through a plain client."""
    try:
        commands = next(steps)
        while True:
            commands = steps.send(execute(client, commands))
    except StopIteration as end:
        result: Result = end.value
        return result


async def run_async(client: AsyncClient, steps: Steps[Result]) -> Result:
    """Drives a protocol through an asyncio client."""
    try:
        commands = next(steps)
        while True:
            commands = steps.send(await _execute_async(client, commands))
    except StopIteration as end:
        result: Result = end.value
        return result


def execute(client: Client, commands: Sequence[Command]) -> list[Any]:
    """The replies to commands sent in one go; those to one server are executed in their order.

    Raises `RedisError`. After a lost connection a cluster's nodes are asked anew, so that the next try goes to who is primary then.
    """
    try:
        return _execute(client, commands)
    except (RedisConnectionError, RedisTimeoutError):
        if isinstance(client, RedisCluster):
            # The client does so itself for a command, but not where its pipeline asks its default node for a command's keys: once
            # that node is dead, each later try would ask the dead one again (redis-py issues 2224 and 3130).
            with contextlib.suppress(RedisError):
                client.nodes_manager.initialize()
        raise


def _execute(client: Client, commands: Sequence[Command]) -> list[Any]:
    sender: Any = client
    if len(commands) == 1:
        return [sender.execute_command(*commands[0])]
    pipe = sender.pipeline(transaction=False) if isinstance(client, Redis) else sender.pipeline()
    for command in commands:
        pipe.execute_command(*command)
    return list(pipe.execute()) if commands else []


async def _execute_async(client: AsyncClient, commands: Sequence[Command]) -> list[Any]:
    if isinstance(client, Pipe):
        return await client.execute(commands)
    if len(commands) == 1:
        return [await client.execute_command(*commands[0])]
    pipe: Any = client.pipeline(transaction=False) if isinstance(client, AsyncRedis) else client.pipeline()
    for command in commands:
        pipe.execute_command(*command)
    return list(await pipe.execute()) if commands else []
