"""Online assets of a small view: which rows of Delta reach Redis, when they are merged, and when a generation is built anew."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import dagster as dg
import numpy as np
import polars as pl
import pytest

from mlplatform.clients.lake import with_day
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.generations import Built
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import manifest_of, pointer_of
from mlplatform.feature_store.writer import write_frame
from mlplatform.features.plan import ViewPlan
from mlplatform.orchestration.assets.online import online_asset, rebuild_online, why_rebuild, write_online
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.specs import FeatureRecipe

PLAN = ViewPlan(
    name="shop_totals",
    join_keys=("shop",),
    features=("orders_1h", "amount_1h"),
    ttl=timedelta(hours=6),
    description="Orders of the last hour",
    owner="team:data",
    recipe=FeatureRecipe(
        view="shop_totals",
        inputs={"orders": timedelta(hours=1)},
        cadence=timedelta(hours=1),
        compute=lambda tables, ticks: tables["orders"],
    ),
    fingerprint="f" * 64,
)
Row = tuple[str, float, float | None]


@pytest.fixture
def known(clients: Clients, now: datetime) -> Callable[..., None]:
    """`known(("a", 2, 5.0))`: appends rows to the view's Delta table: (shop, hours before now, amount), created then or as said."""

    def append(*rows: Row, created: datetime | None = None, extra: bool = False) -> None:
        times = [now - timedelta(hours=hours) for _, hours, _ in rows]
        frame = pl.DataFrame(
            {
                "shop": [shop for shop, _, _ in rows],
                "event_timestamp": times,
                "created": [created or time for time in times],
                "orders_1h": [1.0] * len(rows),
                "amount_1h": [amount for _, _, amount in rows],
            },
            schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC"), "amount_1h": pl.Float64},
        )
        clients.lake.append(("offline", PLAN.name), with_day(frame, "event_timestamp"))

    return append


def amount(clients: Clients, shop: str, plan: ViewPlan = PLAN) -> float | None:
    layout = ViewLayout.declare(plan.name, plan.join_keys, plan.features, plan.ttl)
    found = SyncOnlineReader(clients.online, ONLINE_PROJECT).read([(layout, (shop,))])[0]
    return None if found is None else float(found.values[plan.features.index("amount_1h")])


def current(clients: Clients) -> int:
    generation = pointer_of(clients.online, ONLINE_PROJECT, PLAN.name).current
    assert generation is not None
    return generation.number


def rebuild(clients: Clients, plan: ViewPlan = PLAN) -> Built:
    return rebuild_online(clients, plan, by="a test")


@pytest.mark.parametrize("write", [write_online, rebuild])
def test_the_newest_value_of_each_entity_goes_online(clients, known, write):
    known(("a", 3, 5.0), ("a", 1, 8.0), ("b", 2, 1.0))
    write(clients, PLAN)
    assert [amount(clients, shop) for shop in "abc"] == [8.0, 1.0, None]


@pytest.mark.parametrize("write", [write_online, rebuild])
def test_values_older_than_the_ttl_stay_away(clients, known, write):
    known(("a", 6.01, 5.0), ("b", 6, 6.0))
    write(clients, PLAN)
    assert [amount(clients, shop) for shop in "ab"] == [None, 6.0]


def test_a_merge_tells_what_it_wrote(clients, known, now):
    known(("a", 3, 5.0), ("b", 1, 1.0))
    counts, newest = write_online(clients, PLAN)
    assert (counts.written, counts.skipped, newest) == (2, 0, now - timedelta(hours=1))
    assert write_online(clients, PLAN)[0].written == 0


def test_a_corrected_value_of_the_same_tick_wins_online(clients, known, now, set_clock):
    known(("a", 1, 5.0))
    write_online(clients, PLAN)
    set_clock(now + timedelta(minutes=10))
    known(("a", 1, 7.0), created=now + timedelta(minutes=10))
    write_online(clients, PLAN)
    assert amount(clients, "a") == 7.0


def test_a_withdrawn_value_is_withdrawn_online(clients, known, now, set_clock):
    known(("a", 1, 5.0))
    write_online(clients, PLAN)
    set_clock(now + timedelta(minutes=10))
    known(("a", 1, None), created=now + timedelta(minutes=10))
    write_online(clients, PLAN)
    assert np.isnan(amount(clients, "a"))


def test_a_value_created_after_the_clock_is_not_served(clients, known, now):
    known(("a", 1, 5.0), created=now + timedelta(minutes=1))
    counts, newest = write_online(clients, PLAN)
    assert (counts.written, newest) == (0, None)


# --- generations -----------------------------------------------------------------------------------------------------


def test_a_rebuild_drops_what_delta_does_not_say(clients, known, now):
    known(("a", 1, 5.0))
    write_online(clients, PLAN)
    wrong = {"shop": ["a", "z"], "event_timestamp": [now] * 2, "created": [now] * 2, "orders_1h": [9.0] * 2, "amount_1h": [9.0] * 2}
    write_frame(clients.online, ONLINE_PROJECT, PLAN.name, PLAN.join_keys, PLAN.features, pl.DataFrame(wrong))
    write_online(clients, PLAN)
    assert [amount(clients, shop) for shop in "az"] == [9.0, 9.0]
    rebuild(clients)
    assert [amount(clients, shop) for shop in "az"] == [5.0, None]


@pytest.fixture
def run_online(environment, instance) -> Callable[..., dict[str, object]]:
    """Materializes `online/shop_totals` and gives its metadata."""

    def run(rebuild: bool = False, plan: ViewPlan = PLAN) -> dict[str, object]:
        definitions = dg.Definitions(assets=[online_asset(plan)], resources={"platform": PlatformResource()})
        config = {"ops": {"online_shop_totals": {"config": {"rebuild": rebuild}}}}
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance, run_config=config)
        metadata = result.asset_materializations_for_node("online_shop_totals")[0].metadata
        return {name: value.value for name, value in metadata.items()}

    return run


def test_the_first_run_builds_a_generation_and_the_next_merges_into_it(clients, known, run_online, now):
    known(("a", 2, 5.0), ("b", 2, 6.0))
    first = run_online()
    assert first["rebuilt_because"] == "nothing is online yet"
    assert (first["entities_written"], first["sample_verified"]) == (2, 2)
    known(("a", 1, 7.0))
    second = run_online()
    assert second["generation"] == first["generation"] == current(clients)
    assert (second["entities_written"], second["entities_already_newest"]) == (1, 1)
    assert second["newest_value"] == (now - timedelta(hours=1)).isoformat()
    assert amount(clients, "a") == 7.0


def test_a_run_that_asks_for_it_builds_a_new_generation(clients, known, run_online):
    known(("a", 2, 5.0))
    first = run_online()["generation"]
    again = run_online(rebuild=True)
    assert again["generation"] != first
    assert again["rebuilt_because"] == "the run asked for it"
    manifest = manifest_of(clients.online, current(clients))
    assert manifest is not None
    assert manifest.built_by == "asset online/shop_totals: the run asked for it"


def test_changed_features_are_built_as_a_new_generation(clients, known, run_online):
    known(("a", 2, 5.0))
    run_online()
    narrow = replace(PLAN, features=("amount_1h",))
    assert why_rebuild(clients, narrow) == "the view's features changed"
    assert run_online(plan=narrow)["rebuilt_because"] == "the view's features changed"
    assert amount(clients, "a", narrow) == 5.0


def test_a_rebuild_without_its_delta_table_says_so_and_changes_nothing(clients):
    with pytest.raises(dg.Failure, match="Materialize offline/shop_totals before online/shop_totals"):
        rebuild(clients)
    assert pointer_of(clients.online, ONLINE_PROJECT, PLAN.name).live() == []
