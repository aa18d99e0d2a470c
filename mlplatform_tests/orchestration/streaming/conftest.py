"""Shoppers who click, and workers on real streams and tables that keep two views of them."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pytest

from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIME, ViewPlan
from mlplatform.local.stream_world import CLICKS, STREAM, click, clicks, payload, plans
from mlplatform.orchestration.assets.validation import split_source, write
from mlplatform.orchestration.landing import land
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.streaming import StreamOptions, Worker
from mlplatform.records import DayRange
from mlplatform.validation.split import split

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)  # as the folder's workers have it
AT_CLICK, BY_TICK = plans("small")
PLANS = (AT_CLICK, BY_TICK)


@pytest.fixture
def open_worker(clients: Clients) -> Iterator[Callable[..., Worker]]:
    opened: list[Worker] = []

    def make(**more: Any) -> Worker:
        options = StreamOptions(lateness=LATENESS, keep=2 * LATENESS, **more)
        for before in opened:
            before.lease.release()  # of a killed one it runs out; no test waits for that
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

    def equal_the_batch(self, first: datetime, views: Sequence[ViewPlan] = PLANS) -> bool:
        self.land()
        return all(self.standing(plan).equals(self.batch(plan, first)) for plan in views)


@pytest.fixture
def shoppers(clients: Clients) -> Shoppers:
    return Shoppers(clients)


class Rounds:
    """A stop event that is set after so many waits."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.waits = rounds, list[float]()

    def is_set(self) -> bool:
        return len(self.waits) >= self.rounds

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.is_set()


@pytest.fixture
def rounds() -> type[Rounds]:
    return Rounds
