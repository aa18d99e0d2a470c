"""The stream behaves like a real one: late, twice, out of order, and the same for the same seed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from mlplatform.local.deliveries import (
    EVENT_TIME,
    DeliveryModel,
    all_deliveries,
    deliveries_between,
    deliveries_until,
    write_archive,
)
from mlplatform.local.nycflights import World

Deliveries = dict[str, pl.DataFrame]
START = datetime(2013, 9, 1, tzinfo=UTC)


@pytest.mark.parametrize("source", EVENT_TIME)
def test_no_event_is_lost_and_a_few_per_mille_come_twice(world: World, deliveries: Deliveries, source: str) -> None:
    events, delivered = getattr(world, source), deliveries[source]
    assert set(delivered["event_id"]) == set(events["event_id"])
    assert (delivered.height - events.height) / events.height == pytest.approx(0.003, abs=0.0005)
    twice = delivered.filter(pl.col("event_id").is_duplicated()).sort("event_id", "delivered_at")
    gaps = twice.group_by("event_id").agg(pl.len(), gap=pl.col("delivered_at").max() - pl.col("delivered_at").min())
    assert gaps["len"].unique().to_list() == [2]
    assert timedelta(minutes=1) <= gaps["gap"].min() <= gaps["gap"].max() <= timedelta(minutes=30)


@pytest.mark.parametrize("source", EVENT_TIME)
def test_about_one_in_a_hundred_is_late_and_none_is_early(deliveries: Deliveries, source: str) -> None:
    first = deliveries[source].unique("event_id", keep="first", maintain_order=True)
    late = first["delivered_at"] - first[EVENT_TIME[source]]
    assert late.min() == timedelta(0)
    assert late.max() == timedelta(minutes=45)
    assert (late > timedelta(0)).mean() == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("source", ["departures", "arrivals"])
def test_events_come_out_of_order(deliveries: Deliveries, source: str) -> None:
    times = deliveries[source][EVENT_TIME[source]]
    assert deliveries[source]["delivered_at"].is_sorted()
    assert (times < times.cum_max()).sum() > 1000


def test_the_same_seed_gives_the_same_deliveries_and_another_one_others(world: World, deliveries: Deliveries) -> None:
    again, other = all_deliveries(world, DeliveryModel()), all_deliveries(world, DeliveryModel(seed=7))
    assert all(again[source].equals(deliveries[source]) for source in EVENT_TIME)
    assert not any(other[source].equals(deliveries[source]) for source in EVENT_TIME)


def test_deliveries_are_cut_at_exact_times(deliveries: Deliveries) -> None:
    rows = deliveries["arrivals"]
    before, after = deliveries_between(rows, None, START), deliveries_between(rows, START, None)
    assert before.height + after.height == rows.height
    assert before["delivered_at"].max() < START <= after["delivered_at"].min()
    assert deliveries_until(rows, START)["delivered_at"].max() == START


def test_the_archive_has_a_file_a_day_with_all_that_was_delivered_before(deliveries: Deliveries, tmp_path: Path) -> None:
    rows = write_archive(deliveries["departures"], "departed_at", START, tmp_path)
    day = pl.read_parquet(tmp_path / "2013-08-31.parquet")
    assert day["departed_at"].dt.date().unique().to_list() == [datetime(2013, 8, 31, tzinfo=UTC).date()]
    assert "delivered_at" not in day.columns
    whole = pl.read_parquet(tmp_path / "*.parquet")
    assert whole.height == rows == deliveries_between(deliveries["departures"], None, START).height
    assert whole["received_at"].max() < START
    assert whole["event_id"].is_duplicated().sum() > 0
    assert len(list(tmp_path.glob("*.parquet"))) == whole["departed_at"].dt.date().n_unique()
