"""Kills a streaming worker again and again while events flow, then compares what it left with a batch backfill.

Belongs here: `bench stream --kills` and the test of the same. Does not belong here: the world (`stream_world`).
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from redis import Redis

from mlplatform.clock import SimulatedClock
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.commands import Client
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIME, ViewPlan
from mlplatform.local.stream_world import CLICKS, LATENESS_S, STREAM, WORLD, click, clicks, payload, plans
from mlplatform.records import DayRange
from mlplatform.settings import Settings

BEGIN = datetime(2024, 5, 1, 12, tzinfo=UTC)
LATENESS = timedelta(hours=6)
SPEED = 600.0  # ten minutes of the world a second: a tick each second
SHOPPERS = 20
WORK_S = 0.8  # how long a worker may work at most before it is killed
DURING_START = 4  # every fourth worker is killed while it starts


@dataclass
class KillReport:
    """What came of it. `lost` and `wrong` count rows of the tables (or values online) that a batch gives otherwise."""

    kills: int = 0
    starts_that_wrote: int = 0
    events: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    wrong: int = 0
    written_twice: int = 0
    online_wrong: int = 0
    start_s: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kills > 0 and self.events > 0 and not (self.lost or self.wrong or self.written_twice or self.online_wrong)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


class World:
    """Events that flow while a worker is killed: some late, some delivered twice."""

    def __init__(self, home: Path, redis_url: str, seed: int) -> None:
        self.home, self.redis = home, Redis.from_url(redis_url)
        self.clock = SimulatedClock(home / "clock.json")
        self.settings = Settings(home=home, redis_url=redis_url, clock=str(self.clock.path))  # type: ignore[arg-type]
        self.environment = os.environ | {
            "MLPLATFORM_HOME": str(home),
            "MLPLATFORM_REDIS_URL": redis_url,
            "MLPLATFORM_CLOCK": str(self.clock.path),
            WORLD: "small",
            LATENESS_S: str(LATENESS.total_seconds()),
        }
        self.events = 0
        self._chance = random.Random(seed)  # noqa: S311  # no secret
        self._clicks = clicks(seed, SHOPPERS)
        self._stop = threading.Event()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        self.clock.set(BEGIN, SPEED)
        publisher = threading.Thread(target=self._publish, name="publish-clicks")
        publisher.start()
        try:
            yield
        finally:
            self._stop.set()
            publisher.join()
            self.clock.set(self.clock.now())

    def _publish(self) -> None:
        while not self._stop.wait(0.02):
            number, shopper, spent = next(self._clicks)
            late = timedelta(minutes=self._chance.choice((0, 0, 0, 0, 0, 0, 5, 90)))
            event = payload(click(number, shopper, self.clock.now() - late, spent))
            for _ in range(2 if self._chance.random() < 0.1 else 1):
                self.redis.xadd(STREAM, event)  # type: ignore[arg-type]
            self.events += 1

    def spawn(self, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "mlplatform.local.stream_world"], env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def land(self) -> None:
        """Ingestion at work beside the worker: the raw table takes over what the stream has."""
        from mlplatform.orchestration.landing import land
        from mlplatform.orchestration.resources import Clients

        today = self.clock.now().date()
        land(Clients(self.settings), CLICKS, DayRange(today, today), "ingestion")


def run_kills(home: Path, redis_url: str, kills: int, seed: int = 1, land_every: int = 5) -> KillReport:
    """Kills `kills` workers at random points of their life, lets a last one finish, and compares."""
    world, report = World(home, redis_url, seed), KillReport()
    chance, log = random.Random(seed), home / "worker.log"  # noqa: S311  # no secret
    home.mkdir(parents=True, exist_ok=True)
    with world.flowing():
        life_s = _measure_start(world, log)
        report.start_s = round(life_s, 2)
        for number in range(kills):
            before = _commits(world)
            seen = _starts(log)
            worker = world.spawn(log)
            if number % DURING_START:
                _await(lambda seen=seen: _starts(log) > seen, worker)  # type: ignore[misc]
                time.sleep(chance.uniform(0, WORK_S))
            else:
                time.sleep(chance.uniform(0, life_s))
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            report.kills += 1
            report.starts_that_wrote += _commits(world) > before
            if number % land_every == 0:
                world.land()
    _finish(world, log)
    report.events = world.events
    _compare(world, report)
    return report


def _measure_start(world: World, log: Path) -> float:
    began = time.monotonic()
    worker = world.spawn(log)
    _await(lambda: _starts(log) > 0, worker)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    return time.monotonic() - began


def _finish(world: World, log: Path) -> None:
    """A last worker reads what is left, and is asked to end."""
    seen = _starts(log)
    worker = world.spawn(log)
    _await(lambda: _starts(log) > seen, worker)
    time.sleep(1.0)
    worker.send_signal(signal.SIGTERM)
    if worker.wait(timeout=60) != 0:
        raise RuntimeError(f"the worker did not end as asked: {log.read_text()[-2000:]}")


def _starts(log: Path) -> int:
    return log.read_bytes().count(b"started") if log.exists() else 0


def _await(happened: Any, worker: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if worker.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the worker did not start; its log is worker.log in the home")
        time.sleep(0.02)


def _commits(world: World) -> int:
    from mlplatform.clients.lake import Lake

    lake = Lake(world.settings.lake_root)
    return sum(lake.version(("offline", plan.name)) + 1 for plan in plans("small") if lake.exists(("offline", plan.name)))


def _compare(world: World, report: KillReport) -> None:
    """The tables and Redis against a batch over all events, as ingestion and validation leave them."""
    from mlplatform.clients.lake import Lake
    from mlplatform.validation.split import split

    world.land()
    lake, now = Lake(world.settings.lake_root), world.clock.now()
    tables = {"clicks": split(lake.read(("raw", "clicks")), CLICKS, {}).validated}
    for plan in plans("small"):
        stored = lake.read(("offline", plan.name)).drop("event_date").sort(TIME, *plan.join_keys, "created")
        newest = stored.unique([*plan.join_keys, TIME], keep="last", maintain_order=True).drop("created")
        last = now if plan.event_triggered else EPOCH + (now - EPOCH) // plan.cadence * plan.cadence
        expected = compute(plan, tables, BEGIN - LATENESS if plan.event_triggered else BEGIN, last)
        newest = newest.filter(pl.col(TIME) >= expected[TIME].min())
        # Withdrawn rows hold nothing; the batch does not give them.
        newest = newest.filter(~pl.all_horizontal(pl.col(plan.features).is_null()))
        report.rows[plan.name] = expected.height
        report.lost += expected.join(newest, on=[*plan.join_keys, TIME], how="anti").height
        report.wrong += newest.join(expected, on=newest.columns, how="anti", nulls_equal=True).height
        report.written_twice += _repeats(stored, plan)
        report.online_wrong += online_differences(world.redis, plan, newest)


def _repeats(stored: pl.DataFrame, plan: ViewPlan) -> int:
    """Rows that say again what the row before them of the same entity and time said."""
    identity = [*plan.join_keys, TIME]
    same = pl.all_horizontal(pl.col(c).eq_missing(pl.col(c).shift(1)) for c in (*identity, *plan.features))
    return int(stored.select(same.fill_null(False).sum()).item())


def online_differences(online: Client, plan: ViewPlan, rows: pl.DataFrame) -> int:
    """Entities whose value in the online store is not the newest of `rows`."""
    layout = ViewLayout.declare(plan.name, plan.join_keys, plan.features, plan.ttl)
    newest = rows.sort(TIME).unique(list(plan.join_keys), keep="last")
    found = SyncOnlineReader(online, ONLINE_PROJECT).read([(layout, keys) for keys in newest.select(layout.join_keys).iter_rows()])
    wanted = newest.select(plan.features).fill_null(float("nan")).to_numpy()
    return sum(value is None or not np.array_equal(value.values, row, equal_nan=True) for value, row in zip(found, wanted, strict=True))
