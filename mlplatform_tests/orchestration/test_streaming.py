"""The streaming worker on real streams and tables: equal to the batch, however it ends, and at peace with the assets."""

import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from mlplatform.clients.lake import Lake, TableMovedError
from mlplatform.clients.stream import StreamClient, StreamDownError
from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIME, ViewPlan
from mlplatform.features.stream_entity import StaleStateError
from mlplatform.features.stream_view import ViewState
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import CLICKS, STREAM, click, clicks, payload, plans
from mlplatform.orchestration import stream_outputs, streaming
from mlplatform.orchestration.assets.features import write_offline
from mlplatform.orchestration.assets.validation import split_source, write
from mlplatform.orchestration.landing import land
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.streaming import NothingToStreamError, StreamOptions, Worker, choose
from mlplatform.records import DayRange
from mlplatform.specs import FileReader, RowRule
from mlplatform.validation.split import split

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)
AT_CLICK, BY_TICK = plans("small")
PLANS = (AT_CLICK, BY_TICK)


@pytest.fixture
def open_worker(clients: Clients) -> Iterator[Callable[..., Worker]]:
    opened: list[Worker] = []

    def make(**more: Any) -> Worker:
        options = StreamOptions(lateness=LATENESS, keep=2 * LATENESS, **more)
        opened.append(Worker(clients.settings, clients.clock, PLANS, {"clicks": CLICKS}, options))
        return opened[-1]

    yield make
    for worker in opened:
        worker.close()


class Shoppers:
    """Clicks onto the stream, and what a batch makes of all of them."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self._clicks = clicks(7, shoppers=4)

    def click(
        self, at: datetime, *, shopper: int | None = None, spent: float | None = None, copies: int = 1, number: int | None = None
    ) -> int:
        n, who, amount = next(self._clicks)
        n = n if number is None else number
        event = click(n, who if shopper is None else shopper, at, amount if spent is None else spent)
        for _ in range(copies):
            self.clients.redis.xadd(STREAM, payload(event))  # type: ignore[arg-type]
        return n

    def land(self) -> None:
        today = self.clients.clock.now().date()
        land(self.clients, CLICKS, DayRange(today, today), "ingestion")

    def validate(self) -> DayRange:
        today = self.clients.clock.now().date()
        days = DayRange(today - timedelta(days=1), today)
        result, summary, *_ = split_source(self.clients, CLICKS, days)
        write(self.clients, CLICKS, result, days, "validation", summary)
        return days

    def batch(self, plan: ViewPlan, first: datetime) -> pl.DataFrame:
        """The view's rows over all clicks landed, from `first` to now."""
        tables = {"clicks": split(self.clients.lake.read(("raw", "clicks")), CLICKS, {}).validated}
        now = self.clients.clock.now()
        return compute(plan, tables, first, now if plan.event_triggered else EPOCH + (now - EPOCH) // plan.cadence * plan.cadence)

    def stored(self, plan: ViewPlan) -> pl.DataFrame:
        """Everything in the view's table, in the order it became available."""
        return self.clients.lake.read(("offline", plan.name)).drop("event_date").sort(TIME, *plan.join_keys, "created")

    def standing(self, plan: ViewPlan) -> pl.DataFrame:
        """The newest row of each shopper and time, without those withdrawn."""
        newest = self.stored(plan).unique([*plan.join_keys, TIME], keep="last", maintain_order=True).drop("created")
        return newest.filter(~pl.all_horizontal(pl.col(plan.features).is_null()))


@pytest.fixture
def shoppers(clients: Clients) -> Shoppers:
    return Shoppers(clients)


def equals_the_batch(shoppers: Shoppers, first: datetime) -> bool:
    shoppers.land()
    return all(shoppers.standing(plan).equals(shoppers.batch(plan, first)) for plan in PLANS)


# --- equal to the batch ----------------------------------------------------------------------------------------------


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
    assert equals_the_batch(shoppers, now - LATENESS)
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


# --- killed ----------------------------------------------------------------------------------------------------------


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
    assert equals_the_batch(shoppers, now - LATENESS)
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
    assert equals_the_batch(shoppers, now - LATENESS)
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
    assert equals_the_batch(shoppers, now - LATENESS)


# --- too late --------------------------------------------------------------------------------------------------------


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


# --- beside the assets -----------------------------------------------------------------------------------------------


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


# --- what is away ----------------------------------------------------------------------------------------------------


def test_a_stream_that_is_away_is_waited_for(open_worker, shoppers, now, monkeypatch):
    worker = open_worker()
    worker.step()
    real = StreamClient.read_after

    def away(*_: Any) -> Any:
        raise StreamDownError("the stream server does not answer")

    shoppers.click(now, shopper=1)
    monkeypatch.setattr(StreamClient, "read_after", away)
    stop = Rounds(3)
    worker.run(stop)
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_connected") == 0
    assert stop.waits[:3] == [0.5, 1.0, 2.0]
    monkeypatch.setattr(StreamClient, "read_after", real)
    worker.run(Rounds(1))
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_connected") == 1
    assert equals_the_batch(shoppers, now - LATENESS)


def test_an_online_store_that_is_away_gets_its_values_when_it_is_back(open_worker, shoppers, now, monkeypatch, clients):
    worker = open_worker()
    worker.step()
    real = stream_outputs.write_frame

    def away(*_: Any) -> Any:
        raise RedisConnectionError("away")

    shoppers.click(now, shopper=1)
    monkeypatch.setattr(stream_outputs, "write_frame", away)
    worker.run(Rounds(1))
    assert shoppers.standing(AT_CLICK).height == 1
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 1
    monkeypatch.setattr(stream_outputs, "write_frame", real)
    worker.run(Rounds(1))
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 0


class Rounds:
    """A stop event that is set after so many waits."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.waits = rounds, list[float]()

    def is_set(self) -> bool:
        return len(self.waits) >= self.rounds

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.is_set()


# --- which views -----------------------------------------------------------------------------------------------------


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
