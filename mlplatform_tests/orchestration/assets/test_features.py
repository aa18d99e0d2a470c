"""Feature assets of a small view: what is appended when, with which `created`, and what reaches the online store."""

from collections.abc import Mapping
from datetime import date, datetime, timedelta

import dagster as dg
import numpy as np
import polars as pl
import pytest
from redis import Redis

from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store import codec
from mlplatform.features.plan import ViewPlan, WindowPlan
from mlplatform.orchestration.assets.features import feature_assets, write_offline, write_online
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange
from mlplatform.specs import FeatureRecipe

UTC_US = pl.Datetime("us", "UTC")


def totals(tables: Mapping[str, pl.DataFrame], ticks: pl.Series) -> pl.DataFrame:
    """Orders and their sum by shop in the hour before each tick; a shop without an order has no row."""
    moments = pl.DataFrame({"event_timestamp": ticks}).with_columns((pl.col("event_timestamp") - pl.duration(hours=1)).alias("since"))
    rows = moments.join(tables["orders"], how="cross").filter(
        pl.col("placed_at") > pl.col("since"), pl.col("placed_at") <= pl.col("event_timestamp")
    )
    return rows.group_by("shop", "event_timestamp").agg(
        pl.len().cast(pl.Float64).alias("orders_1h"), pl.col("amount").sum().alias("amount_1h")
    )


PLAN = ViewPlan(
    name="shop_totals",
    join_keys=("shop",),
    features=("orders_1h", "amount_1h"),
    ttl=timedelta(hours=6),
    description="Orders of the last hour",
    owner="team:data",
    recipe=FeatureRecipe(view="shop_totals", inputs={"orders": timedelta(hours=1)}, cadence=timedelta(hours=1), compute=totals),
    fingerprint="f" * 64,
)


@pytest.fixture
def place(clients: Clients, now: datetime):
    """Writes the validated orders: (shop, hours before now, amount)."""

    def write(*orders: tuple[str, float, float]) -> None:
        rows = pl.DataFrame(
            {
                "order_id": [f"o{i}" for i in range(len(orders))],
                "shop": [o[0] for o in orders],
                "placed_at": [now - timedelta(hours=o[1]) for o in orders],
                "amount": [o[2] for o in orders],
            },
            schema_overrides={"placed_at": UTC_US},
        ).with_columns(pl.col("placed_at").dt.date().alias("event_date"))
        if clients.lake.exists(("validated", "orders")):
            clients.lake.replace(("validated", "orders"), rows, DayRange(date(2024, 4, 1), date(2024, 6, 1)))
        else:
            clients.lake.append(("validated", "orders"), rows)

    return write


def stored(clients: Clients) -> pl.DataFrame:
    return clients.lake.read(("offline", "shop_totals")).sort("event_timestamp", "shop", "created")


YESTERDAY = DayRange(date(2024, 5, 2), date(2024, 5, 2))


def test_history_is_written_as_if_the_feature_had_existed(clients, place):
    place(("a", 20, 5.0), ("b", 30, 7.0))
    write_offline(clients, PLAN, YESTERDAY, "run")
    rows = stored(clients)
    assert rows.height == 2
    assert (rows["created"] == rows["event_timestamp"]).all()


def test_live_ticks_are_created_when_they_are_computed(clients, place, today, now):
    place(("a", 2, 5.0))
    write_offline(clients, PLAN, today, "run")
    assert stored(clients)["created"].to_list() == [now]


def test_ticks_that_have_not_come_are_not_written(clients, place, today, now):
    place(("a", -2, 5.0), ("a", 2, 5.0))
    write_offline(clients, PLAN, today, "run")
    assert stored(clients)["event_timestamp"].max() <= now


def test_a_day_that_lies_ahead_writes_nothing(clients, place, today):
    place(("a", 2, 5.0))
    tomorrow = DayRange(today.last + timedelta(days=1), today.last + timedelta(days=1))
    assert write_offline(clients, PLAN, tomorrow, "run").is_empty()
    assert not clients.lake.exists(("offline", "shop_totals"))


def test_a_backfill_that_reaches_into_today_keeps_history_as_history(clients, place, today, now):
    place(("a", 20, 5.0), ("a", 2, 5.0))
    write_offline(clients, PLAN, DayRange(YESTERDAY.first, today.last), "run")
    rows = stored(clients)
    assert rows["event_date"].to_list() == [YESTERDAY.first, today.first]
    assert rows["created"].to_list() == [rows["event_timestamp"][0], now]


def test_a_replay_writes_nothing(clients, place, today):
    place(("a", 2, 5.0), ("b", 3, 1.0))
    write_offline(clients, PLAN, today, "run")
    version = clients.lake.version(("offline", "shop_totals"))
    assert write_offline(clients, PLAN, today, "replay").is_empty()
    assert clients.lake.version(("offline", "shop_totals")) == version


def test_a_correction_is_created_now_and_what_was_known_before_stays(clients, place, today, now, set_clock):
    place(("a", 20, 5.0))
    write_offline(clients, PLAN, YESTERDAY, "history")
    place(("a", 20, 9.0))
    later = now + timedelta(minutes=30)
    set_clock(later)
    write_offline(clients, PLAN, YESTERDAY, "corrected")
    rows = stored(clients)
    assert rows["amount_1h"].to_list() == [5.0, 9.0]
    assert rows["created"].to_list() == [rows["event_timestamp"][0], later]


def test_a_value_that_is_no_longer_computed_is_withdrawn(clients, place, now):
    place(("a", 20, 5.0), ("b", 20, 6.0))
    write_offline(clients, PLAN, YESTERDAY, "history")
    place(("b", 20, 6.0))
    write_offline(clients, PLAN, YESTERDAY, "order of a was no order")
    rows = stored(clients).filter(pl.col("shop") == "a")
    assert rows["amount_1h"].to_list() == [5.0, None]
    assert rows["created"][1] == now
    assert write_offline(clients, PLAN, YESTERDAY, "again").is_empty()


def test_ticks_of_a_late_day_after_the_start_are_live(clients, place, today, now, set_clock):
    place(("a", 2, 5.0))
    write_offline(clients, PLAN, today, "live begins")
    place(("a", 2, 5.0), ("b", -3, 1.0))
    tomorrow = now + timedelta(days=1)
    set_clock(tomorrow)
    write_offline(clients, PLAN, today, "the day once more, late")
    rows = stored(clients).filter(pl.col("shop") == "b")
    assert rows["created"].to_list() == [tomorrow]


def payments(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    return tables["orders"].select("shop", pl.col("placed_at").alias("event_timestamp"), "amount")


AT_EVENTS = ViewPlan(
    name="shop_totals",
    join_keys=("shop",),
    features=("amount_6h",),
    ttl=timedelta(hours=6),
    description="Sold in the last six hours",
    owner="team:data",
    recipe=FeatureRecipe(
        view="shop_totals", inputs={"orders": timedelta(hours=6)}, cadence=timedelta(hours=1), trigger="event", events=payments
    ),
    aggregations=(WindowPlan("amount", "sum", timedelta(hours=6), "amount_6h"),),
    hop=timedelta(hours=1),
    fingerprint="e" * 64,
)


def test_an_event_triggered_view_is_backfilled_and_restated_by_day(clients, place, now, set_clock):
    place(("a", 20, 5.0), ("a", 19.5, 0.25))
    write_offline(clients, AT_EVENTS, YESTERDAY, "history")
    rows = stored(clients)
    assert rows["event_timestamp"].to_list() == rows["created"].to_list() == [now - timedelta(hours=h) for h in (20, 19.5)]
    assert rows["amount_6h"].to_list() == [5.0, 5.25]
    place(("a", 20, 5.0), ("a", 19.75, 1.0), ("a", 19.5, 0.25))
    set_clock(now + timedelta(minutes=30))
    restated = write_offline(clients, AT_EVENTS, YESTERDAY, "a late order").sort("event_timestamp")
    # The late order's own row was never there before, so it is history; the row after it is corrected.
    assert restated["amount_6h"].to_list() == [6.0, 6.25]
    assert restated["created"].to_list() == [now - timedelta(hours=19.75), now + timedelta(minutes=30)]
    assert write_offline(clients, AT_EVENTS, YESTERDAY, "a replay").is_empty()


def test_event_triggered_rows_of_today_are_live_from_midnight_and_end_now(clients, place, today, now):
    place(("a", 20, 5.0), ("a", 2.25, 1.0), ("a", 0, 2.0), ("a", -1, 4.0))
    write_offline(clients, AT_EVENTS, DayRange(YESTERDAY.first, today.last), "run")
    rows = stored(clients)
    assert rows["event_timestamp"].to_list() == [now - timedelta(hours=h) for h in (20, 2.25, 0)]
    assert rows["created"].to_list() == [now - timedelta(hours=20), now, now]


# --- online -------------------------------------------------------------------------------------------------------------


def online(valkey_url: str, shop: str) -> codec.Decoded | None:
    with Redis.from_url(valkey_url) as redis:
        packed = redis.get(codec.entity_key(ONLINE_PROJECT, "shop_totals", [shop]))
    order = codec.feature_order(PLAN.features)
    return codec.decode(packed, codec.schema_hash("shop_totals", order), len(order))


def value(found: codec.Decoded, feature: str) -> float:
    return float(found.values[list(codec.feature_order(PLAN.features)).index(feature)])


def test_the_newest_value_of_each_entity_goes_online(clients, place, today, now, valkey_url):
    place(("a", 3.5, 5.0), ("a", 0.5, 8.0), ("b", 2.5, 1.0))
    write_offline(clients, PLAN, today, "run")
    counts, newest = write_online(clients, PLAN)
    assert (counts.written, newest) == (2, now)
    assert value(online(valkey_url, "a"), "amount_1h") == 8.0
    assert value(online(valkey_url, "b"), "amount_1h") == 1.0


def test_values_older_than_the_ttl_stay_away(clients, place, today, valkey_url):
    place(("a", 8, 5.0))
    write_offline(clients, PLAN, today, "run")
    counts, newest = write_online(clients, PLAN)
    assert (counts.written, newest) == (0, None)
    assert online(valkey_url, "a") is None


def test_a_corrected_value_of_the_same_tick_wins_online(clients, place, today, now, set_clock, valkey_url):
    place(("a", 0.5, 5.0))
    write_offline(clients, PLAN, today, "run")
    write_online(clients, PLAN)
    place(("a", 0.5, 7.0))
    set_clock(now + timedelta(minutes=10))
    write_offline(clients, PLAN, today, "corrected")
    write_online(clients, PLAN)
    assert value(online(valkey_url, "a"), "amount_1h") == 7.0


def test_a_withdrawn_value_is_withdrawn_online(clients, place, today, now, set_clock, valkey_url):
    place(("a", 0.5, 5.0), ("b", 0.5, 5.0))
    write_offline(clients, PLAN, today, "run")
    write_online(clients, PLAN)
    place(("b", 0.5, 5.0))
    set_clock(now + timedelta(minutes=10))
    write_offline(clients, PLAN, today, "withdrawn")
    write_online(clients, PLAN)
    assert np.isnan(value(online(valkey_url, "a"), "amount_1h"))


def test_a_value_created_after_the_clock_is_not_served(clients, place, today, now, set_clock, valkey_url):
    place(("a", 0.5, 5.0))
    write_offline(clients, PLAN, today, "run")
    set_clock(now - timedelta(minutes=1))
    counts, _ = write_online(clients, PLAN)
    assert counts.written == 0


def test_the_online_asset_names_what_is_missing(shop, clients, materialize, why):
    assets = feature_assets(shop, {"shop_totals": PLAN})
    result = materialize(list(assets), keys=[dg.AssetKey(["online", "shop_totals"])])
    assert not result.success
    assert "offline/shop_totals" in why(result)


def test_the_offline_asset_counts_its_table_even_when_a_replay_writes_nothing(shop, clients, place, materialize, today):
    place(("a", 2, 5.0), ("b", 3, 1.0))
    assets = list(feature_assets(shop, {"shop_totals": PLAN}))
    for written in (2, 0):
        result = materialize(assets, today, [dg.AssetKey(["offline", "shop_totals"])])
        metadata = result.asset_materializations_for_node("offline_shop_totals")[0].metadata
        assert metadata["rows_written"].value == written
        assert metadata["dagster/row_count"].value == 2
