"""Feature assets: the Feast registry, `offline/<view>` in Delta, `online/<view>` in Redis.

Belongs here: which tables a view reads and writes, and what an analyst sees of it. Does not belong here: computing values
(room `features`) or storing them (`feature_store`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import dagster as dg
import polars as pl

from mlplatform.clients.features import declared_objects
from mlplatform.clients.lake import MissingTableError
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.writer import WriteCounts, write_frame
from mlplatform.features.engine import compute
from mlplatform.features.plan import TIME, ViewPlan, required_days, tick_range
from mlplatform.orchestration import partitions, policy
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.feature_tables import append_changes, newest_within_ttl, recorded_live_since, streamed_from
from mlplatform.orchestration.metadata import null_shares, table_schema
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange
from mlplatform.specs import Catalog


def feature_assets(catalog: Catalog, plans: Mapping[str, ViewPlan]) -> Sequence[dg.AssetsDefinition]:
    """The registry of the catalog's feature package, and two assets for each of its views."""
    views = [asset for plan in plans.values() for asset in (_offline(catalog, plan), _online(plan))]
    return [_registry(catalog, plans), *views]


def _registry(catalog: Catalog, plans: Mapping[str, ViewPlan]) -> dg.AssetsDefinition:
    package = catalog.feature_package
    declared = hashlib.sha256("".join(plans[name].fingerprint for name in sorted(plans)).encode())

    @dg.multi_asset(
        specs=[
            policy.spec(
                "feature_registry",
                catalog.name,
                description=f"Feast's registry: every entity, view and service of `{package}`, as `feast apply` leaves it.",
                owner="team:data",
                condition=conditions.when_declared(),
                code_version=declared.hexdigest()[:12],
            )
        ],
        name=f"feature_registry_{catalog.name}",
    )
    def registry(platform: PlatformResource) -> dg.MaterializeResult:
        store = platform.clients.feature_store
        store.apply(declared_objects(package))
        return dg.MaterializeResult(
            metadata={
                "views": dg.MetadataValue.json(sorted(v.name for v in store.list_all_feature_views())),
                "services": dg.MetadataValue.json(sorted(s.name for s in store.list_feature_services())),
                "project": store.project,
            }
        )

    return registry


def _offline(catalog: Catalog, plan: ViewPlan) -> dg.AssetsDefinition:
    deps = [
        dg.AssetDep(policy.key("validated", source), partition_mapping=partitions.lookback(lookback))
        for source, lookback in plan.recipe.inputs.items()
    ]

    @dg.multi_asset(
        specs=[
            policy.spec(
                "offline",
                plan.name,
                description=f"{plan.description}\n\nPoint-in-time history, one row per entity and {_row_time(plan)}.",
                owner=plan.owner,
                deps=deps,
                partitions=partitions.daily(catalog),
                condition=conditions.after_gates_any_day(),
                code_version=plan.fingerprint[:12],
                freshness=dg.FreshnessPolicy.time_window(fail_window=max(plan.ttl, timedelta(hours=1))),
                metadata={"cadence": str(plan.cadence), "ttl": str(plan.ttl), "entity": ", ".join(plan.join_keys), **table_schema(plan)},
            )
        ],
        name=f"offline_{plan.name}",
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def offline(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        days = partitions.days_of(context)
        written = write_offline(platform.clients, plan, days, context.run.run_id)
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": _row_count(platform.clients, plan),
                "rows_written": written.height,
                "entities": written.n_unique(list(plan.join_keys)) if written.height else 0,
                "null_shares": dg.MetadataValue.md(null_shares(written, plan.features)),
                "path": dg.MetadataValue.path(platform.clients.lake.uri(("offline", plan.name))),
            }
        )

    return offline


def _row_time(plan: ViewPlan) -> str:
    return "time of its events" if plan.event_triggered else f"tick ({plan.cadence})"


def write_offline(clients: Clients, plan: ViewPlan, days: DayRange, run_id: str) -> pl.DataFrame:
    """Computes the view's rows on `days`, up to now, and appends those that are new or changed. Returns these."""
    now = clients.clock.now()
    times = tick_range(plan, days, now)
    if times is None:
        return pl.DataFrame()
    lake = clients.lake
    tables = {source: lake.read(("validated", source), read) for source, read in required_days(plan, days).items()}
    mine = pl.col(TIME).is_between(*(pl.lit(time) for time in times))
    if (streamed := streamed_from(lake, plan, now)) is not None:
        mine &= pl.col(TIME) < pl.lit(streamed)
    return append_changes(
        lake,
        plan,
        compute(plan, tables, *times).filter(mine),
        days,
        now=now,
        live_since=_live_since(clients, plan, days),
        metadata={"run_id": run_id},
        # A row that came after `now` is no row this computation does not give any more.
        scope=lambda existing: existing.filter(mine),
    )


def _live_since(clients: Clients, plan: ViewPlan, days: DayRange) -> datetime | None:
    """The first tick that was computed on its own day (that day's 00:00 for an event-triggered view): from then on
    `created` is the time of computing.

    A backfill that reaches into today begins the live time with today's first tick, not with its own.
    """
    if recorded := recorded_live_since(clients.lake, plan):
        return recorded
    now = clients.clock.now()
    if now.date() not in days:
        return None
    today = tick_range(plan, DayRange(now.date(), now.date()), now)
    return today[0] if today else None


def _row_count(clients: Clients, plan: ViewPlan) -> int:
    key = ("offline", plan.name)
    return clients.lake.row_count(key) if clients.lake.exists(key) else 0


def _online(plan: ViewPlan) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "online",
                plan.name,
                description=f"{plan.description}\n\nThe newest value of each entity in Redis, where the prediction service reads it.",
                owner=plan.owner,
                deps=[dg.AssetDep(policy.key("offline", plan.name), partition_mapping=dg.AllPartitionMapping())],
                condition=conditions.newest_values(),
                metadata={"ttl": str(plan.ttl), "entity": ", ".join(plan.join_keys), "on_stale": plan.recipe.on_stale},
            )
        ],
        name=f"online_{plan.name}",
    )
    def online(platform: PlatformResource) -> dg.MaterializeResult:
        counts, newest = write_online(platform.clients, plan)
        return dg.MaterializeResult(
            metadata={
                "entities_written": counts.written,
                "entities_already_newest": counts.skipped,
                "newest_value": dg.MetadataValue.text(newest.isoformat() if newest else "none"),
            }
        )

    return online


def write_online(clients: Clients, plan: ViewPlan) -> tuple[WriteCounts, datetime | None]:
    """Writes each entity's newest value that is within the view's ttl; older values would be read as missing anyway."""
    try:
        newest = newest_within_ttl(clients.lake, plan, clients.clock.now())
    except MissingTableError as missing:
        raise dg.Failure(f"{missing}. Materialize offline/{plan.name} before online/{plan.name}.") from missing
    counts = write_frame(clients.redis, ONLINE_PROJECT, plan.name, plan.join_keys, plan.features, newest)
    last = newest["event_timestamp"].max() if newest.height else None
    return counts, last if isinstance(last, datetime) else None
