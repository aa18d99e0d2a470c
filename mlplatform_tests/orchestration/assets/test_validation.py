"""The validation asset: what a bad day does to the tables, the checks, the run and what lies downstream."""

from datetime import timedelta

import dagster as dg
import polars as pl
import pytest

from mlplatform.orchestration.assets.ingestion import ingestion_assets
from mlplatform.orchestration.assets.validation import validation_assets
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange
from mlplatform.specs import Catalog

ORDERS = dg.AssetKey(["validated", "orders"])


@pytest.fixture
def assets(shop: Catalog) -> list[dg.AssetsDefinition]:
    @dg.multi_asset(specs=[dg.AssetSpec("downstream", deps=[ORDERS])], name="downstream")
    def downstream() -> dg.MaterializeResult:
        return dg.MaterializeResult()

    return [*ingestion_assets(shop), *validation_assets(shop), downstream]


@pytest.fixture
def run(assets, materialize, clients: Clients, systems, today):
    """Shops first, once; then `run()` lands and validates today's orders and what is below them."""

    def keys(*names: str) -> list[dg.AssetKey]:
        return [dg.AssetKey(name.split("/")) for name in names]

    assert materialize(assets, keys=keys("raw/shops", "validated/shops", "quarantine/shops")).success
    return lambda: materialize(assets, today, keys("raw/orders", "validated/orders", "quarantine/orders"))


@pytest.mark.parametrize("half", ["validated", "quarantine"])
def test_one_half_without_the_other_is_refused_as_the_guide_for_engineers_says(assets, materialize, today, half):
    with pytest.raises(dg.DagsterInvalidSubsetError, match="orders"):
        materialize(assets, today, [dg.AssetKey([half, "orders"])])


def test_good_rows_pass_with_their_accounting(run, systems, clients, today, now):
    systems.publish(*(systems.order(n, now) for n in range(4)))
    result = run()
    assert result.success
    assert clients.lake.row_count(("validated", "orders"), today) == 4
    assert clients.lake.row_count(("quarantine", "orders"), today) == 0
    metadata = {e.asset_key: e.step_materialization_data.materialization.metadata for e in result.get_asset_materialization_events()}
    assert metadata[ORDERS]["dagster/partition_row_count"].value == 4
    assert "| received | 4 |" in metadata[ORDERS]["accounting"].value
    assert {e.check_name: e.passed for e in result.get_asset_check_evaluations()}["contract"]


def test_too_many_bad_rows_stop_the_day_and_leave_the_last_good_state(run, systems, clients, why, today, now):
    systems.publish(*(systems.order(n, now) for n in range(4)))
    run()
    systems.publish(*(systems.order(n, now, amount=-1.0) for n in range(4, 10)))
    result = run()
    assert not result.success
    assert "6 of 10 rows quarantined (60.0%), allowed 25.0%: range:amount 6" in why(result)
    validated = clients.lake.read(("validated", "orders"), today)
    assert sorted(validated["order_id"]) == ["o0", "o1", "o2", "o3"]
    aside = clients.lake.read(("quarantine", "orders"), today)
    assert aside.height == 6
    assert set(aside["broken_rules"].explode()) == {"range:amount"}


def test_the_blocking_check_of_a_bad_day_is_recorded_as_failed(run, systems, now):
    systems.publish(*(systems.order(n, now, amount=-1.0) for n in range(3)))
    result = run()
    failed = {e.check_name: e for e in result.get_asset_check_evaluations() if not e.passed}
    assert "contract" in failed
    assert failed["contract"].asset_key == ORDERS
    assert "quarantined" in failed["contract"].description
    assert ORDERS not in {e.asset_key for e in result.get_asset_materialization_events()}


def test_downstream_of_a_bad_day_in_the_same_run_is_not_materialized(assets, materialize, clients, systems, today, now, shop):
    shops = [dg.AssetKey([stage, "shops"]) for stage in ("raw", "validated", "quarantine")]
    materialize(assets, keys=shops)
    systems.publish(*(systems.order(n, now, amount=-1.0) for n in range(3)))
    keys = [dg.AssetKey([stage, "orders"]) for stage in ("raw", "validated", "quarantine")]
    result = materialize(assets, today, [*keys, dg.AssetKey("downstream")])
    assert not result.success
    assert dg.AssetKey("downstream") not in {e.asset_key for e in result.get_asset_materialization_events()}


def test_after_a_bad_day_good_rows_pass_again(run, systems, clients, today, now):
    systems.publish(*(systems.order(n, now, amount=-1.0) for n in range(2)))
    assert not run().success
    systems.publish(*(systems.order(n, now) for n in range(2, 20)))
    assert run().success
    assert clients.lake.row_count(("validated", "orders"), today) == 18
    assert clients.lake.row_count(("quarantine", "orders"), today) == 2


def test_in_a_range_a_bad_day_stops_alone_and_keeps_its_last_good_state(assets, materialize, systems, clients, why, today, now):
    shops = [dg.AssetKey([stage, "shops"]) for stage in ("raw", "validated", "quarantine")]
    orders = [dg.AssetKey([stage, "orders"]) for stage in ("raw", "validated", "quarantine")]
    yesterday, both = now - timedelta(days=1), DayRange(today.first - timedelta(days=1), today.last)
    assert materialize(assets, keys=shops).success
    systems.publish(*(systems.order(n, yesterday) for n in range(4)), *(systems.order(n, now) for n in range(10, 40)))
    assert materialize(assets, both, orders).success
    systems.publish(*(systems.order(n, yesterday, amount=-1.0) for n in range(4, 8)), systems.order(40, now))
    result = materialize(assets, both, orders)
    assert not result.success
    # Four bad rows among 39 are few; among the eight of their day they are not.
    assert f"{both.first}: 4 of 8 rows quarantined (50.0%), allowed 25.0%: range:amount 4" in why(result)
    assert f"{both.last}:" not in why(result)
    validated = clients.lake.read(("validated", "orders"))
    by_day = dict(validated.group_by("event_date").len().iter_rows())
    assert by_day == {both.first: 4, both.last: 31}
    assert clients.lake.row_count(("quarantine", "orders"), both) == 4


def test_orphans_are_counted_but_stay(run, systems, clients, today, now):
    systems.publish(systems.order(1, now, shop="nowhere"), systems.order(2, now))
    result = run()
    assert result.success
    warned = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert [e.severity for e in warned] == [dg.AssetCheckSeverity.WARN]
    assert clients.lake.row_count(("validated", "orders"), today) == 2


def test_validating_again_changes_nothing(run, systems, clients, today, now):
    systems.publish(systems.order(1, now), systems.order(1, now), systems.order(2, now - timedelta(minutes=1)))
    run()
    before = clients.lake.read(("validated", "orders")).sort("order_id")
    assert run().success
    assert clients.lake.read(("validated", "orders")).sort("order_id").equals(before)
    assert before.height == 2  # the repeat was dropped


def test_a_missing_raw_table_fails_with_the_asset_to_materialize(assets, materialize, clients, systems, why):
    result = materialize(assets, keys=[dg.AssetKey(["validated", "shops"]), dg.AssetKey(["quarantine", "shops"])])
    assert not result.success
    assert "raw/shops" in why(result)


def test_a_missing_reference_fails_with_the_asset_to_materialize(assets, materialize, clients, systems, why, today, now):
    systems.publish(systems.order(1, now))
    result = materialize(assets, today, [dg.AssetKey([stage, "orders"]) for stage in ("raw", "validated", "quarantine")])
    assert not result.success
    assert "validated/shops" in why(result)


def test_a_complete_day_has_a_suite_with_data_docs(run, assets, materialize, systems, clients, set_clock, today, now, tmp_path):
    systems.publish(*(systems.order(n, now) for n in range(4)))
    run()
    set_clock(now + timedelta(days=1))
    result = run()
    assert result.success
    suite = next(e for e in result.get_asset_check_evaluations() if e.check_name == "expectation_suite")
    assert suite.passed
    assert (tmp_path / "reports" / "data_docs").exists()
    assert str(suite.metadata["data_docs"].value).startswith("file://")


def test_an_empty_complete_day_fails_where_rows_are_expected(run, systems, clients, set_clock, why, today, now):
    run()
    set_clock(now + timedelta(days=1))
    result = run()
    assert not result.success
    assert "no rows where rows are expected" in why(result)


def test_every_declared_check_has_a_result_on_every_run(run, systems, assets, now):
    systems.publish(systems.order(1, now))
    result = run()
    declared = {s.name for a in assets for s in a.check_specs if s.asset_key == ORDERS}
    assert {e.check_name for e in result.get_asset_check_evaluations()} == declared


def test_quarantined_rows_keep_their_reasons_and_their_values(run, systems, clients, today, now):
    systems.publish(systems.order(1, now, amount=2000.0), *(systems.order(n, now) for n in range(2, 8)))
    assert run().success
    aside = clients.lake.read(("quarantine", "orders"), today)
    assert aside.select("order_id", "amount").rows() == [("o1", 2000.0)]
    assert aside.schema["broken_rules"] == pl.List(pl.String)
