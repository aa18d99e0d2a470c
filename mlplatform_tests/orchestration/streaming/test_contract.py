"""A day that breaks its contract stops the views made of it, as it stops the batch, and the operator sees it coming."""

from datetime import timedelta

import pytest

from mlplatform.local.stream_world import CLICKS, STREAM, click, payload, plans
from mlplatform.orchestration import stream_faults
from mlplatform.orchestration.streaming import StreamOptions, Worker

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)
AT_CLICK, BY_TICK = plans("small")
STRICT = CLICKS.model_copy(update={"contract": CLICKS.contract.model_copy(update={"max_quarantine_share": 0.1})})


@pytest.fixture
def worker(clients, monkeypatch):
    monkeypatch.setattr(stream_faults, "RETRY_S", (0.0, 0.0))
    made = Worker(clients.settings, clients.clock, (AT_CLICK, BY_TICK), {"clicks": STRICT}, StreamOptions(LATENESS, 2 * LATENESS))
    yield made
    made.close()


def sample(worker: Worker, name: str, **labels: str) -> float | None:
    return worker.metrics.registry.get_sample_value(f"mlplatform_stream_{name}", labels)


def break_contract(clients, at, number: int) -> None:
    clients.redis.xadd(STREAM, payload(click(number, 1, at, -5.0)))


def test_the_rows_of_the_day_that_keep_and_break_the_contract_are_told(worker, shoppers, clients, now):
    for _ in range(3):
        shoppers.click(now - timedelta(days=1))  # of another day
    for minutes in range(6):
        shoppers.click(now - minutes * MINUTE, copies=2)
    worker.step()
    for minutes in range(3):
        shoppers.click(now - minutes * MINUTE)
    break_contract(clients, now, 999)
    worker.step()
    assert sample(worker, "contract_rows", source="clicks", outcome="kept") == 9
    assert sample(worker, "contract_rows", source="clicks", outcome="broken") == 1
    assert sample(worker, "contract_broken_share", source="clicks") == pytest.approx(0.1)
    assert sample(worker, "contract_allowed_share", source="clicks") == 0.1
    assert not sample(worker, "view_stopped", view="at_click")  # as many as it allows


def test_a_day_beyond_the_limit_stops_its_views_until_it_is_within_it_again(worker, shoppers, clients, now, set_clock):
    shoppers.click(now - MINUTE)
    worker.step()
    before = shoppers.stored(AT_CLICK)
    for number in (901, 902):
        break_contract(clients, now, number)
    shoppers.click(now)
    worker.step()
    assert [sample(worker, "view_stopped", view=view) for view in ("at_click", "by_tick")] == [1, 1]
    assert "2 of 4 rows (50.0%), allowed 10.0%" in worker.stops.reasons()["at_click"]
    assert shoppers.stored(AT_CLICK).equals(before)
    set_clock(now + 10 * MINUTE)
    for minutes in range(15):
        shoppers.click(now + minutes * MINUTE / 2)
    worker.step()
    assert [sample(worker, "view_stopped", view=view) for view in ("at_click", "by_tick")] == [0, 0]
    assert shoppers.equal_the_batch(now - LATENESS)


def test_a_new_worker_stands_before_the_same_gate(worker, shoppers, clients, now, set_clock):
    for number in (901, 902, 903):
        break_contract(clients, now, number)
    shoppers.click(now)
    shoppers.land()
    worker.start()
    assert set(worker.stops.reasons()) == {"at_click", "by_tick"}
    # Once a day cannot be written any more it is the batch's alone.
    set_clock(now + timedelta(days=1) + LATENESS)
    worker.step()
    worker.step()
    assert not worker.stops.reasons()
