"""The flight views streamed through a night with late and repeated deliveries, against a batch backfill, cell by cell."""

from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest

from mlplatform.catalog.flights.sources import SOURCES
from mlplatform.features.engine import compute
from mlplatform.features.plan import EPOCH, TIME, required_days
from mlplatform.local.deliveries import DELIVERED_AT, EVENT_TIME, DeliveryModel, all_deliveries, deliveries_between
from mlplatform.local.nycflights import load_world
from mlplatform.local.publisher import Publisher
from mlplatform.orchestration.assets.validation import split_source, write
from mlplatform.orchestration.landing import land
from mlplatform.orchestration.streaming import StreamOptions, Worker, choose
from mlplatform.records import DayRange

START = datetime(2013, 9, 1, tzinfo=UTC)
HOURS = 15  # to the afternoon: departures, arrivals, overdue flights, cancellations of the day before
STEP = timedelta(minutes=30)
DAY = DayRange(date(2013, 9, 1), date(2013, 9, 1))
HISTORY = DayRange(date(2013, 7, 31), date(2013, 8, 31))


@pytest.fixture(scope="module")
def plans(feast_imported: None):
    from mlplatform.features.declared import plans

    return plans("feature_definitions.flights")


@pytest.fixture
def streams(clients, set_clock):
    """What was delivered before the start lies in the raw tables, as the archive brings it; the rest waits to be published."""
    world, live = load_world(), {}
    set_clock(START)
    for source, rows in all_deliveries(world, DeliveryModel(late_share=0.05, duplicate_share=0.02)).items():
        known = deliveries_between(rows, None, START).filter(pl.col(EVENT_TIME[source]).dt.date() >= HISTORY.first)
        day = pl.col(EVENT_TIME[source]).dt.date().alias("event_date")
        raw = known.rename({DELIVERED_AT: "received_at"}).with_columns(day, stream_id=pl.lit(""), payload=pl.lit(None, pl.String))
        clients.lake.append(("raw", source), raw)
        live[source] = deliveries_between(rows, START, START + timedelta(hours=HOURS + 1))
    for source in ("airlines", "airports", "planes"):
        clients.lake.append(("validated", source), getattr(world, source), partitioned=False)
    from redis import Redis

    with Redis.from_url(clients.settings.redis_url.get_secret_value(), decode_responses=True) as redis:
        yield Publisher(redis, live, "test")


@pytest.mark.timeout(600)
def test_the_tables_of_the_stream_equal_those_of_a_backfill(clients, set_clock, streams, plans):
    sources = {spec.name: spec for spec in SOURCES}
    chosen, against = choose(plans, sources)
    assert set(against) == {"origin_weather"}
    now, worker = START, None
    while now <= START + timedelta(hours=HOURS):
        set_clock(now)
        streams.publish_until(now)
        if worker is None or now.hour % 6 == 5:  # now and then a new one takes over, without a word from the old
            if worker is not None:
                worker.lease.release()  # of a killed one it would run out, and no test waits for that
            worker = Worker(clients.settings, clients.clock, chosen, sources, StreamOptions(lateness=timedelta(hours=3)))
        worker.step()
        assert not worker.stops.reasons()
        now += STEP
    now -= STEP
    for name in EVENT_TIME:
        land(clients, sources[name], DAY, "ingestion")
        for days in (HISTORY, DAY):
            result, summary, *_ = split_source(clients, sources[name], days)
            write(clients, sources[name], result, days, "validation", summary)
    repeated = sum(counts.repeated for counts in worker.inputs.counts.values())
    assert repeated > 0
    for plan in chosen:
        tables = {source: clients.lake.read(("validated", source), days) for source, days in required_days(plan, DAY).items()}
        last = EPOCH + (now - EPOCH) // plan.cadence * plan.cadence
        expected = compute(plan, tables, START, last)
        stored = clients.lake.read(("offline", plan.name), DAY).drop("event_date")
        newest = stored.sort("created").unique([*plan.join_keys, TIME], keep="last").drop("created").sort(TIME, *plan.join_keys)
        assert newest.equals(expected), plan.name
        assert expected.height > 0
    restated = clients.lake.read(("offline", "origin_congestion"), DAY).group_by("origin", TIME).len()
    assert restated["len"].max() > 1  # late deliveries did restate
