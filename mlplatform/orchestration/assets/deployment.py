"""`deployment/<model>`: a version past its gates is released here, as canary or at once; the alias `production` moves no other way.

Belongs here: what is released and what an analyst sees of the history. Does not belong here: the decision itself.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlplatform.deployment.history import latest, told_action
from mlplatform.deployment.timeline import timeline
from mlplatform.orchestration import policy
from mlplatform.orchestration.assets.evaluation import newest_version
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.canary_state import release
from mlplatform.orchestration.metadata import md_table, picture
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.specs import ModelSpec


def deployment_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "deployment",
                spec.name,
                description=f"What serves for `{spec.name}`: who answers which share, and how that came about.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("evaluation", spec.name))],
                condition=conditions.after_gates(),
            )
        ],
        name=f"deployment_{spec.name}",
        pool=f"deployment_{spec.name}",
    )
    def deployment(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        clients = platform.clients
        released = release(clients, spec.name, spec.canary, newest_version(clients, spec).version, "dagster", context.run.run_id)
        if released.action == "refuse":
            raise dg.Failure(f"Version {released.version} of {spec.name} is refused: {released.reason}")
        return dg.MaterializeResult(
            metadata={
                "action": released.action,
                "version": released.version,
                "serves": released.serves or "none",
                "reason": released.reason,
                "service": dg.MetadataValue.url(f"{clients.settings.serving_url}/v1/models/{spec.name}"),
                **seen(clients, spec.name),
            }
        )

    return [deployment]


def seen(clients: Clients, model: str) -> dict[str, Any]:
    """What an analyst sees of a model's deployment now: the split, the judge's last verdict with its evidence, timeline and history."""
    entries = clients.ledger.entries(model)
    verdict = next((e for e in reversed(entries) if e.action == "verdict"), None)
    judged = [] if verdict is None else [("version", verdict.version), ("reason", verdict.reason), *sorted(verdict.evidence.items())]
    rows = (
        (e.at.isoformat(timespec="seconds"), told_action(e.action, e.evidence), e.version, e.previous_version, e.actor, e.reason)
        for e in reversed(entries)
    )
    return {
        "split": dg.MetadataValue.md(md_table(("variant", "version", "percent"), latest(entries).shares())),
        "last_verdict": dg.MetadataValue.md(md_table(("", "of the judge"), judged)) if judged else "none",
        "history": dg.MetadataValue.md(md_table(("at", "action", "version", "before", "actor", "reason"), rows)),
        "timeline": picture(timeline(entries, clients.clock.now()), "who answered when"),
    }
