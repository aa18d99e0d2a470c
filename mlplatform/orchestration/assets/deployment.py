"""`deployment/<model>`: the alias `production` moves here, through the gates only.

Belongs here: what is promoted and what an analyst sees of the history. Does not belong here: the decision itself.
"""

from collections.abc import Sequence

import dagster as dg

from mlplatform.deployment.timeline import timeline
from mlplatform.orchestration import policy
from mlplatform.orchestration.assets.evaluation import newest_version
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.metadata import md_table, picture
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.orchestration.serving_state import promote
from mlplatform.specs import ModelSpec


def deployment_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "deployment",
                spec.name,
                description=f"What serves for `{spec.name}`: the version behind the alias `production`, and every move of it.",
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
        decision = promote(clients, spec.name, newest_version(clients, spec).version, "dagster", context.run.run_id)
        if decision.action == "refuse":
            raise dg.Failure(f"Version {decision.version} of {spec.name} is refused: {decision.reason}")
        entries = clients.ledger.entries(spec.name)
        rows = ((e.at.isoformat(timespec="seconds"), e.action, e.version, e.previous_version, e.actor, e.reason) for e in reversed(entries))
        return dg.MaterializeResult(
            metadata={
                "action": decision.action,
                "serves": decision.version,
                "before": decision.before or "none",
                "reason": decision.reason,
                "service": dg.MetadataValue.url(f"{clients.settings.serving_url}/v1/models/{spec.name}"),
                "history": dg.MetadataValue.md(md_table(("at", "action", "version", "before", "actor", "reason"), rows)),
                "timeline": picture(timeline(entries, clients.clock.now()), "what served when"),
            }
        )

    return [deployment]
