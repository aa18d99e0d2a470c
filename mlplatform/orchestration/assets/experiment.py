"""`experiment/<model>`: the result so far of the A/B experiment that runs.

Belongs here: what an analyst sees of it. Does not belong here: the statistics (`deployment.experiment`), which records count
(`experiment_state`).
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlplatform.deployment.experiment import ExperimentResult
from mlplatform.deployment.experiment_plot import effects_plot
from mlplatform.orchestration import policy
from mlplatform.orchestration.experiment_state import effect_rows, experiment_result
from mlplatform.orchestration.metadata import md_table, picture
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import ModelSpec


def experiment_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "experiment",
                spec.name,
                description=f"The A/B experiment on `{spec.name}`'s traffic: entities per arm, and what differs, readable at any time.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("outcomes", spec.name))],
            )
        ],
        name=f"experiment_{spec.name}",
    )
    def experiment(platform: PlatformResource) -> dg.MaterializeResult:
        found = experiment_result(platform.clients, spec)
        return dg.MaterializeResult(metadata={"note": "no experiment runs"} if found is None else _metadata(found))

    return [experiment]


def _metadata(found: ExperimentResult) -> dict[str, Any]:
    rows = effect_rows(found)
    return {
        "experiment": found.experiment,
        "since": found.since.isoformat(),
        "entities": dg.MetadataValue.json(dict(found.entities)),
        "crossed": found.crossed,
        "sample_ratio_mismatch": found.mismatch,
        "effects": dg.MetadataValue.md(md_table(tuple(rows[0]), (tuple(row.values()) for row in rows))),
        "intervals": picture(effects_plot(found), "arm less control"),
    }
