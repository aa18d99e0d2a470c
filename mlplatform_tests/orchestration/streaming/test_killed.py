"""However a worker ends, the next one finds and writes what is missing, once."""

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import polars as pl
import pytest

from mlplatform.clients.lake import Lake
from mlplatform.clients.stream import StreamClient
from mlplatform.features.plan import TIME
from mlplatform.features.stream_entity import StaleStateError
from mlplatform.features.stream_view import ViewState
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import plans
from mlplatform.orchestration import stream_outputs

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)  # as the folder's workers have it
AT_CLICK, BY_TICK = plans("small")
PLANS = (AT_CLICK, BY_TICK)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the worker runs after it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the worker before or after its n-th reading of a stream, commit to Delta or write to Redis (counted together)."""
    left = [0]

    def cut(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            result = real(*arguments, **named)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        return call

    monkeypatch.setattr(StreamClient, "read_after", cut(StreamClient.read_after))
    monkeypatch.setattr(Lake, "append", cut(Lake.append))
    monkeypatch.setattr(Lake, "compact", cut(Lake.compact))
    monkeypatch.setattr(stream_outputs, "write_frame", cut(stream_outputs.write_frame))

    def arm(calls: int) -> None:
        left[0] = calls

    return arm


@pytest.mark.parametrize("seed", [1, 2])
def test_ended_at_any_read_or_write_nothing_is_lost_and_nothing_counted_twice(
    seed, open_worker, shoppers, kill_at, now, set_clock, clients, monkeypatch
):
    monkeypatch.setattr(stream_outputs, "COMPACT_EVERY", 2)
    chance, at, killed = random.Random(seed), now, 0
    for _ in range(30):
        worker = open_worker()
        kill_at(chance.randrange(1, 26))
        try:
            for _ in range(4):
                at += 6 * MINUTE
                set_clock(at)
                for _ in range(3):
                    shoppers.click(at - chance.choice((0, 0, 5, 60)) * MINUTE, copies=chance.choice((1, 1, 2)))
                worker.step()
        except Killed:
            killed += 1
        kill_at(0)
        if chance.random() < 0.3:
            shoppers.land()
    open_worker().step()
    assert killed > 15
    assert shoppers.equal_the_batch(now - LATENESS)
    assert all(online_differences(clients.redis, plan, shoppers.standing(plan)) == 0 for plan in PLANS)
    for plan in PLANS:
        rows = shoppers.stored(plan).drop("created")
        same = pl.all_horizontal(pl.col(c).eq_missing(pl.col(c).shift(1)) for c in rows.columns)
        assert not rows.select(same.fill_null(False).any()).item()


def test_a_start_without_news_writes_nothing(open_worker, shoppers, now):
    for minutes in (5, 15, 25):
        shoppers.click(now - minutes * MINUTE)
    open_worker().step()
    before = shoppers.stored(AT_CLICK), shoppers.stored(BY_TICK)
    open_worker().step()
    assert shoppers.stored(AT_CLICK).equals(before[0])
    assert shoppers.stored(BY_TICK).equals(before[1])


def test_ticks_that_passed_while_no_worker_ran_are_made_up_for(open_worker, shoppers, now, set_clock):
    shoppers.click(now)
    open_worker().step()
    set_clock(now + timedelta(hours=3))
    shoppers.click(now + timedelta(hours=1))
    open_worker().step()
    assert shoppers.equal_the_batch(now - LATENESS)
    passed = shoppers.stored(BY_TICK).filter(pl.col(TIME) > now)
    assert (passed["created"] == now + timedelta(hours=3)).all()  # when they became available


def test_a_state_that_lost_what_a_change_needs_is_built_anew(open_worker, shoppers, now, monkeypatch):
    worker = open_worker()
    worker.step()
    real, failed = ViewState.advance, []

    def once(self: ViewState, *arguments: Any) -> Any:
        if not failed:
            failed.append(self)
            raise StaleStateError("lost")
        return real(self, *arguments)

    monkeypatch.setattr(ViewState, "advance", once)
    shoppers.click(now)
    with pytest.raises(StaleStateError):
        worker.step()
    worker.step()
    assert shoppers.equal_the_batch(now - LATENESS)
