"""`raw/<source>`: each source as received, by its own protocol.

Belongs here: the asset of a source. Does not belong here: how it is read (`landing`, room `ingestion`).
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlplatform.clients.stream import StreamError
from mlplatform.ingestion.arrival import partition_days
from mlplatform.ingestion.errors import SourceError
from mlplatform.orchestration import partitions, policy
from mlplatform.orchestration.landing import Landed, land
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import Catalog, SourceSpec

_PROTOCOL = {"sql": "a SQL table", "http": "a paged HTTP API", "file": "files", "stream": "an event stream"}


def ingestion_assets(catalog: Catalog) -> Sequence[dg.AssetsDefinition]:
    return [_raw(catalog, spec) for spec in catalog.sources]


def _raw(catalog: Catalog, spec: SourceSpec) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "raw",
                spec.name,
                description=f"{spec.description}\n\nAs received from {_PROTOCOL[spec.reader.kind]}, stamped with the time of arrival.",
                owner=spec.owner,
                partitions=partitions.daily(catalog) if spec.partitioned else None,
                extra_kinds=frozenset({spec.reader.kind}) if spec.reader.kind != "stream" else frozenset({"redis"}),
                metadata={"reader": dg.MetadataValue.json(spec.reader.model_dump(mode="json"))},
            )
        ],
        name=f"raw_{spec.name}",
        backfill_policy=dg.BackfillPolicy.single_run() if spec.partitioned else None,
        retry_policy=policy.SOURCE_RETRIES,
        pool=f"raw_{spec.name}",
    )
    def raw(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        days = partitions.days_of(context) if spec.partitioned else None
        try:
            every_day = partition_days(catalog, platform.clients.clock.now()) if spec.partitioned else None
            landed = land(platform.clients, spec, days, context.run.run_id, every_day)
        except (SourceError, StreamError) as error:
            raise dg.Failure(f"{spec.name}: {error}") from error
        return dg.MaterializeResult(metadata=_metadata(platform, spec, landed))

    return raw


def _metadata(platform: PlatformResource, spec: SourceSpec, landed: Landed) -> dict[str, Any]:
    lake = platform.clients.lake
    days = {"first_day": landed.days.first.isoformat(), "last_day": landed.days.last.isoformat()} if landed.days else {}
    return {
        "rows_received": landed.rows,
        "unreadable_entries": landed.unreadable,
        "path": dg.MetadataValue.path(lake.uri(("raw", spec.name))),
        **days,
        **landed.notes,
    }
