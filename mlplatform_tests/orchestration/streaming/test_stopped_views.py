"""A fault of one view stops that view only, loudly; once it is mended the view has what it missed, once."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError

from mlplatform.clients.lease import holder_of
from mlplatform.contracts import STREAM_LEASE
from mlplatform.feature_store.codec import SchemaMismatchError
from mlplatform.features.plan import TIME, FeatureError, ViewPlan
from mlplatform.features.stream_view import ViewState
from mlplatform.local.stream_kills import online_differences
from mlplatform.local.stream_world import CLICKS, click_events, plans
from mlplatform.orchestration import stream_faults
from mlplatform.orchestration.stream_outputs import ViewOutput
from mlplatform.orchestration.streaming import StreamOptions, Worker

MINUTE = timedelta(minutes=1)
LATENESS = timedelta(hours=2)
AT_CLICK, BY_TICK = plans("small")


class Recipe:
    """A team's function that can be broken and mended while the worker runs."""

    def __init__(self) -> None:
        self.fault: BaseException | None = None

    def __call__(self, tables: Any) -> pl.DataFrame:
        if self.fault is not None:
            raise self.fault
        return click_events(tables)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped view is tried again in the next round."""
    monkeypatch.setattr(stream_faults, "RETRY_S", (0.0, 0.0))


@pytest.fixture
def recipe() -> Recipe:
    return Recipe()


@pytest.fixture
def worker(clients, recipe):
    """One of the two views has the recipe as its own."""
    by_tick = replace(BY_TICK, recipe=BY_TICK.recipe.model_copy(update={"events": recipe}))
    made = Worker(clients.settings, clients.clock, (AT_CLICK, by_tick), {"clicks": CLICKS}, StreamOptions(LATENESS, 2 * LATENESS))
    yield made
    made.close()


def sample(worker: Worker, name: str, view: str) -> float | None:
    return worker.metrics.registry.get_sample_value(f"mlplatform_stream_{name}", {"view": view})


def stopped(worker: Worker) -> list[str]:
    return [view for view in ("at_click", "by_tick") if sample(worker, "view_stopped", view)]


FAULTS = [
    FeatureError("events() gave no column"),
    pl.exceptions.ColumnNotFoundError("spent"),
    KeyError("delay"),
    ZeroDivisionError(),
    pl.exceptions.PanicException("index out of bounds"),
    OSError("a recipe may not read files, but this one does"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_view_whose_recipe_fails_stops_alone_and_has_what_it_missed_afterwards(fault, worker, recipe, shoppers, now, set_clock, clients):
    shoppers.click(now - 3 * MINUTE)
    worker.step()
    recipe.fault = fault
    for step in range(1, 6):
        set_clock(now + step * 7 * MINUTE)
        number = shoppers.click(now + step * 7 * MINUTE - MINUTE, copies=2)
        shoppers.click(now + step * 7 * MINUTE - 40 * MINUTE)  # late, while the view is stopped
        with structlog.testing.capture_logs() as told:
            worker.step()
        assert stopped(worker) == ["by_tick"]
        if step == 3:
            shoppers.land()
    assert shoppers.equal_the_batch(now - LATENESS, [AT_CLICK])
    [line] = [line for line in told if line["event"] == "view stopped"]
    assert (line["view"], line["log_level"]) == ("by_tick", "error")
    assert type(fault).__name__ in line["reason"]
    assert "recipe of by_tick" in line["mend"]
    assert sample(worker, "view_faults_total", "by_tick") == 6  # when it came, and at each try
    worker.lease.take()
    left = holder_of(clients.redis, STREAM_LEASE)
    assert left is not None
    assert list(left.note["stopped"]) == ["by_tick"]

    recipe.fault = None
    worker.step()
    assert stopped(worker) == []
    for step in range(6, 9):
        set_clock(now + step * 7 * MINUTE)
        shoppers.click(now + step * 7 * MINUTE - MINUTE)
        shoppers.click(now + step * 7 * MINUTE - 30 * MINUTE, number=number)  # a correction of what came while it was stopped
        worker.step()
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_starts_total") == 1
    assert shoppers.equal_the_batch(now - LATENESS)
    assert online_differences(clients.redis, BY_TICK, shoppers.standing(BY_TICK)) == 0
    rows = shoppers.stored(BY_TICK).drop("created")
    same = pl.all_horizontal(pl.col(c).eq_missing(pl.col(c).shift(1)) for c in rows.columns)
    assert not rows.select(same.fill_null(False).any()).item()


def test_what_the_worker_has_not_read_yet_is_not_counted_twice_though_it_has_landed(worker, recipe, shoppers, now, set_clock, monkeypatch):
    """Ingestion may be ahead of the worker: the raw table then holds entries that the other views are still to get."""
    shoppers.click(now - 3 * MINUTE)
    worker.step()
    recipe.fault = KeyError("delay")
    shoppers.click(now - 2 * MINUTE, shopper=1, spent=1.0)
    worker.step()
    real = worker.inputs.restore_one

    def behind(*arguments: Any) -> pl.DataFrame:
        shoppers.click(now - MINUTE, shopper=1, spent=2.0)
        shoppers.land()
        return real(*arguments)

    monkeypatch.setattr(worker.inputs, "restore_one", behind)
    recipe.fault = None
    worker.step()
    monkeypatch.undo()
    set_clock(now + 10 * MINUTE)
    worker.step()
    assert shoppers.equal_the_batch(now - LATENESS)
    [last] = shoppers.standing(BY_TICK).filter((pl.col("shopper") == 1) & (pl.col(TIME) == now + 10 * MINUTE))["by_tick_count_1h"]
    assert last == 2


def test_what_came_too_late_for_the_others_is_not_taken_up_by_halves(worker, recipe, shoppers, now, set_clock):
    shoppers.click(now)
    worker.step()
    recipe.fault = KeyError("delay")
    set_clock(now + 30 * MINUTE)
    shoppers.click(now - LATENESS - MINUTE, shopper=1, spent=50.0)
    shoppers.click(now + 20 * MINUTE, shopper=1)
    worker.step()
    assert worker.inputs.missed
    recipe.fault = None
    worker.step()  # finds that only a new start is exact
    worker.step()
    assert worker.metrics.registry.get_sample_value("mlplatform_stream_starts_total") == 2
    assert stopped(worker) == []
    rows = shoppers.standing(BY_TICK).filter(pl.col(TIME) == now + 30 * MINUTE)
    shoppers.land()
    assert rows.equals(shoppers.batch(BY_TICK, now + 30 * MINUTE))


def test_a_view_at_fault_from_the_start_keeps_no_other_from_starting(worker, recipe, shoppers, now):
    recipe.fault = FeatureError("no such column")
    shoppers.click(now - MINUTE)
    worker.start()
    worker.step()
    assert stopped(worker) == ["by_tick"]
    assert shoppers.equal_the_batch(now - LATENESS, [AT_CLICK])
    recipe.fault = None
    worker.step()
    assert shoppers.equal_the_batch(now - LATENESS)


@pytest.mark.parametrize("step", ["advance", "write", "publish"])
def test_wherever_in_a_round_a_view_fails_the_other_goes_on(step, open_worker, shoppers, now, set_clock, clients, monkeypatch):
    worker = open_worker()
    worker.step()
    of = {"advance": ViewState, "write": ViewOutput, "publish": ViewOutput}[step]
    real: Callable[..., Any] = getattr(of, step)
    fault = SchemaMismatchError("the online values are of another declaration") if step == "publish" else ArithmeticError("boom")

    def fails(self: Any, *arguments: Any) -> Any:
        if self.plan.name == "at_click":
            raise fault
        return real(self, *arguments)

    monkeypatch.setattr(of, step, fails)
    set_clock(now + 10 * MINUTE)
    shoppers.click(now + 5 * MINUTE)
    worker.step()
    assert sample(worker, "view_faults_total", "at_click")
    assert not sample(worker, "view_faults_total", "by_tick")
    assert shoppers.equal_the_batch(now - LATENESS, [BY_TICK])
    assert online_differences(clients.redis, BY_TICK, shoppers.standing(BY_TICK)) == 0
    monkeypatch.setattr(of, step, real)
    worker.step()
    assert stopped(worker) == []
    assert shoppers.equal_the_batch(now - LATENESS)
    assert online_differences(clients.redis, AT_CLICK, shoppers.standing(AT_CLICK)) == 0


def test_what_is_away_for_all_stops_no_view(open_worker, shoppers, now, monkeypatch):
    worker = open_worker()
    worker.step()

    def away(*_: Any) -> Any:
        raise RedisConnectionError("away")

    monkeypatch.setattr(ViewOutput, "publish", away)
    shoppers.click(now)
    with pytest.raises(RedisConnectionError):
        worker.step()
    assert stopped(worker) == []


def test_a_fault_that_stays_is_tried_at_growing_distances(worker, recipe, shoppers, now, monkeypatch):
    monkeypatch.setattr(stream_faults, "RETRY_S", (5.0, 12.0))
    seconds = [0.0]
    monkeypatch.setattr(stream_faults.time, "monotonic", lambda: seconds[0])
    recipe.fault = KeyError("delay")
    stops, waits = worker.stops, []
    for _ in range(4):
        with structlog.testing.capture_logs() as told:
            stops.stop("by_tick", recipe.fault)
        waits.append(told[0]["retry_s"])
        assert stops.due() == []
        seconds[0] += waits[-1]
        assert stops.due() == ["by_tick"]
    assert waits == [5.0, 10.0, 12.0, 12.0]
    stops.go_on("by_tick")
    seconds[0] += 1
    with structlog.testing.capture_logs() as told:
        stops.stop("by_tick", recipe.fault)  # the same again: it was not mended
    assert told[0]["retry_s"] == 12.0
    stops.go_on("by_tick")
    seconds[0] += 13
    with structlog.testing.capture_logs() as told:
        stops.stop("by_tick", recipe.fault)
    assert told[0]["retry_s"] == 5.0


def test_of_views_that_share_a_function_only_the_one_that_asks_for_too_much_is_at_fault(clients, shoppers, now):
    asks = tuple(replace(a, column="delay") for a in BY_TICK.aggregations)
    odd: ViewPlan = replace(BY_TICK, aggregations=asks)
    worker = Worker(clients.settings, clients.clock, (AT_CLICK, odd), {"clicks": CLICKS}, StreamOptions(LATENESS, 2 * LATENESS))
    shoppers.click(now - MINUTE)
    worker.step()
    shoppers.click(now)
    worker.step()
    assert stopped(worker) == ["by_tick"]
    assert shoppers.equal_the_batch(now - LATENESS, [AT_CLICK])
    worker.close()
