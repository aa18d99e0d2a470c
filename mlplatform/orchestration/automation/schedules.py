"""Every schedule: daily and hourly ingestion, monitoring, weekly retraining.

Belongs here: when a job runs by the clock. Does not belong here: what follows from data (conditions, sensors).
The day a tick is for comes from the platform's clock, which may be a simulated one, not from the scheduler's.
"""

from collections.abc import Iterator, Sequence
from datetime import date, timedelta

import dagster as dg

from mlplatform.orchestration.automation.jobs import (
    daily_job,
    ingestion_job,
    monitoring_job,
    online_job,
    reference_job,
    training_job,
    training_run_config,
)
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import Catalog, ModelSpec

RUNNING = dg.DefaultScheduleStatus.RUNNING


def schedules(found: Sequence[Catalog]) -> list[dg.ScheduleDefinition]:
    """The schedules of every catalog; all of them are running unless somebody stops them."""
    made: list[dg.ScheduleDefinition] = []
    for catalog in found:
        made += [_daily_reference(catalog), _daily_ingestion(catalog), _hourly_ingestion(catalog), _daily_online(catalog)]
        for spec in catalog.models:
            made += [_weekly_training(spec), _hourly_monitoring(spec)]
    return made


def _daily_reference(catalog: Catalog) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=f"{catalog.name}_reference_daily",
        job_name=reference_job(catalog).name,
        cron_schedule="15 0 * * *",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="The tables without days (reference data), read whole once a day.",
    )


def _daily_ingestion(catalog: Catalog) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{catalog.name}_ingestion_daily",
        job_name=daily_job(catalog).name,
        cron_schedule="30 0 * * *",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="Yesterday once more, complete: late rows are in, and the contract's age limits are judged.",
    )
    def daily(context: dg.ScheduleEvaluationContext, platform: PlatformResource) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield request_for_day(catalog, platform.clients.clock.now().date() - timedelta(days=1), "daily")

    return daily


def _hourly_ingestion(catalog: Catalog) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{catalog.name}_ingestion_hourly",
        job_name=ingestion_job(catalog).name,
        cron_schedule="5 * * * *",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="What the windowed APIs know of today by now; event streams come by sensor.",
    )
    def hourly(context: dg.ScheduleEvaluationContext, platform: PlatformResource) -> Iterator[dg.RunRequest | dg.SkipReason]:
        now = platform.clients.clock.now()
        yield request_for_day(catalog, now.date(), now.strftime("%Y-%m-%dT%H"))

    return hourly


def _daily_online(catalog: Catalog) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=f"{catalog.name}_online_rebuild_daily",
        job_name=online_job(catalog).name,
        cron_schedule="0 2 * * *",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="All online values anew from Delta: what Delta does not say is gone, and so are entities past their ttl.",
    )


def request_for_day(catalog: Catalog, day: date, key: str) -> dg.RunRequest | dg.SkipReason:
    """One run for one day's partition, or the reason why that day has none."""
    if day < catalog.start or (catalog.end is not None and day >= catalog.end):
        return dg.SkipReason(f"{day} is outside the days of catalog {catalog.name}")
    return dg.RunRequest(run_key=f"{catalog.name}-{day}-{key}", partition_key=day.isoformat())


def _weekly_training(spec: ModelSpec) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{spec.name}_training_weekly",
        job_name=training_job(spec).name,
        cron_schedule="0 3 * * 1",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="A new version every Monday, on data up to the last day whose labels are in; it serves only past its gates.",
    )
    def weekly(context: dg.ScheduleEvaluationContext, platform: PlatformResource) -> dg.RunRequest:
        now = platform.clients.clock.now()
        return dg.RunRequest(run_key=f"weekly-{now:%G-W%V}", run_config=training_run_config(spec, now))

    return weekly


def _hourly_monitoring(spec: ModelSpec) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(
        name=f"{spec.name}_monitoring_hourly",
        job_name=monitoring_job(spec).name,
        cron_schedule="20 * * * *",
        execution_timezone="UTC",
        default_status=RUNNING,
        description="Drains the prediction log, joins labels, reports performance, drift and skew.",
    )
