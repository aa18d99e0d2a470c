"""`canary/<model>`: what the judge says of the canary on trial, and the step that follows from it.

Belongs here: when it is judged and what an analyst sees. Does not belong here: the judgement (`orchestration.canary_trial`).
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlplatform.deployment.judge_plot import evidence_plot
from mlplatform.orchestration import policy
from mlplatform.orchestration.assets.deployment import seen
from mlplatform.orchestration.canary_trial import Judgement, judge_canary
from mlplatform.orchestration.metadata import md_table, picture
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import ModelSpec

COLUMNS = ("measure", "difference", "low", "high", "canary", "champion", "state")


def canary_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "canary",
                spec.name,
                description=f"The trial of `{spec.name}`'s canary beside the champion: evidence, verdict, next step.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("outcomes", spec.name))],
            )
        ],
        name=f"canary_{spec.name}",
        pool=f"deployment_{spec.name}",
    )
    def canary(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        told = judge_canary(platform.clients, spec, run_id=context.run.run_id)
        shown = {"note": "no canary answers"} if told is None else _metadata(told)
        return dg.MaterializeResult(metadata={**shown, **seen(platform.clients, spec.name)})

    return [canary]


def rows(told: Judgement) -> list[dict[str, Any]]:
    """A line for each measure."""
    return [
        {
            "measure": f.measure,
            "difference": f"{f.difference:+.4f}" if min(f.canary_n, f.champion_n) else "-",
            "low": f"{f.low:+.4f}",
            "high": f"{f.high:+.4f}",
            "canary": round(f.canary_n),
            "champion": round(f.champion_n),
            "state": f.state,
        }
        for f in told.verdict.findings
    ]


def _metadata(told: Judgement) -> dict[str, Any]:
    return {
        "canary": told.trial.canary,
        "champion": told.trial.champion,
        "share_percent": told.progress.percent,
        "verdict": told.verdict.word,
        "reason": told.step.reason,
        "step": told.step.action,
        "refused": "; ".join(told.refused) or "no",
        "counters": told.unheard or "read",
        "evidence": dg.MetadataValue.md(md_table(COLUMNS, ([row[c] for c in COLUMNS] for row in rows(told)))),
        "intervals": picture(evidence_plot(told.verdict), "canary less champion"),
    }
