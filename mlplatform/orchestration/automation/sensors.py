"""Every sensor: a thin skin over a pure decision.

Belongs here: reading what the decision needs, and turning it into run requests. Does not belong here: the decision
(`decisions`, room `monitoring`).
"""

import json
from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlplatform.contracts import EVALUATION_TAG, PRODUCTION, prediction_stream
from mlplatform.deployment.evidence import on_trial
from mlplatform.monitoring.retrain import decide_retrain
from mlplatform.orchestration import policy
from mlplatform.orchestration.automation.decisions import new_entries, new_outcomes
from mlplatform.orchestration.automation.guard import guard_sensor
from mlplatform.orchestration.automation.jobs import canary_job, monitoring_job, stream_job, training_job, training_run_config
from mlplatform.orchestration.automation.schedules import request_for_day
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.records import DriftSummary, PerformanceSummary
from mlplatform.specs import Catalog, ModelSpec, StreamReader

RUNNING = dg.DefaultSensorStatus.RUNNING
UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def sensors(found: Sequence[Catalog]) -> list[dg.SensorDefinition]:
    """The sensors of every catalog, and the one that evaluates automation conditions; all running."""
    made: list[dg.SensorDefinition] = [
        dg.AutomationConditionSensorDefinition(
            "automation",
            target=dg.AssetSelection.all(),
            default_status=RUNNING,
            minimum_interval_seconds=30,
            description="Materializes what its upstream updated, past the blocking checks.",
        )
    ]
    for catalog in found:
        if any(isinstance(s.reader, StreamReader) for s in catalog.sources):
            made.append(_new_events(catalog))
        for spec in catalog.models:
            made += [_new_outcomes(spec), _retrain(spec), guard_sensor(spec), _canary(spec)]
    return made


def _new_events(catalog: Catalog) -> dg.SensorDefinition:
    readers = [s.reader for s in catalog.sources if isinstance(s.reader, StreamReader)]

    @dg.sensor(
        name=f"{catalog.name}_new_events",
        job_name=stream_job(catalog).name,
        minimum_interval_seconds=30,
        default_status=RUNNING,
        description="Runs today's partition of the event streams when entries wait that the group has not read.",
    )
    def new_events(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        clients = platform.clients
        waiting: dict[str, int | None] = {}
        for reader in readers:
            with clients.source_streams(reader.connection) as client:
                status = client.status(reader.stream, reader.group)
                waiting[reader.stream] = (
                    client.length(reader.stream) if status is None else (None if status.lag is None else status.lag + status.pending)
                )
        decision = new_entries(waiting, context.cursor, _unfinished(context, stream_job(catalog).name))
        if not decision.run:
            return dg.SensorResult(skip_reason=decision.reason, cursor=decision.cursor)
        request = request_for_day(catalog, clients.clock.now().date(), decision.cursor)
        if isinstance(request, dg.SkipReason):
            return dg.SensorResult(skip_reason=request, cursor=decision.cursor)
        return dg.SensorResult(run_requests=[request], cursor=decision.cursor)

    return new_events


def _new_outcomes(spec: ModelSpec) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{spec.name}_new_outcomes",
        job_name=monitoring_job(spec).name,
        minimum_interval_seconds=60,
        default_status=RUNNING,
        description="Runs monitoring when predictions wait in the log or labelled rows have changed.",
    )
    def outcomes(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        clients = platform.clients
        with clients.platform_streams as stream:
            logged = stream.last_id(prediction_stream(spec.name))
        versions = {s: clients.lake.version(("validated", s)) for s in spec.inputs if clients.lake.exists(("validated", s))}
        decision = new_outcomes(logged, versions, context.cursor, _unfinished(context, monitoring_job(spec).name))
        if not decision.run:
            return dg.SensorResult(skip_reason=decision.reason, cursor=decision.cursor)
        return dg.SensorResult(run_requests=[dg.RunRequest(run_key=decision.cursor)], cursor=decision.cursor)

    return outcomes


def _retrain(spec: ModelSpec) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{spec.name}_retrain",
        job_name=training_job(spec).name,
        minimum_interval_seconds=120,
        default_status=RUNNING,
        description="Asks for a retraining on performance loss or drift, at most once per cooldown.",
    )
    def retrain(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        clients = platform.clients
        now = clients.clock.now()
        decision = decide_retrain(
            spec.name,
            spec.retrain,
            newest_summary(clients, "performance", spec.name, PerformanceSummary),
            _evaluated(clients, spec),
            [d for kind in ("data_drift", "prediction_drift") if (d := newest_summary(clients, kind, spec.name, DriftSummary))],
            context.cursor,
            now,
            came_to_nothing=_came_to_nothing(context, spec),
        )
        if not decision.retrain:
            return dg.SensorResult(skip_reason=decision.reason, cursor=decision.cursor)
        request = dg.RunRequest(
            run_key=decision.cursor, run_config=training_run_config(spec, now), tags={"mlplatform/retrain_reason": decision.reason[:200]}
        )
        return dg.SensorResult(run_requests=[request], cursor=decision.cursor)

    return retrain


def _canary(spec: ModelSpec) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{spec.name}_canary",
        job_name=canary_job(spec).name,
        minimum_interval_seconds=60,
        default_status=RUNNING,
        description="Has the canary judged, as long as one answers; one judgement at a time.",
    )
    def canary(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        clients = platform.clients
        if on_trial(clients.ledger.entries(spec.name), spec.canary.window) is None:
            return dg.SensorResult(skip_reason="no canary answers")
        if _unfinished(context, canary_job(spec).name):
            return dg.SensorResult(skip_reason="the last judgement is under way")
        return dg.SensorResult(run_requests=[dg.RunRequest()])

    return canary


def _unfinished(context: dg.SensorEvaluationContext, job: str) -> bool:
    """Whether a run of the job is queued, starting or at work."""
    return bool(context.instance.get_run_ids(dg.RunsFilter(job_name=job, statuses=UNFINISHED), limit=1))


def _came_to_nothing(context: dg.SensorEvaluationContext, spec: ModelSpec) -> bool:
    """Whether the run this sensor asked for last has failed before it registered a model version."""
    asked = context.instance.get_runs(dg.RunsFilter(tags={"dagster/run_key": context.cursor}), limit=1) if context.cursor else []
    if not asked or asked[0].status is not dg.DagsterRunStatus.FAILURE:
        return False
    made = context.instance.get_latest_materialization_event(policy.key("model", spec.name))
    return made is None or made.run_id != asked[0].run_id


def _evaluated(clients: Clients, spec: ModelSpec) -> dict[str, Any] | None:
    """The serving version's metrics in its evaluation; None where nothing serves or it was never evaluated."""
    version = clients.registry.by_alias(spec.name, PRODUCTION)
    recorded = version.tags.get(EVALUATION_TAG) if version else None
    return json.loads(recorded) if recorded else None
