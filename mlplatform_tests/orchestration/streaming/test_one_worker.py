"""Of the workers on one online store one works; another takes over when it ends, and says whom it waits for."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from redis import Redis

from mlplatform.clients.lease import LeaseHeldError, LeaseLostError, holder_of, this_process
from mlplatform.contracts import STREAM_LEASE
from mlplatform.features.plan import ViewPlan
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import CLICKS, plans
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.stream_outputs import ViewOutput
from mlplatform.orchestration.streaming import StreamOptions, Worker

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)
AT_CLICK, BY_TICK = plans("small")


@pytest.fixture
def second(clients: Clients, open_worker: Callable[..., Worker]) -> Any:
    """A worker beside the fixture's own ones: nothing releases their lease for it."""
    worker = Worker(
        clients.settings, clients.clock, (AT_CLICK, BY_TICK), {"clicks": CLICKS}, StreamOptions(lateness=LATENESS, keep=2 * LATENESS)
    )
    yield worker
    worker.close()


def run_out(clients: Clients) -> None:
    """As if the holder had given no sign of life for long enough."""
    clients.redis.hset(STREAM_LEASE, "until", "1")


def leads(worker: Worker) -> float | None:
    return worker.metrics.registry.get_sample_value("mlplatform_stream_leads")


def test_a_second_worker_stands_by_and_names_the_first(open_worker, second, shoppers, now, rounds, clients):
    first = open_worker()
    shoppers.click(now)
    first.run(rounds(1))
    before = shoppers.stored(AT_CLICK)
    shoppers.click(now)
    with structlog.testing.capture_logs() as told:
        second.run(rounds(3))
    assert [(line["event"], line["holder"]) for line in told if line["log_level"] == "warning"] == [("standing by", this_process())]
    assert (leads(first), leads(second)) == (1, 0)
    assert shoppers.stored(AT_CLICK).equals(before)
    with pytest.raises(LeaseHeldError, match=this_process()):
        second.start()


def test_the_second_takes_over_at_once_and_the_first_stops_writing(open_worker, second, shoppers, now, clients, set_clock):
    first = open_worker()
    shoppers.click(now, shopper=1)
    first.step()
    run_out(clients)
    set_clock(now + MINUTE)
    shoppers.click(now + MINUTE, shopper=1)
    second.step()
    with pytest.raises(LeaseHeldError):
        first.step()
    assert shoppers.equal_the_batch(now - LATENESS)
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 0


def test_a_worker_that_loses_the_lease_within_a_round_writes_nothing_more(open_worker, second, shoppers, now, clients, monkeypatch):
    first = open_worker()
    first.step()
    shoppers.click(now, shopper=1)
    written: list[ViewPlan] = []
    real = ViewOutput.write

    def write_and_halt(self: ViewOutput, *arguments: Any) -> int:
        """After the first table of the round the process is halted for longer than the lease."""
        written.append(self.plan)
        monkeypatch.setattr(first.lease, "_until", float("-inf"))
        return real(self, *arguments)

    monkeypatch.setattr(ViewOutput, "write", write_and_halt)
    with pytest.raises(LeaseLostError):
        first.step()
    assert written == [AT_CLICK]
    monkeypatch.undo()
    run_out(clients)
    second.step()
    assert shoppers.equal_the_batch(now - LATENESS)


def test_who_comes_back_after_another_starts_anew(open_worker, second, shoppers, now, clients):
    first = open_worker()
    first.step()
    run_out(clients)
    first.step()  # nobody came between: the state is good
    assert first.metrics.registry.get_sample_value("mlplatform_stream_starts_total") == 1
    run_out(clients)
    second.step()
    shoppers.click(now)
    run_out(clients)
    first.step()
    assert first.metrics.registry.get_sample_value("mlplatform_stream_starts_total") == 2
    assert shoppers.equal_the_batch(now - LATENESS)


def test_a_worker_that_ends_as_asked_leaves_the_lease_free(open_worker, second, now: datetime, clients: Clients):
    first = open_worker()
    first.step()
    first.close()
    redis: Redis = clients.redis
    left = holder_of(redis, STREAM_LEASE)
    assert left is not None
    assert (left.name, left.holds) == (this_process(), False)
    second.step()
