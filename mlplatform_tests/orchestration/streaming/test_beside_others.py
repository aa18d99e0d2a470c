"""The worker beside the assets, and while a stream or the online store is away."""

from datetime import timedelta
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from mlplatform.clients.lake import TableMovedError
from mlplatform.clients.stream import StreamClient, StreamDownError
from mlplatform.features.plan import TIME
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import plans
from mlplatform.orchestration import stream_outputs
from mlplatform.orchestration.assets.features import write_offline
from mlplatform.records import DayRange

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)  # as the folder's workers have it
AT_CLICK, BY_TICK = plans("small")
PLANS = (AT_CLICK, BY_TICK)


def test_an_asset_run_after_the_worker_finds_nothing_to_write(open_worker, shoppers, now, set_clock, clients):
    worker = open_worker()
    for step in range(12):
        set_clock(now + step * 10 * MINUTE)
        shoppers.click(now + step * 10 * MINUTE - 3 * MINUTE)
        worker.step()
    shoppers.land()
    days = shoppers.validate()
    for plan in PLANS:
        before = shoppers.stored(plan)
        assert write_offline(clients, plan, DayRange(days.last, days.last), "asset").is_empty()
        assert shoppers.stored(plan).equals(before)


def test_an_asset_that_knows_less_than_the_worker_does_not_put_its_rows_back(open_worker, shoppers, now, set_clock, clients):
    worker = open_worker()
    shoppers.click(now - 5 * MINUTE, shopper=1)
    shoppers.land()
    worker.step()
    days = shoppers.validate()
    set_clock(now + 10 * MINUTE)
    shoppers.click(now + 5 * MINUTE, shopper=1)  # the worker reads it; it is not landed yet
    worker.step()
    for plan in PLANS:
        before = shoppers.stored(plan)
        assert write_offline(clients, plan, DayRange(days.last, days.last), "asset").is_empty()
        assert shoppers.stored(plan).equals(before)


def test_the_asset_goes_on_when_the_worker_is_gone(open_worker, shoppers, now, set_clock, clients):
    worker = open_worker()
    shoppers.click(now - 5 * MINUTE, shopper=1)
    worker.step()
    set_clock(now + 40 * MINUTE)
    shoppers.click(now + 5 * MINUTE, shopper=1)
    shoppers.land()
    days = shoppers.validate()
    written = write_offline(clients, BY_TICK, DayRange(days.last, days.last), "asset")
    assert written[TIME].to_list() == [now + m * MINUTE for m in (10, 20, 30, 40)]


def test_the_worker_compares_where_an_asset_wrote_first(open_worker, shoppers, now, set_clock, clients):
    worker = open_worker()
    shoppers.click(now - 5 * MINUTE, shopper=1)
    worker.step()
    set_clock(now + 40 * MINUTE)
    shoppers.land()
    days = shoppers.validate()
    assert not write_offline(clients, BY_TICK, DayRange(days.last, days.last), "asset").is_empty()
    before = shoppers.stored(BY_TICK)
    worker.step()
    assert shoppers.stored(BY_TICK).equals(before)
    assert online_differences(clients.redis, BY_TICK, shoppers.standing(BY_TICK)) == 0


def test_of_two_writers_at_the_same_moment_one_looks_again(clients, shoppers, now, open_worker):
    shoppers.click(now)
    open_worker().step()
    key, rows = ("offline", "by_tick"), clients.lake.read(("offline", "by_tick"))
    read_at = clients.lake.version(key)
    clients.lake.append(key, rows.head(0), read_at=read_at)
    with pytest.raises(TableMovedError):
        clients.lake.append(key, rows.head(0), read_at=read_at)


def test_a_stream_that_is_away_is_waited_for(open_worker, shoppers, now, monkeypatch, rounds):
    worker = open_worker()
    worker.step()
    real = StreamClient.read_after

    def away(*_: Any) -> Any:
        raise StreamDownError("the stream server does not answer")

    shoppers.click(now, shopper=1)
    monkeypatch.setattr(StreamClient, "read_after", away)
    stop = rounds(3)
    worker.run(stop)
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_connected") == 0
    assert stop.waits[:3] == [0.5, 1.0, 2.0]
    monkeypatch.setattr(StreamClient, "read_after", real)
    worker.run(rounds(1))
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_connected") == 1
    assert shoppers.equal_the_batch(now - LATENESS)


def test_an_online_store_that_is_away_gets_its_values_when_it_is_back(open_worker, shoppers, now, monkeypatch, clients, rounds):
    worker = open_worker()
    worker.step()
    real = stream_outputs.write_frame

    def away(*_: Any) -> Any:
        raise RedisConnectionError("away")

    shoppers.click(now, shopper=1)
    monkeypatch.setattr(stream_outputs, "write_frame", away)
    worker.run(rounds(1))
    assert shoppers.standing(AT_CLICK).height == 1
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 1
    monkeypatch.setattr(stream_outputs, "write_frame", real)
    worker.run(rounds(1))
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 0
