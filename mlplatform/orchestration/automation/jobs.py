"""The jobs that schedules, sensors, the CLI and the demo run: selections of assets, by name.

Belongs here: which assets go together in one run. Does not belong here: when they run.
"""

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg

from mlplatform.features.declared import plans
from mlplatform.orchestration import policy
from mlplatform.orchestration.assets.online import op_name
from mlplatform.orchestration.automation.approvals import release_judgement
from mlplatform.specs import Catalog, HttpReader, ModelSpec, StreamReader

# A job is named here once and found by name everywhere else.
Job = Any


def jobs(found: Sequence[Catalog]) -> list[Job]:
    """Every job of every catalog. Schedules and sensors name them; a job may be defined once only."""
    made: list[Job] = [release_judgement]
    for catalog in found:
        made += [reference_job(catalog), daily_job(catalog), ingestion_job(catalog), stream_job(catalog), online_job(catalog)]
        for spec in catalog.models:
            made += [training_job(spec), monitoring_job(spec), canary_job(spec)]
    return made


def reference_job(catalog: Catalog) -> Job:
    """Raw and validated tables of the sources without days."""
    keys = [policy.key(stage, s.name) for s in catalog.sources if not s.partitioned for stage in ("raw", "validated", "quarantine")]
    return dg.define_asset_job(
        f"{catalog.name}_reference", selection=dg.AssetSelection.assets(*keys), description="Reference tables, read whole"
    )


def daily_job(catalog: Catalog) -> Job:
    """Raw and validated tables of every source with days; features follow by automation."""
    return _partitioned_job(catalog, f"{catalog.name}_daily", lambda _: True, "One day of every source with days: raw and validated")


def ingestion_job(catalog: Catalog) -> Job:
    """The same for the sources read by windows of time."""
    return _partitioned_job(
        catalog, f"{catalog.name}_windows", lambda s: isinstance(s.reader, HttpReader), "One day of the sources read by windows of time"
    )


def stream_job(catalog: Catalog) -> Job:
    """The same for event streams."""
    return _partitioned_job(
        catalog, f"{catalog.name}_events", lambda s: isinstance(s.reader, StreamReader), "One day of the event streams: raw and validated"
    )


def _partitioned_job(catalog: Catalog, name: str, wanted: Any, description: str) -> Job:
    sources = [s for s in catalog.sources if s.partitioned and wanted(s)]
    keys = [policy.key(stage, s.name) for s in sources for stage in ("raw", "validated", "quarantine")]
    return dg.define_asset_job(name, selection=dg.AssetSelection.assets(*keys), description=description)


def online_job(catalog: Catalog) -> Job:
    """Every view of the catalog online as a new generation, from Delta."""
    views = sorted(plans(catalog.feature_package))
    return dg.define_asset_job(
        f"{catalog.name}_online_rebuild",
        selection=dg.AssetSelection.assets(*(policy.key("online", view) for view in views)),
        config={"ops": {op_name(view): {"config": {"rebuild": True}} for view in views}},
        description="A new generation of every view's online values, built from Delta beside what is read, verified, then switched to",
    )


def training_job(spec: ModelSpec) -> Job:
    """From the training set to the deployment, stopped by any blocking check."""
    stages = ("training_set", "tuning", "model", "evaluation", "deployment")
    return dg.define_asset_job(
        f"{spec.name}_training",
        selection=dg.AssetSelection.assets(*(policy.key(stage, spec.name) for stage in stages)),
        description="Training set, study, model version, evaluation, and deployment if the gates pass",
    )


def monitoring_job(spec: ModelSpec) -> Job:
    """Drain, labels, performance, drift and skew."""
    stages = ("predictions", "outcomes", "shadow", "experiment", "performance", "data_drift", "prediction_drift", "skew")
    return dg.define_asset_job(
        f"{spec.name}_monitoring",
        selection=dg.AssetSelection.assets(*(policy.key(stage, spec.name) for stage in stages)),
        description="Prediction log, outcomes, performance, drift and skew",
    )


def canary_job(spec: ModelSpec) -> Job:
    """What was asked and answered lately, and the judgement over it."""
    stages = ("predictions", "outcomes", "canary")
    return dg.define_asset_job(
        f"{spec.name}_canary",
        selection=dg.AssetSelection.assets(*(policy.key(stage, spec.name) for stage in stages)),
        description="Prediction log, outcomes, and the judge's next step for the canary",
    )


def labels_complete(spec: ModelSpec, now: datetime) -> date:
    """The day before which every outcome is known."""
    return (now - spec.max_label_delay - timedelta(days=1)).date()


def training_run_config(spec: ModelSpec, now: datetime) -> dict[str, Any]:
    """Run config of a retraining: the declared split moved so that its test ends where labels are complete."""
    end = max(labels_complete(spec, now), spec.split.end)
    return {"ops": {f"training_set_{spec.name}": {"config": {"end": end.isoformat()}}}}
