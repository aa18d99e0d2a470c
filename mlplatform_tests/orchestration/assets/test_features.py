"""Feature assets of a small view: what is appended when, and with which `created`."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime, timedelta

import dagster as dg
import polars as pl
import pytest

from mlplatform.clients.fingerprints import recorded
from mlplatform.features.plan import ViewPlan, WindowPlan
from mlplatform.fingerprint import content_hash
from mlplatform.orchestration.assets.features import feature_assets, write_offline
from mlplatform.orchestration.feature_pages import DRAW_EVERY, DRAWN_AT, LARGE_WRITE_ROWS, should_draw
from mlplatform.orchestration.feature_tables import newest_within_ttl
from mlplatform.orchestration.policy import freshness
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
    # Nobody could have read the late order's own row before either.
    assert restated["amount_6h"].to_list() == [6.0, 6.25]
    assert restated["created"].to_list() == [now + timedelta(minutes=30)] * 2
    assert write_offline(clients, AT_EVENTS, YESTERDAY, "a replay").is_empty()


def test_event_triggered_rows_of_today_are_live_from_midnight_and_end_now(clients, place, today, now):
    place(("a", 20, 5.0), ("a", 2.25, 1.0), ("a", 0, 2.0), ("a", -1, 4.0))
    write_offline(clients, AT_EVENTS, DayRange(YESTERDAY.first, today.last), "run")
    rows = stored(clients)
    assert rows["event_timestamp"].to_list() == [now - timedelta(hours=h) for h in (20, 2.25, 0)]
    assert rows["created"].to_list() == [now - timedelta(hours=20), now, now]


def test_a_feature_added_to_a_view_with_history_is_backfilled_beside_it(clients, place, now, set_clock):
    place(("a", 20, 5.0), ("a", 19.5, 0.25))
    write_offline(clients, AT_EVENTS, YESTERDAY, "history")
    wider = replace(
        AT_EVENTS,
        features=("amount_6h", "amount_3h"),
        aggregations=(*AT_EVENTS.aggregations, WindowPlan("amount", "sum", timedelta(hours=3), "amount_3h")),
    )
    assert newest_within_ttl(clients.lake, replace(wider, ttl=timedelta(days=2)), now)["amount_3h"].to_list() == [None]
    set_clock(now + timedelta(minutes=30))
    restated = write_offline(clients, wider, YESTERDAY, "one more window")
    assert restated["created"].unique().to_list() == [now + timedelta(minutes=30)]
    rows = clients.lake.read(("offline", "shop_totals")).sort("event_timestamp", "created")
    assert rows["amount_3h"].to_list() == [None, 5.0, None, 5.25]
    assert rows["amount_6h"].to_list() == [5.0, 5.0, 5.25, 5.25]
    assert write_offline(clients, wider, YESTERDAY, "a replay").is_empty()
    assert recorded(clients.lake, ("offline", "shop_totals")).hash == content_hash(rows)


def test_the_offline_asset_counts_its_table_even_when_a_replay_writes_nothing(shop, clients, place, materialize, today):
    place(("a", 2, 5.0), ("b", 3, 1.0))
    assets = list(feature_assets(shop, {"shop_totals": PLAN}))
    for written in (2, 0):
        result = materialize(assets, today, [dg.AssetKey(["offline", "shop_totals"])])
        metadata = result.asset_materializations_for_node("offline_shop_totals")[0].metadata
        assert metadata["rows_written"].value == written
        assert metadata["dagster/row_count"].value == 2


# --- the page of a view -------------------------------------------------------------------------------------------------


@pytest.fixture
def page(shop, materialize):
    """Materializes offline/shop_totals for days and gives the metadata of that."""

    def run(days: DayRange) -> Mapping[str, dg.MetadataValue]:
        assets = list(feature_assets(shop, {"shop_totals": PLAN}))
        result = materialize(assets, days, [dg.AssetKey(["offline", "shop_totals"])])
        return result.asset_materializations_for_node("offline_shop_totals")[0].metadata

    return run


def test_the_page_has_the_fingerprints_of_what_was_written_and_of_the_whole_table(clients, place, today, page):
    place(("a", 20, 5.0), ("a", 2, 5.0), ("b", 3, 1.0))
    page(YESTERDAY)
    found = page(today)
    whole = clients.lake.read(("offline", "shop_totals"))
    assert found["fingerprint"].value == content_hash(whole)
    assert found["fingerprint_written"].value == content_hash(whole.filter(pl.col("event_date") == today.first))
    assert recorded(clients.lake, ("offline", "shop_totals")).hash == content_hash(whole)
    replay = page(today)
    assert replay["fingerprint"].value == content_hash(whole)
    assert "fingerprint_written" not in replay


def test_the_page_tells_nulls_quantiles_and_the_age_of_the_newest_value(place, today, now, page):
    place(("a", 3, 5.0), ("b", 3, 9.0))
    found = page(today)
    assert "| amount_1h | 0.0% | 5 |" in found["null_shares"].value
    assert found["newest_value"].value == (now - timedelta(hours=3)).isoformat()
    assert found["newest_value_age_s"].value == 3 * 3600


def test_the_picture_is_drawn_once_a_day_and_says_when(place, today, now, set_clock, page):
    place(("a", 2, 5.0))
    first = page(today)
    assert first["distributions"].value.startswith("![shop_totals: distributions](data:image/png;base64,")
    assert first[DRAWN_AT].value == now.timestamp()
    place(("a", 2, 5.0), ("a", -2, 6.0))
    set_clock(now + timedelta(hours=4))
    second = page(today)
    assert "distributions" not in second
    assert second[DRAWN_AT].value == now.timestamp()
    place(("a", 2, 5.0), ("a", -2, 6.0), ("a", -23, 7.0))
    tomorrow = now + timedelta(days=1)
    set_clock(tomorrow)
    third = page(DayRange(today.first, tomorrow.date()))
    assert "distributions" in third
    assert third[DRAWN_AT].value == tomorrow.timestamp()


def test_a_large_write_is_always_drawn(now):
    assert should_draw(LARGE_WRITE_ROWS, now, now)
    assert not should_draw(LARGE_WRITE_ROWS - 1, now - DRAW_EVERY + timedelta(seconds=1), now)


def test_the_definition_tells_how_features_come_about_and_who_uses_them(definitions):
    metadata = definitions.resolve_asset_graph().get(dg.AssetKey(["offline", "origin_congestion"])).metadata
    assert "| origin_departure_delay_3h | min | mean of departure_delay_min, 3 h |" in metadata["features"].value
    assert "| origin_overdue_n |  | sum of overdue, running |" in metadata["features"].value
    assert "flight_disruption | flight_disruption_v1 | 12 |" in metadata["consumers"].value
    assert metadata["on_stale"] == "impute"
    assert "dagster/column_schema" in metadata


def test_both_assets_of_a_view_are_late_and_failed_by_its_declaration(shop):
    found = [spec.freshness_policy for asset in feature_assets(shop, {"shop_totals": PLAN}) for spec in asset.specs]
    assert found[1:] == [dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=6), warn_window=timedelta(hours=2))] * 2


def test_a_view_that_expires_as_soon_as_it_is_due_has_no_time_to_be_late():
    changed = replace(PLAN, ttl=timedelta(hours=1))
    assert freshness(changed) == dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=1))
    quick = PLAN.recipe.model_copy(update={"cadence": timedelta(seconds=1), "propagation": timedelta(seconds=2)})
    view = replace(PLAN, ttl=timedelta(seconds=10), recipe=quick)
    assert freshness(view) == dg.FreshnessPolicy.time_window(fail_window=timedelta(minutes=1))
