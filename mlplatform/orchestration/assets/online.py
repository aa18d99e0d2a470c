"""`online/<view>`: the newest values of a view in Redis, merged row by row or built anew as a generation.

Belongs here: which rows go online, and when a merge is not enough. Does not belong here: how a row or a generation is written
(`feature_store`), computing values (room `features`).
"""

from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
from pydantic import Field

from mlplatform.clients.lake import MissingTableError
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.codec import feature_order, schema_hash
from mlplatform.feature_store.generations import Built, build_generation
from mlplatform.feature_store.reclaim import pointer_of
from mlplatform.feature_store.writer import WriteCounts, write_frame
from mlplatform.features.plan import ViewPlan
from mlplatform.orchestration import policy
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.feature_tables import newest_within_ttl
from mlplatform.orchestration.resources import Clients, PlatformResource


class OnlineConfig(dg.Config):
    """Run config of an `online/<view>` asset."""

    rebuild: bool = Field(False, description="Build a new generation from Delta, instead of merging the newest rows into the one there is")


def online_asset(plan: ViewPlan) -> dg.AssetsDefinition:
    """The asset of one view."""

    @dg.multi_asset(
        specs=[
            policy.spec(
                "online",
                plan.name,
                description=f"{plan.description}\n\nThe newest value of each entity in Redis, where the prediction service reads it.",
                owner=plan.owner,
                deps=[dg.AssetDep(policy.key("offline", plan.name), partition_mapping=dg.AllPartitionMapping())],
                condition=conditions.newest_values(),
                freshness=policy.freshness(plan),
                metadata={"ttl": str(plan.ttl), "entity": ", ".join(plan.join_keys), "on_stale": plan.recipe.on_stale},
            )
        ],
        name=op_name(plan.name),
    )
    def online(config: OnlineConfig, platform: PlatformResource) -> dg.MaterializeResult:
        clients = platform.clients
        reason = "the run asked for it" if config.rebuild else why_rebuild(clients, plan)
        if reason is None:
            return dg.MaterializeResult(metadata=_merged(clients, plan, *write_online(clients, plan)))
        return dg.MaterializeResult(metadata=_rebuilt(reason, rebuild_online(clients, plan, by=f"asset online/{plan.name}: {reason}")))

    return online


def op_name(view: str) -> str:
    """What run config calls the asset by."""
    return f"online_{view}"


def why_rebuild(clients: Clients, plan: ViewPlan) -> str | None:
    """Why rows cannot be merged into what is online; None where they can."""
    current = pointer_of(clients.online, ONLINE_PROJECT, plan.name).current
    if current is None:
        return "nothing is online yet"
    if current.schema != schema_hash(plan.name, feature_order(plan.features)):
        return "the view's features changed"
    return None


def write_online(clients: Clients, plan: ViewPlan) -> tuple[WriteCounts, datetime | None]:
    """Merges each entity's newest value into what is online."""
    rows = newest_in_delta(clients, plan)
    counts = write_frame(clients.online, ONLINE_PROJECT, plan.name, plan.join_keys, plan.features, rows)
    last = rows["event_timestamp"].max() if rows.height else None
    return counts, last if isinstance(last, datetime) else None


def rebuild_online(clients: Clients, plan: ViewPlan, *, by: str) -> Built:
    """A new generation from Delta, which readers see whole or not at all."""
    return build_generation(
        clients.online,
        ONLINE_PROJECT,
        plan.name,
        plan.join_keys,
        plan.features,
        lambda: newest_in_delta(clients, plan),
        at=clients.clock.now(),
        by=by,
    )


def newest_in_delta(clients: Clients, plan: ViewPlan) -> pl.DataFrame:
    """Each entity's newest value that is within the view's ttl; older values would be read as missing anyway."""
    try:
        return newest_within_ttl(clients.lake, plan, clients.clock.now())
    except MissingTableError as missing:
        raise dg.Failure(f"{missing}. Materialize offline/{plan.name} before online/{plan.name}.") from missing


def _merged(clients: Clients, plan: ViewPlan, counts: WriteCounts, newest: datetime | None) -> dict[str, Any]:
    current = pointer_of(clients.online, ONLINE_PROJECT, plan.name).current
    return {
        "generation": current.number if current else 0,
        "entities_written": counts.written,
        "entities_already_newest": counts.skipped,
        "newest_value": _time(newest),
    }


def _rebuilt(reason: str, built: Built) -> dict[str, Any]:
    return {
        "generation": built.generation,
        "rebuilt_because": reason,
        "entities_written": built.entities,
        "sample_verified": built.sample,
        "sample_replaced_by_pushes": built.overtaken,
        "newest_value": _time(built.newest),
    }


def _time(newest: datetime | None) -> dg.MetadataValue[Any]:
    return dg.MetadataValue.text(newest.isoformat() if newest else "none")
