"""`shadow/<model>`: the shadow version beside whoever answered, on the same requests.

Belongs here: which records are compared and what an analyst sees. Does not belong here: the comparison (`deployment.shadow`).
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import dagster as dg

from mlplatform.contracts import SHADOW
from mlplatform.deployment.evidence import shadow_pairs
from mlplatform.deployment.shadow import Row, pair, table
from mlplatform.monitoring.drain import input_column
from mlplatform.orchestration import policy
from mlplatform.orchestration.metadata import md_table
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange
from mlplatform.specs import ModelSpec

COLUMNS = ("slice", "measure", "pairs", "shadow less answer", "low", "high")
_WINDOW = timedelta(days=28)


def shadow_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "shadow",
                spec.name,
                description=f"`{spec.name}`'s shadow beside whoever answered the same requests: predictions, loss, latency, by slice.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("outcomes", spec.name))],
            )
        ],
        name=f"shadow_{spec.name}",
    )
    def shadow(platform: PlatformResource) -> dg.MaterializeResult:
        version, found = compare(platform.clients, spec)
        if version is None:
            return dg.MaterializeResult(metadata={"note": "no version is the shadow"})
        return dg.MaterializeResult(
            metadata={
                "shadow": version,
                "pairs": found[0].n if found else 0,
                "comparison": dg.MetadataValue.md(md_table(COLUMNS, (_line(row) for row in found))),
            }
        )

    return [shadow]


def compare(clients: Clients, spec: ModelSpec) -> tuple[int | None, tuple[Row, ...]]:
    """(the shadow version, its comparison over the last 28 days); None where no version is the shadow."""
    held = clients.registry.by_alias(spec.name, SHADOW) if spec.name in clients.registry.models() else None
    key, today = ("outcomes", spec.name), clients.clock.now().date()
    if held is None or not clients.lake.exists(key):
        return None if held is None else held.version, ()
    outcomes = clients.lake.read(key, DayRange(today - _WINDOW, today))
    slices = {name: input_column(name) for name in spec.slices}
    return held.version, table(pair(shadow_pairs(spec, held.version, outcomes, slices)), spec.canary.alpha)


def _line(row: Row) -> tuple[Any, ...]:
    where = "all" if row.slice == ("", "") else "=".join(row.slice)
    return where, row.measure, row.n, f"{row.mean:+.4f}" if row.n else "-", f"{row.low:+.4f}", f"{row.high:+.4f}"
