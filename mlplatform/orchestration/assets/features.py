"""Feature assets: the Feast registry and `offline/<view>` in Delta; `online/<view>` has a file of its own.

Belongs here: which tables a view reads and writes, and what an analyst sees of it. Does not belong here: computing values
(room `features`) or storing them (`feature_store`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import dagster as dg
import polars as pl

from mlplatform.clients.features import declared_objects
from mlplatform.clients.lake import with_day
from mlplatform.features.engine import compute
from mlplatform.features.plan import ViewPlan, required_days, tick_range
from mlplatform.features.restate import rows_to_append
from mlplatform.orchestration import partitions, policy
from mlplatform.orchestration.assets.online import online_asset
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.metadata import null_shares, table_schema
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange
from mlplatform.specs import Catalog

LIVE_SINCE = "mlplatform.live_since"  # commit metadata: the first tick computed on its own day


def feature_assets(catalog: Catalog, plans: Mapping[str, ViewPlan]) -> Sequence[dg.AssetsDefinition]:
    """The registry of the catalog's feature package, and two assets for each of its views."""
    views = [asset for plan in plans.values() for asset in (_offline(catalog, plan), online_asset(plan))]
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
                description=f"{plan.description}\n\nPoint-in-time history, one row per entity and tick ({plan.cadence}).",
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


def write_offline(clients: Clients, plan: ViewPlan, days: DayRange, run_id: str) -> pl.DataFrame:
    """Computes the view's ticks on `days` that have come, and appends the rows that are new or changed. Returns those."""
    now = clients.clock.now()
    ticks = tick_range(plan, days, now)
    if ticks is None:
        return pl.DataFrame()
    lake, key = clients.lake, ("offline", plan.name)
    tables = {source: lake.read(("validated", source), read) for source, read in required_days(plan, days).items()}
    computed = compute(plan, tables, *ticks)
    existing = lake.read(key, days) if lake.exists(key) else pl.DataFrame()
    live_since = _live_since(clients, plan, days)
    rows = rows_to_append(computed, existing, plan.join_keys, plan.features, now=now, live_since=live_since)
    if rows.height or not lake.exists(key):
        metadata = {"run_id": run_id} | ({LIVE_SINCE: live_since.isoformat()} if live_since else {})
        lake.append(key, with_day(rows, "event_timestamp"), metadata=metadata)
    return rows


def _live_since(clients: Clients, plan: ViewPlan, days: DayRange) -> datetime | None:
    """The first tick that was computed on its own day: from then on `created` is the time of computing.

    A backfill that reaches into today begins the live time with today's first tick, not with its own.
    """
    if recorded := clients.lake.last_metadata(("offline", plan.name), LIVE_SINCE):
        return datetime.fromisoformat(recorded)
    now = clients.clock.now()
    if now.date() not in days:
        return None
    today = tick_range(plan, DayRange(now.date(), now.date()), now)
    return today[0] if today else None


def _row_count(clients: Clients, plan: ViewPlan) -> int:
    key = ("offline", plan.name)
    return clients.lake.row_count(key) if clients.lake.exists(key) else 0
