"""The tables `offline/<view>`: appending what is new or changed, and reading what belongs online.

Belongs here: what the batch assets and the streaming worker must do alike, so that they never fight over a table. Does not
belong here: computing rows (room `features`), Dagster.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime

import polars as pl

from mlplatform.clients.fingerprints import mark_append
from mlplatform.clients.lake import DAY, Lake, TableMovedError, with_day
from mlplatform.features.plan import TIME, ViewPlan
from mlplatform.features.restate import CREATED, rows_to_append, with_features
from mlplatform.records import DayRange

LIVE_SINCE = "mlplatform.live_since"  # commit metadata: the first tick computed on its own day

# Commit metadata of a streaming worker: what it has read (`positions`), when (`at`), and from when on the rows are its own (`from`).
STREAMED = "mlplatform.stream"

# A worker that has not written for so many cadences is taken for gone.
SILENT_CADENCES = 3

# Writers of one table that come between reading and appending, one after the other, before something must be wrong.
ATTEMPTS = 20


def append_changes(
    lake: Lake,
    plan: ViewPlan,
    computed: pl.DataFrame,
    days: DayRange,
    *,
    now: datetime,
    live_since: datetime | None,
    metadata: Mapping[str, str],
    scope: Callable[[pl.DataFrame], pl.DataFrame],
) -> pl.DataFrame:
    """Appends those of `computed` that the table lacks or has otherwise, in one commit. Returns them.

    `days` bounds the rows compared, `scope` narrows them: those rows of the table that `computed` stands for, so that what
    it no longer gives is withdrawn. Where another writer comes between, the comparison is made again: no row is written twice.
    """
    key = ("offline", plan.name)
    for _ in range(ATTEMPTS):
        version = lake.version(key) if lake.exists(key) else -1
        existing = scope(lake.read(key, days)) if version >= 0 else pl.DataFrame()
        if version >= 0 and lake.version(key) != version:
            continue  # read as of a later version than the one that is about to be named
        rows = rows_to_append(computed, existing, plan.join_keys, plan.features, now=now, live_since=live_since)
        if rows.is_empty() and version >= 0:
            return rows
        streamed = lake.recent_metadata(key, STREAMED)
        carried = {STREAMED: streamed} if streamed is not None else {}
        stored = with_day(rows, TIME)
        told = carried | with_live_since(metadata, live_since) | mark_append(lake, key, stored).metadata()
        try:
            lake.append(key, stored, metadata=told, read_at=version)
        except TableMovedError:
            continue
        return rows
    raise TableMovedError(f"table offline/{plan.name} was written by others {ATTEMPTS} times in a row")


def with_live_since(metadata: Mapping[str, str], live_since: datetime | None) -> dict[str, str]:
    """Each commit carries it on, so that it is found in the last one."""
    return dict(metadata) | ({LIVE_SINCE: live_since.isoformat()} if live_since else {})


def recorded_live_since(lake: Lake, plan: ViewPlan) -> datetime | None:
    """When the view's live time began, None where it has not yet."""
    recorded = lake.last_metadata(("offline", plan.name), LIVE_SINCE)
    return datetime.fromisoformat(recorded) if recorded else None


def streamed_from(lake: Lake, plan: ViewPlan, now: datetime) -> datetime | None:
    """The first moment whose rows a living streaming worker answers for; None where there is none.

    The worker reads events before they are landed and validated, so for those rows the batch knows less than it: it would
    take them for wrong and put them back. Older rows are the batch's: it is there for what came too late for the worker.
    """
    told = lake.recent_metadata(("offline", plan.name), STREAMED) if plan.windowed else None
    if told is None:
        return None
    stream = json.loads(told)
    if datetime.fromisoformat(stream["at"]) < now - SILENT_CADENCES * plan.cadence:
        return None
    return datetime.fromisoformat(stream["from"])


def newest_within_ttl(lake: Lake, plan: ViewPlan, now: datetime) -> pl.DataFrame:
    """Each entity's newest row that is available at `now` and within the view's ttl. Raises MissingTableError."""
    days = DayRange((now - plan.ttl).date(), now.date())
    moment = pl.lit(now)
    rows = lake.scan(("offline", plan.name), days).filter(
        pl.col(TIME) >= pl.lit(now - plan.ttl), pl.col(TIME) <= moment, pl.col(CREATED) <= moment
    )
    newest = rows.drop(DAY).sort(TIME, CREATED).unique(list(plan.join_keys), keep="last").collect()
    return with_features(newest, plan.features)
