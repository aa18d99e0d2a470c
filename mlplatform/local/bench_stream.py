"""`mlplatform bench stream`: from an event to its values readable in Redis, and what an event costs, at a given rate.

Belongs here: history, load, reading along, the figures. Does not belong here: the world (`stream_world`), kills (`stream_kills`).

One worker on one core keeps two views that have a row at each event, once with windows of 1 hour to 30 days and once with
windows of up to an hour, over the same history. A process publishes at the rate; this one reads Redis as a service would
and waits for each sampled event (one in a hundred) to be readable in both views.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from redis import Redis

from mlplatform.clients.lake import Lake, with_day
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.local import services
from mlplatform.local.stream_world import LATENESS_S, STREAM, WORLD, click, clicks, payload, plans
from mlplatform.local.supervisor import Supervisor

SHOPPERS = 3_000
HISTORY_DAYS = 30
HISTORY_CLICKS = 300_000
LATENESS = timedelta(seconds=60)
SAMPLES = "bench:samples"
SAMPLE_EVERY = 100
TARGET_P99_S = 2.0
_TICK_S = 0.02  # the publisher's step
_POLL_S = 0.02


@dataclass(frozen=True)
class StreamFigures:
    """One run. Latencies in seconds, from the event to its values readable in both views."""

    world: str
    events: int
    events_per_s: float
    samples: int
    unread: int
    p50_s: float
    p99_s: float
    max_s: float
    cpu_s_per_1000_events: float
    core_busy: float
    start_s: float
    max_rss_mb: float
    entries_left: int


def run_bench_stream(seconds: int, rate: int, kills: int, as_json: bool) -> int:
    """Prints the figures. Returns 0 where the target is met: 99 of 100 events readable within 2 s, or nothing lost by kills."""
    from mlplatform.printing import print_json, say, table

    with tempfile.TemporaryDirectory() as folder, Supervisor(Path(folder)) as supervisor:
        valkey = supervisor.start(services.valkey(Path(folder)))
        if kills:
            from mlplatform.local.stream_kills import run_kills

            report = run_kills(Path(folder) / "world", valkey.url, kills).to_dict()
            print_json(report) if as_json else table("killed workers, against a batch", [report], empty="")
            return 0 if report["passed"] else 1
        runs = [measure(Path(folder) / world, valkey.url, world, seconds, rate) for world in ("long", "short")]
    long, short = runs
    growth = long.cpu_s_per_1000_events / short.cpu_s_per_1000_events
    if as_json:
        print_json({"runs": [asdict(r) for r in runs], "cost_of_30_days_over_1_hour": round(growth, 2), "target_p99_s": TARGET_P99_S})
    else:
        table(f"streaming at {rate} events/s, one core", [asdict(r) for r in runs], empty="")
        say(f"an event costs {growth:.2f} times as much with windows of up to 30 days as with windows of up to an hour")
    return 0 if long.p99_s <= TARGET_P99_S and not long.unread else 1


def measure(home: Path, redis_url: str, world: str, seconds: int, rate: int) -> StreamFigures:
    """One run of one world, on an emptied Redis and a lake of its own."""
    home.mkdir(parents=True)
    log = home / "worker.log"
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        _write_history(home)
        environment = os.environ | {
            "MLPLATFORM_HOME": str(home),
            "MLPLATFORM_REDIS_URL": redis_url,
            "MLPLATFORM_CLOCK": "system",
            WORLD: world,
            LATENESS_S: str(LATENESS.total_seconds()),
        }
        with log.open("wb") as output:
            worker = _on_one_core([sys.executable, "-m", "mlplatform.local.stream_world"], environment, output)
        try:
            started = _await_line(log, "started", worker)
            command = [sys.executable, "-m", "mlplatform.local.bench_stream", redis_url, str(seconds), str(rate)]
            publisher = subprocess.Popen(command, env=environment)
            began = time.monotonic()
            latencies, unread = _read_along(redis, world, publisher)
            took = time.monotonic() - began
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=120)
        stopped = _await_line(log, "stopped", None)
        events = int(redis.xlen(STREAM))
        left = len(redis.xrange(STREAM, min=f"({stopped['positions']['clicks']}"))
    found = np.array(latencies or [float("nan")])
    cpu = stopped["cpu_s"] - started["cpu_s"]
    return StreamFigures(
        world=world,
        events=events,
        events_per_s=round(events / seconds, 1),
        samples=len(latencies),
        unread=unread,
        p50_s=round(float(np.quantile(found, 0.5)), 3),
        p99_s=round(float(np.quantile(found, 0.99)), 3),
        max_s=round(float(found.max()), 3),
        cpu_s_per_1000_events=round(cpu / events * 1000, 4),
        core_busy=round(cpu / took, 2),
        start_s=started["seconds"],
        max_rss_mb=stopped["max_rss_mb"],
        entries_left=left,
    )


def _write_history(home: Path) -> None:
    """A month of clicks in the raw table, as an archive would have brought them."""
    chance, now = random.Random(1), datetime.now(UTC)  # noqa: S311  # no secret
    seconds = HISTORY_DAYS * 86_400
    times = [now - timedelta(seconds=chance.random() * seconds) for _ in range(HISTORY_CLICKS)]
    rows = pl.DataFrame(
        {
            "click_id": [f"h{n}" for n in range(HISTORY_CLICKS)],
            "shopper": [chance.randrange(SHOPPERS) for _ in range(HISTORY_CLICKS)],
            "clicked_at": times,
            "spent": [round(chance.random() * 200, 2) for _ in range(HISTORY_CLICKS)],
            "received_at": times,
            "stream_id": [""] * HISTORY_CLICKS,
            "payload": [None] * HISTORY_CLICKS,
        },
        schema_overrides={"clicked_at": pl.Datetime("us", "UTC"), "received_at": pl.Datetime("us", "UTC"), "payload": pl.String},
    )
    Lake(str(home / "lake")).append(("raw", "clicks"), with_day(rows, "clicked_at"))


def _on_one_core(command: list[str], environment: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    """A child inherits the cores of its parent, its threads too; where the system knows no such thing, it has all."""
    if not hasattr(os, "sched_setaffinity"):
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(mine)})
    try:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    finally:
        os.sched_setaffinity(0, mine)


def _await_line(log: Path, event: str, worker: "subprocess.Popen[bytes] | None", timeout_s: float = 180.0) -> dict[str, Any]:
    """The worker's log line of an event. Raises RuntimeError where the worker ends or says nothing."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if f'"event": "{event}"' in line:
                return dict(json.loads(line))
        if worker is not None and worker.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the worker never said '{event}': {log.read_text()[-2000:]}")


def _read_along(redis: Redis, world: str, publisher: "subprocess.Popen[bytes]") -> tuple[list[float], int]:
    """Seconds from each sampled event until both views hold it or a later one of its shopper; and how many never were read."""
    layouts = [ViewLayout.declare(plan.name, plan.join_keys, plan.features, plan.ttl) for plan in plans(world)]
    reader = SyncOnlineReader(redis, ONLINE_PROJECT)
    waiting: list[tuple[int, int]] = []
    latencies: list[float] = []
    deadline: float | None = None
    while deadline is None or (waiting and time.monotonic() < deadline):
        samples: Any = redis.lpop(SAMPLES, 1000)  # redis-py's type covers its other forms too
        for sample in samples or []:
            shopper, moment = sample.split()
            waiting.append((int(shopper), int(moment)))
        found = reader.read([(layout, (shopper,)) for shopper, _ in waiting for layout in layouts])
        now = time.time()
        still = []
        for i, (shopper, moment) in enumerate(waiting):
            if all(value is not None and value.event_us >= moment for value in found[2 * i : 2 * i + 2]):
                latencies.append(now - moment / 1e6)
            else:
                still.append((shopper, moment))
        waiting = still
        if deadline is None and publisher.poll() is not None and not redis.llen(SAMPLES):
            deadline = time.monotonic() + 30
        time.sleep(_POLL_S)
    return latencies, len(waiting)


def publish(redis_url: str, seconds: int, rate: int) -> None:
    """Clicks at a steady rate, each at the time it is sent; one in a hundred is noted for the reader."""
    source, began, sent = clicks(int(time.time()), SHOPPERS), time.time(), 0
    with Redis.from_url(redis_url) as redis:
        while sent < seconds * rate:
            due = min(int((time.time() - began) * rate), seconds * rate)
            pipeline, samples = redis.pipeline(transaction=False), []
            for _ in range(due - sent):
                number, shopper, spent = next(source)
                at = datetime.now(UTC)
                pipeline.xadd(STREAM, payload(click(number, shopper, at, spent)))  # type: ignore[arg-type]
                if number % SAMPLE_EVERY == 0:
                    samples.append(f"{shopper} {int(at.timestamp() * 1e6)}")
            if samples:
                pipeline.rpush(SAMPLES, *samples)
            pipeline.execute()
            sent = due
            time.sleep(_TICK_S)


if __name__ == "__main__":
    publish(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
