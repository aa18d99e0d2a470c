"""The job by which a person approves or rejects a version in the Dagster UI, with the reason.

Belongs here: the run's configuration and its one op. Does not belong here: whether the judgement counts (`release_state`).
"""

import dagster as dg

from mlplatform.orchestration.canary_state import release_approved
from mlplatform.orchestration.release_state import approve, reject
from mlplatform.orchestration.resources import PlatformResource

RELEASE_JUDGEMENT = "release_judgement"


class Judgement(dg.Config):
    """Who says what about which version. `approver` is the person, as the run itself is started by a service."""

    model: str
    version: int
    approved: bool
    approver: str
    reason: str


@dg.op(description="Signs a version off, or keeps it from serving; an entry of the deployment ledger.")
def judge_version(context: dg.OpExecutionContext, config: Judgement, platform: PlatformResource) -> None:
    clients = platform.clients
    if not config.approver.strip() or not config.reason.strip():
        raise dg.Failure("A judgement names who gives it and why: set approver and reason.")
    judge = approve if config.approved else reject
    new = judge(clients, config.model, config.version, config.approver, config.reason, context.run.run_id)
    context.log.info(f"version {config.version} of {config.model}: {'recorded' if new else 'was so already'}")
    if config.approved and (released := release_approved(clients, config.model, config.version, config.approver, context.run.run_id)):
        context.log.info(f"{released.action}: {released.reason}")


@dg.job(name=RELEASE_JUDGEMENT, description="Approve or reject a model version, with the reason; `mlplatform approve` does the same")
def release_judgement() -> None:
    judge_version()
