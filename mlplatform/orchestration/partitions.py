"""Daily partitions and what they mean to the rooms: whole UTC days.

Belongs here: between Dagster's partition keys and `DayRange`. Does not belong here: what is done on a day.
"""

import warnings
from collections.abc import Mapping
from datetime import date, timedelta

import dagster as dg

from mlplatform.records import DayRange
from mlplatform.specs import Catalog

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"


def daily(catalog: Catalog) -> dg.DailyPartitionsDefinition:
    """One partition a UTC day. With `end_offset` today is a partition too: the platform works on days in progress."""
    return dg.DailyPartitionsDefinition(
        start_date=catalog.start.isoformat(),
        end_date=catalog.end.isoformat() if catalog.end else None,
        end_offset=0 if catalog.end else 1,
    )


def days_of(context: dg.AssetExecutionContext) -> DayRange:
    """The days this run is for: one partition, or a whole range in one run."""
    keys = context.partition_key_range
    return DayRange(date.fromisoformat(keys.start), date.fromisoformat(keys.end))


def range_tags(days: DayRange) -> Mapping[str, str]:
    """Run tags that make one run materialize all partitions of `days`."""
    return {RANGE_START: days.first.isoformat(), RANGE_END: days.last.isoformat()}


def lookback(span: timedelta) -> dg.TimeWindowPartitionMapping:
    """A day depends on the same day and on as many days before it as `span` reaches into."""
    days = -(-span // timedelta(days=1))
    with warnings.catch_warnings():
        # In beta since Dagster 1.6. Without it the first days of a catalog would wait for days before its start.
        warnings.filterwarnings("ignore", message="Parameter `allow_nonexistent_upstream_partitions`")
        return dg.TimeWindowPartitionMapping(start_offset=-days, allow_nonexistent_upstream_partitions=True)
