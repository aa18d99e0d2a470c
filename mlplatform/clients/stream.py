"""Redis Streams: publishing, reading as a consumer group, reading after an id, trimming.

Belongs here: the commands, in the order that loses nothing, and what a stream looks like. Does not belong here: what an
entry means, or whether it was stored already (`mlplatform.ingestion` decides that from the table's last committed id).

One group has one reader at a time. Reading takes over whatever an earlier reader left unacknowledged, so a second
reader beside a living one would get the same entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from mlplatform.addresses import without_password

# An entry: its id ("<ms>-<seq>"), and its fields. No fields: the stream was trimmed before the entry was acknowledged.
Entry = tuple[str, dict[str, bytes]]

CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 15.0
BATCH = 5_000  # entries a round trip: a few MB, some 50 ms


class StreamError(Exception):
    """A stream command failed; the message says what to mend."""


class StreamDownError(StreamError):
    """The server is unreachable or does not answer in time."""


@dataclass(frozen=True)
class StreamStatus:
    """A stream as its group sees it, in entries.

    `lag` were never delivered to the group, `pending` were delivered and not acknowledged; `trimmed_unread` of the lag
    are gone for good (the retention was shorter than the outage). None: the server cannot tell.
    """

    length: int
    pending: int
    lag: int | None
    trimmed_unread: int | None
    last_id: str
    last_delivered_id: str


class StreamClient:
    """A connection to the Redis (or Valkey) at `url`. Nothing is sent before the first command."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        # No retries: a repeated XADD would publish twice, and a repeated XREADGROUP would skip the entries of the lost
        # answer, which would then look committed once later ones are. The next read finds them as pending instead.
        # Any: redis-py's types hold one answer for every protocol version; with protocol 2 the bytes below come back.
        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._where = without_password(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._redis.close()

    def create_group(self, stream: str, group: str, start: str = "0") -> bool:
        """Makes the group (and the stream) if it is not there; False where it was. `start` "0" is the oldest entry, "$" the next."""
        with self._told():
            try:
                self._redis.xgroup_create(stream, group, id=start, mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
                return False
        return True

    def read(self, stream: str, group: str, consumer: str, limit: int) -> list[Entry]:
        """Up to `limit` entries in stream order: first what was delivered before and never acknowledged, then new ones.

        Entries stay pending until `ack`. Trimmed ones come without fields. Makes the group where it is missing.
        """
        self.create_group(stream, group)
        lost = self._take_over(stream, group, consumer)
        entries = self._read_pending(stream, group, consumer, limit)
        while len(entries) < limit:
            new = self._read_group(stream, group, consumer, ">", min(BATCH, limit - len(entries)))
            entries += new
            if not new:
                break
        return sorted([*lost, *entries], key=lambda entry: _order(entry[0])) if lost else entries

    def ack(self, stream: str, group: str, ids: Sequence[str]) -> int:
        """Acknowledges entries; returns how many were pending. Repeating it does no harm."""
        with self._told():
            return sum(int(self._redis.xack(stream, group, *part)) for part in _parts(ids))

    def publish(self, stream: str, fields: Mapping[str, str | bytes], *, entry_id: str = "*", max_length: int | None = None) -> str:
        """Appends one entry and returns its id. `max_length` trims the oldest, roughly."""
        return self.publish_many(stream, [fields], ids=[entry_id], max_length=max_length)[0]

    def publish_many(
        self,
        stream: str,
        entries: Sequence[Mapping[str, str | bytes]],
        *,
        ids: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> list[str]:
        """Appends entries in order, in few round trips. `ids` must ascend. After an error some may have been appended."""
        published: list[str] = []
        for start in range(0, len(entries), BATCH):
            pipeline = self._redis.pipeline(transaction=False)
            for i, fields in enumerate(entries[start : start + BATCH], start=start):
                pipeline.xadd(stream, dict(fields), id=ids[i] if ids else "*", maxlen=max_length)
            with self._told():
                published += [_text(entry_id) for entry_id in pipeline.execute()]
        return published

    def read_after(self, stream: str, last_id: str, count: int) -> list[Entry]:
        """Up to `count` entries above `last_id` ("0" for all), in order, without a group. Empty where there is no such stream."""
        entries: list[Entry] = []
        while len(entries) < count:
            after = entries[-1][0] if entries else last_id
            with self._told():
                found = self._redis.xrange(stream, min=f"({after}", count=min(BATCH, count - len(entries)))
            entries += _entries(found)
            if not found:
                break
        return entries

    def trim_through(self, stream: str, last_id: str) -> int:
        """Removes entries up to and including `last_id`; returns how many."""
        ms, seq = _order(last_id)
        with self._told():
            return int(self._redis.xtrim(stream, minid=f"{ms}-{seq + 1}", approximate=False))

    def status(self, stream: str, group: str) -> StreamStatus | None:
        """Counts of a stream and group; None where either does not exist yet."""
        with self._told():
            if not self._redis.exists(stream):
                return None
            info, groups = self._redis.xinfo_stream(stream), self._redis.xinfo_groups(stream)
        mine = next((g for g in groups if _text(g["name"]) == group), None)
        if mine is None:
            return None
        read, added = mine.get("entries-read"), info.get("entries-added")
        gone = None if read is None or added is None else max(0, added - info["length"] - read)
        return StreamStatus(
            length=info["length"],
            pending=mine["pending"],
            lag=mine.get("lag"),
            trimmed_unread=gone,
            last_id=_text(info["last-generated-id"]),
            last_delivered_id=_text(mine["last-delivered-id"]),
        )

    def last_id(self, stream: str) -> str | None:
        """The id of the newest entry that is there; None for an empty stream, or none."""
        with self._told():
            found = self._redis.xrevrange(stream, count=1)
        return found[0][0].decode() if found else None

    def length(self, stream: str) -> int:
        with self._told():
            return int(self._redis.xlen(stream))

    # --- reading in parts ---

    def _take_over(self, stream: str, group: str, consumer: str) -> list[Entry]:
        """Claims what consumers of other names left behind, so that it comes as this one's pending entries.

        Returns the entries of theirs that were trimmed meanwhile: claiming drops them from the pending list for ever.
        """
        with self._told():
            waiting = self._redis.xpending(stream, group)["consumers"]
        lost: list[Entry] = []
        cursor = "0-0" if any(_text(c["name"]) != consumer for c in waiting) else None
        while cursor is not None:
            with self._told():
                found, _, deleted = self._redis.xautoclaim(stream, group, consumer, 0, cursor, count=BATCH)
            lost += [(_text(entry_id), {}) for entry_id in deleted]
            cursor = None if _text(found) == "0-0" else _text(found)
        return lost

    def _read_pending(self, stream: str, group: str, consumer: str, limit: int) -> list[Entry]:
        entries: list[Entry] = []
        while len(entries) < limit:
            after = entries[-1][0] if entries else "0"
            part = self._read_group(stream, group, consumer, after, min(BATCH, limit - len(entries)))
            entries += part
            if not part:
                break
        return entries

    def _read_group(self, stream: str, group: str, consumer: str, after: str, count: int) -> list[Entry]:
        with self._told():
            answer = self._redis.xreadgroup(group, consumer, {stream: after}, count=count)
        return _entries(answer[0][1]) if answer else []

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A failing command says where it failed and what to mend, and keeps the cause."""
        try:
            yield
        except AuthenticationError as error:
            raise StreamError(f"stream server {self._where} refuses the password ({error}). Check the URL's credentials") from error
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise StreamDownError(f"stream server {self._where} does not answer ({error}). Check that it runs, then run again") from error
        except RedisError as error:
            raise StreamError(f"stream server {self._where} refuses a command ({error}). Check that the key is a stream") from error


def _entries(raw: Sequence[tuple[bytes, Mapping[bytes, bytes] | None]]) -> list[Entry]:
    names: dict[bytes, str] = {}  # one string per field name, not one per entry: a batch may hold a million

    def named(fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
        return {names.get(k) or names.setdefault(k, _text(k)): v for k, v in fields.items()}

    return [(entry_id.decode(), named(fields) if fields else {}) for entry_id, fields in raw]


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
