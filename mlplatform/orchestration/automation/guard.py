"""The sensor that keeps registry and ledger together: aliases moved by hand, changes cut off, a ledger that was altered.

Belongs here: when to act on what was found. Does not belong here: what a difference means (`deployment.guard`), mending it
(`release_state`).
"""

import dagster as dg

from mlplatform.clients.registry import UnknownModelError
from mlplatform.orchestration.automation.decisions import guard
from mlplatform.orchestration.recording import alert_broken, verify_ledger
from mlplatform.orchestration.release_state import found_differences, seal_of_before, settle
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import ModelSpec

ACTOR = "guard"


def guard_sensor(spec: ModelSpec) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{spec.name}_guard",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Puts back aliases that an unverified version carries, records moves the ledger missed, and verifies the ledger.",
    )
    def watch(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        clients = platform.clients
        try:
            seal_of_before(clients, spec.name, clients.registry.versions(spec.name))
            found = found_differences(clients, spec.name)
        except UnknownModelError:
            return dg.SensorResult(skip_reason="no version is registered yet", cursor=context.cursor)
        ledger = verify_ledger(clients, spec.name)
        decision = guard([str(d) for d in found if d.why], [str(d) for d in found if not d.why], ledger.faults, context.cursor)
        if decision.alert:
            alert_broken(clients, ledger)
        if decision.act:
            settle(clients, spec.name, ACTOR)
        return dg.SensorResult(skip_reason=decision.reason, cursor=decision.cursor)

    return watch
