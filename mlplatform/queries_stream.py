"""Who keeps the streamed views: what the lease in the online store tells, as plain JSON-able values.

Belongs here: asking. Does not belong here: printing (`cli`, `cli_stream`), judging (`doctor_platform`), the worker itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlplatform.settings import Settings

_TIMEOUT_S = 2.0


def worker(settings: "Settings") -> dict[str, Any] | None:
    """The worker that holds the lease or held it last; None where the online store does not answer.

    `holder` is host and process, None where no worker ever ran there; `metrics` the port it tells them on, `stopped` its
    stopped views with the reason.
    """
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    from mlplatform.clients.lease import holder_of
    from mlplatform.contracts import STREAM_LEASE
    from mlplatform.feature_store.commands import open_client

    try:
        patience = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, "retry": Retry(NoBackoff(), 0)}
        client = open_client(settings.online_redis_url, settings.online_cluster, **patience)
        try:
            found = holder_of(client, STREAM_LEASE)
        finally:
            client.close()
    except (RedisError, OSError, ValueError):
        return None
    if found is None:
        return {"holder": None, "works": False, "since": None, "number": 0, "metrics": None, "stopped": {}}
    return {
        "holder": found.name,
        "works": found.holds,
        "since": found.since.isoformat(timespec="seconds"),
        "number": found.number,
        "metrics": found.note.get("metrics"),
        "stopped": dict(found.note.get("stopped", {})),
    }


def told(found: dict[str, Any] | None) -> str:
    """The same in a line."""
    if found is None:
        return "the online store does not answer"
    if found["holder"] is None:
        return "no worker ever ran here"
    if not found["works"]:
        return f"no worker; the last was {found['holder']}"
    where = f", metrics on {found['metrics']}" if found["metrics"] else ""
    stopped = f"; stopped: {', '.join(found['stopped'])}" if found["stopped"] else ""
    return f"{found['holder']} since {found['since']}{where}{stopped}"
