"""From real sources to raw tables: nothing is lost or doubled, however a run ends."""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl
import pytest

from mlplatform.clients.lake import Lake
from mlplatform.clients.stream import StreamClient
from mlplatform.ingestion.arrival import partition_days
from mlplatform.ingestion.errors import SourceError
from mlplatform.orchestration.assets.ingestion import ingestion_assets
from mlplatform.orchestration.assets.validation import split_source, write
from mlplatform.orchestration.landing import land
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange
from mlplatform.specs import Catalog, SourceSpec

YESTERDAY = date(2024, 5, 2)


@pytest.fixture
def source(shop: Catalog) -> Callable[[str], SourceSpec]:
    return lambda name: next(s for s in shop.sources if s.name == name)


@pytest.fixture
def orders(source) -> SourceSpec:
    return source("orders")


def ids(clients: Clients, days: DayRange | None = None) -> list[str]:
    return sorted(clients.lake.read(("raw", "orders"), days)["order_id"].to_list())


def test_what_a_stream_brings_is_stamped_and_acknowledged(clients, systems, orders, today, now):
    systems.publish(systems.order(1, now - timedelta(hours=1)), systems.order(2, now - timedelta(hours=30)))
    landed = land(clients, orders, today, "run")
    rows = clients.lake.read(("raw", "orders")).sort("order_id")
    assert (landed.rows, landed.unreadable) == (2, 0)
    assert landed.days == DayRange(YESTERDAY, date(2024, 5, 3))  # the late one belongs to another day, and says so
    assert rows["event_date"].to_list() == [date(2024, 5, 3), YESTERDAY]
    assert rows["received_at"].to_list() == [now, now]
    assert rows["payload"].null_count() == 2
    assert systems.waiting() == 0


def test_a_run_ends_although_events_keep_coming(clients, systems, orders, today, now, monkeypatch):
    real, more = StreamClient.ack, iter(range(2, 50))

    def acknowledged_while_another_comes(*arguments: Any) -> int:
        systems.publish(systems.order(next(more), now))
        return real(*arguments)

    monkeypatch.setattr(StreamClient, "ack", acknowledged_while_another_comes)
    systems.publish(systems.order(1, now))
    assert land(clients, orders, today, "run").rows == 1
    assert land(clients, orders, today, "the next run").rows == 1
    assert ids(clients) == ["o1", "o2"]


def test_an_empty_stream_lands_nothing_and_the_next_run_does(clients, systems, orders, today, now):
    assert land(clients, orders, today, "run").rows == 0
    assert clients.lake.row_count(("raw", "orders")) == 0  # read and empty, which is not the same as never read
    systems.publish(systems.order(1, now))
    assert land(clients, orders, today, "run").rows == 1
    assert land(clients, orders, today, "run").rows == 0
    assert ids(clients) == ["o1"]


@pytest.mark.parametrize("killed_at", ["before the commit", "after the commit"])
def test_a_run_killed_at_its_commit_leaves_every_entry_once(clients, systems, orders, today, now, monkeypatch, killed_at):
    systems.publish(*(systems.order(n, now) for n in range(5)))
    real = Lake.append

    def dies(self: Lake, *args: Any, **options: Any) -> bool:
        if killed_at == "after the commit":
            real(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            land(clients, orders, today, "killed")
    assert systems.waiting() == 5
    systems.publish(systems.order(5, now))
    land(clients, orders, today, "next")
    assert ids(clients) == [f"o{n}" for n in range(6)]
    assert systems.waiting() == 0


def test_a_run_killed_while_it_acknowledges_leaves_every_entry_once(clients, systems, orders, today, now, monkeypatch):
    systems.publish(*(systems.order(n, now) for n in range(3)))

    def dies(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamClient, "ack", dies)
        with pytest.raises(KeyboardInterrupt):
            land(clients, orders, today, "killed")
    land(clients, orders, today, "next")
    assert ids(clients) == ["o0", "o1", "o2"]


def test_several_batches_land_in_one_run(clients, systems, orders, today, now, monkeypatch):
    monkeypatch.setattr("mlplatform.orchestration.landing.STREAM_BATCH", 2)
    systems.publish(*(systems.order(n, now) for n in range(5)), "not json")
    landed = land(clients, orders, today, "run")
    assert (landed.rows, landed.unreadable) == (5, 1)
    assert clients.lake.row_count(("raw", "orders")) == 6


def test_unreadable_entries_keep_their_text_and_end_in_quarantine(clients, systems, orders, source, today, now):
    land(clients, source("shops"), None, "run")
    result, summary, _, _ = split_source(clients, source("shops"), None)
    write(clients, source("shops"), result, None, "run", summary)
    systems.publish(systems.order(1, now), "{broken", *(systems.order(n, now) for n in range(2, 9)))
    landed = land(clients, orders, today, "run")
    assert (landed.rows, landed.unreadable) == (8, 1)
    assert "not JSON" in landed.notes["first_unreadable"]
    raw = clients.lake.read(("raw", "orders")).filter(pl.col("payload").is_not_null())
    assert raw["payload"].to_list() == ["{broken"]
    assert raw["event_date"].to_list() == [today.last]
    result, summary, _, _ = split_source(clients, orders, today)
    write(clients, orders, result, today, "run", summary)
    aside = clients.lake.read(("quarantine", "orders"))
    assert aside.select("payload", pl.col("broken_rules").list.join(",")).rows() == [("{broken", "unreadable")]
    assert (summary.validated, summary.quarantined, summary.failures) == (8, 1, ())


def test_an_event_of_a_day_without_a_partition_is_unreadable_and_moves_no_day(clients, systems, orders, shop, today, now):
    systems.publish(systems.order(1, now), systems.order(2, now.replace(year=1999)), systems.order(3, now + timedelta(days=800)))
    landed = land(clients, orders, today, "run", partition_days(shop, now))
    assert (landed.rows, landed.unreadable, landed.days) == (1, 2, today)
    assert "placed_at is on 1999-05-03, outside the days 2024-05-01 … 2024-05-04" in landed.notes["first_unreadable"]
    raw = clients.lake.read(("raw", "orders"), today)
    assert raw.height == 3
    assert raw["payload"].drop_nulls().str.json_path_match("$.order_id").sort().to_list() == ["o2", "o3"]


def test_only_unreadable_entries_are_landed_too(clients, systems, orders, today):
    systems.publish("1", "[]", '{"order_id": 7}')
    landed = land(clients, orders, today, "run")
    assert (landed.rows, landed.unreadable) == (0, 3)
    assert clients.lake.row_count(("raw", "orders"), today) == 3


def test_archive_and_stream_of_the_same_day_do_not_lose_each_other(clients, systems, orders, today, now):
    systems.archive(today.first, systems.order(1, now - timedelta(hours=9)), systems.order(2, now - timedelta(hours=8)))
    systems.publish(systems.order(3, now))
    assert land(clients, orders, today, "run").rows == 3
    # The day's archive is delivered again with a correction: it replaces its own rows, and not the streamed one.
    systems.archive(today.first, systems.order(1, now - timedelta(hours=9), amount=11.0), systems.order(4, now - timedelta(hours=7)))
    systems.publish(systems.order(5, now))
    land(clients, orders, today, "again")
    rows = clients.lake.read(("raw", "orders"))
    assert sorted(rows["order_id"]) == ["o1", "o3", "o4", "o5"]
    assert rows.filter(pl.col("order_id") == "o1")["amount"].to_list() == [11.0]
    assert sorted(rows.filter(pl.col("stream_id") != "")["order_id"]) == ["o3", "o5"]


def test_a_replayed_archive_does_not_bring_committed_entries_back_twice(clients, systems, orders, today, now):
    systems.publish(systems.order(1, now))
    land(clients, orders, today, "run")
    systems.archive(today.first, systems.order(2, now))
    land(clients, orders, today, "archive")  # rewrites the day; the stream's position must survive that
    systems.redis.xgroup_destroy("shop.orders", "mlplatform")  # a lost group delivers everything again
    land(clients, orders, today, "group lost")
    assert ids(clients) == ["o1", "o2"]


def test_days_of_the_archive_that_are_not_asked_for_stay(clients, systems, orders, today, now):
    systems.archive(YESTERDAY, systems.order(1, now - timedelta(days=1)))
    systems.archive(today.first, systems.order(2, now))
    land(clients, orders, DayRange(YESTERDAY, today.last), "both")
    (systems.home / "archive" / "orders" / f"{YESTERDAY}.parquet").unlink()
    land(clients, orders, DayRange(YESTERDAY, today.last), "one file is gone")
    assert ids(clients) == ["o1", "o2"]


def test_an_archive_with_rows_of_another_day_is_refused_whole(clients, systems, orders, today, now):
    systems.archive(today.first, systems.order(1, now), systems.order(2, now - timedelta(days=3)))
    with pytest.raises(SourceError, match="outside 2024-05-03"):
        land(clients, orders, today, "run")
    assert not clients.lake.exists(("raw", "orders"))


def test_windows_of_an_api_end_at_the_clock_and_replace_their_days(api, systems, source, today, now):
    clients = PlatformResource().clients
    api.items = [{"shop": "a", "hour": f"2024-05-03T{h:02}:00:00Z", "visitors": h} for h in range(24)]
    landed = land(clients, source("footfall"), today, "run")
    assert landed.rows == 12  # noon: what the source knows of the afternoon is not asked for
    api.items = api.items[:4]
    land(clients, source("footfall"), today, "corrected")
    assert clients.lake.row_count(("raw", "footfall")) == 4


def test_a_window_after_the_clock_is_not_asked_for(api, source, today):
    clients = PlatformResource().clients
    tomorrow = DayRange(today.last + timedelta(days=1), today.last + timedelta(days=1))
    assert land(clients, source("footfall"), tomorrow, "run").rows == 0


def test_a_source_that_is_down_fails_with_the_mend_and_the_next_run_catches_up(
    api, systems, shop, today, materialize, why, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlplatform.orchestration.policy.SOURCE_RETRIES", dg.RetryPolicy(max_retries=0))
    assets = [a for a in ingestion_assets(shop) if a.key.path == ["raw", "footfall"]]
    api.items = [{"shop": "a", "hour": "2024-05-03T01:00:00Z", "visitors": 1}]
    api.down()
    failed = materialize(assets, today)
    assert not failed.success
    assert "footfall" in why(failed)
    assert "Check" in why(failed) or "run again" in why(failed)
    api.up()
    assert materialize(assets, today).success
    assert PlatformResource().clients.lake.row_count(("raw", "footfall")) == 1


def test_a_stream_server_that_is_down_fails_with_the_mend(environment, shop, today, materialize, why, monkeypatch):
    from mlplatform.settings import load_settings

    monkeypatch.setattr("mlplatform.orchestration.policy.SOURCE_RETRIES", dg.RetryPolicy(max_retries=0))
    environment.setenv("MLPLATFORM_SOURCE_EVENTS", "redis://:secret@127.0.0.1:9/0")
    load_settings.cache_clear()
    failed = materialize([a for a in ingestion_assets(shop) if a.key.path == ["raw", "orders"]], today)
    assert not failed.success
    assert "does not answer" in why(failed)
    assert "secret" not in why(failed)


def test_a_raw_asset_tells_what_it_received(systems, shop, today, now: datetime, materialize):
    systems.publish(systems.order(1, now), "{broken")
    result = materialize([a for a in ingestion_assets(shop) if a.key.path == ["raw", "orders"]], today)
    metadata = result.asset_materializations_for_node("raw_orders")[0].metadata
    assert metadata["rows_received"].value == 1
    assert metadata["unreadable_entries"].value == 1
    assert metadata["first_day"].value == "2024-05-03"
