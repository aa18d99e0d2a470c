"""What the worker writes: equal to the batch whatever comes late, twice or corrected; which views, and what is told."""

import random
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
from redis import Redis

from mlplatform.features.plan import TIME, ViewPlan
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import CLICKS, STREAM, click, payload, plans
from mlplatform.orchestration import streaming
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.streaming import NothingToStreamError, Worker, choose
from mlplatform.records import DayRange
from mlplatform.specs import FileReader, RowRule

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)  # as the folder's workers have it
AT_CLICK, BY_TICK = plans("small")
PLANS = (AT_CLICK, BY_TICK)


def test_late_and_repeated_and_corrected_events_leave_what_a_batch_gives(open_worker, shoppers, now, set_clock, clients):
    worker, chance, sent = open_worker(), random.Random(1), []
    worker.start()
    for step in range(40):
        at = now + step * 7 * MINUTE
        set_clock(at)
        for _ in range(4):
            when = at - chance.choice((0, 0, 0, 5, 90)) * MINUTE
            sent.append((shoppers.click(when, copies=chance.choice((1, 1, 1, 2))), when))
        number, when = chance.choice(sent)
        if at - when < timedelta(hours=1):
            shoppers.click(when, number=number)  # another shopper, another amount: a correction
        worker.step()
    assert shoppers.equal_the_batch(now - LATENESS)
    assert worker.inputs.counts["clicks"].repeated > 0
    assert worker.inputs.counts["clicks"].quarantined > 0
    assert all(online_differences(clients.redis, plan, shoppers.standing(plan)) == 0 for plan in PLANS)


def test_a_late_event_gives_the_rows_after_it_again_with_a_later_created(open_worker, shoppers, now, set_clock):
    worker = open_worker()
    shoppers.click(now - 50 * MINUTE, shopper=1, spent=1.0)
    worker.step()
    set_clock(now + MINUTE)
    shoppers.click(now - 45 * MINUTE, shopper=1, spent=2.0)
    worker.step()
    rows = shoppers.stored(BY_TICK).filter(pl.col(TIME) == now)
    assert rows["by_tick_sum_1h"].to_list() == [1.0, 3.0]
    assert rows["created"].to_list() == [now, now + MINUTE]


def test_while_the_clock_stands_a_restated_row_is_still_the_later_one(open_worker, shoppers, now, clients):
    worker = open_worker()
    shoppers.click(now - 5 * MINUTE, shopper=1, spent=1.0)
    worker.step()
    shoppers.click(now - 4 * MINUTE, shopper=1, spent=2.0)
    worker.step()
    created = shoppers.stored(BY_TICK).filter(pl.col(TIME) == now)["created"].to_list()
    assert len(created) == 2
    assert created[0] < created[1]
    assert online_differences(clients.redis, BY_TICK, shoppers.standing(BY_TICK)) == 0


def test_an_unreadable_entry_is_counted_and_hurts_nobody(open_worker, shoppers, now, clients):
    worker = open_worker()
    clients.redis.xadd(STREAM, {"event": "{"})
    shoppers.click(now, shopper=1)
    clients.redis.xadd(STREAM, payload(click(99, 1, now, -5.0)))
    worker.start()
    worker.step()
    clients.redis.xadd(STREAM, {"event": "["})
    clients.redis.xadd(STREAM, payload(click(100, 1, now, -5.0)))
    worker.step()
    counts = worker.inputs.counts["clicks"]
    assert (counts.malformed, counts.quarantined) == (2, 1)
    assert shoppers.standing(AT_CLICK).height == 1


def test_what_comes_too_late_is_counted_and_made_up_for_once_it_has_landed(open_worker, shoppers, now, set_clock, monkeypatch):
    worker = open_worker()
    shoppers.click(now, shopper=1)
    worker.step()
    set_clock(now + 30 * MINUTE)
    shoppers.click(now - LATENESS - MINUTE, shopper=1, spent=50.0)
    worker.step()
    assert worker.inputs.counts["clicks"].too_late == 1
    shoppers.land()
    monkeypatch.setattr(streaming, "CARE_EVERY_S", 0.0)
    worker.step()  # notices that it has landed
    worker.step()  # and starts anew
    rows = shoppers.standing(BY_TICK).filter(pl.col(TIME) == now + 30 * MINUTE)
    assert rows.equals(shoppers.batch(BY_TICK, now + 30 * MINUTE))


def test_what_cannot_be_streamed_is_told_with_the_reason(clients):
    def with_recipe(**changes: Any) -> ViewPlan:
        return ViewPlan(**{**vars(BY_TICK), "recipe": BY_TICK.recipe.model_copy(update=changes)})

    views = {"kept": BY_TICK, "undeclared": with_recipe(independent_by=None), "keyless": with_recipe(independent_by="shopper")}
    chosen, against = choose(views, {"clicks": CLICKS})
    assert chosen == [BY_TICK]
    assert "independent_by" in against["undeclared"]
    assert "no part of the key" in against["keyless"]
    from_files = CLICKS.model_copy(update={"reader": FileReader(connection="archive", path="clicks")})
    assert "no event stream" in choose({"v": BY_TICK}, {"clicks": from_files})[1]["v"]
    spike = RowRule(name="spike", description="", broken=lambda: pl.col("spent") > 2 * pl.col("spent").shift(1))
    looking = CLICKS.model_copy(update={"contract": CLICKS.contract.model_copy(update={"rules": (spike,)})})
    assert "spike" in choose({"v": BY_TICK}, {"clicks": looking})[1]["v"]
    with pytest.raises(NothingToStreamError):
        Worker(clients.settings, clients.clock, [], {})


def test_metrics_tell_what_was_read_and_how_fresh_the_views_are(open_worker, shoppers, now, set_clock):
    worker = open_worker()
    worker.step()
    shoppers.click(now - MINUTE, shopper=1)
    set_clock(now + MINUTE)
    worker.step()
    sample = worker.metrics.registry.get_sample_value
    assert sample("mlplatform_stream_entries_total", {"source": "clicks", "outcome": "read"}) == 1
    assert sample("mlplatform_stream_freshness_seconds", {"view": "at_click"}) == 120
    assert sample("mlplatform_stream_rows_total", {"view": "at_click"}) == 1
    assert sample("mlplatform_stream_latency_seconds_count") == 1
    assert sample("mlplatform_stream_lag_seconds") == 0


def test_an_event_of_a_day_without_a_partition_is_set_aside_as_ingestion_does(open_worker, shoppers, now, clients: Clients):
    worker = open_worker(days=lambda source, at: DayRange(at.date() - timedelta(days=3), at.date() + timedelta(days=1)))
    shoppers.click(now)
    clients.redis.xadd(STREAM, payload(click(99, 1, now.replace(year=2031), 5.0)))  # type: ignore[arg-type]
    worker.step()
    assert worker.inputs.counts["clicks"].malformed == 1
    assert not worker.inputs.missed


def test_redis_keeps_no_group_for_the_worker(open_worker, shoppers, now, clients: Clients):
    shoppers.click(now)
    open_worker().step()
    redis: Redis = clients.redis
    assert redis.xinfo_groups(STREAM) == []
