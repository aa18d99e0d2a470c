"""From catalogs to Dagster definitions; tests hand in catalogs of their own.

Belongs here: assembly. Does not belong here: what any asset does.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from mlplatform.features.declared import plans
from mlplatform.orchestration.assets.canary import canary_assets
from mlplatform.orchestration.assets.deployment import deployment_assets
from mlplatform.orchestration.assets.evaluation import evaluation_assets
from mlplatform.orchestration.assets.experiment import experiment_assets
from mlplatform.orchestration.assets.features import feature_assets
from mlplatform.orchestration.assets.ingestion import ingestion_assets
from mlplatform.orchestration.assets.monitoring import monitoring_assets
from mlplatform.orchestration.assets.shadow import shadow_assets
from mlplatform.orchestration.assets.skew import skew_assets
from mlplatform.orchestration.assets.training import training_assets
from mlplatform.orchestration.assets.validation import validation_assets
from mlplatform.orchestration.automation.jobs import jobs
from mlplatform.orchestration.automation.schedules import schedules
from mlplatform.orchestration.automation.sensors import sensors
from mlplatform.orchestration.io_managers import DeltaIOManager
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.specs import Catalog

EXPERIMENT = "training"


def build(found: Sequence[Catalog]) -> dg.Definitions:
    """Assets of every catalog, in the order data flows."""
    assets: list[dg.AssetsDefinition] = []
    for catalog in found:
        views = plans(catalog.feature_package)
        assets += [*ingestion_assets(catalog), *validation_assets(catalog), *feature_assets(catalog, views)]
        for spec in catalog.models:
            assets += [*training_assets(catalog, spec, views), *evaluation_assets(spec), *deployment_assets(spec)]
            assets += [*canary_assets(spec), *shadow_assets(spec), *experiment_assets(spec)]
            assets += [*monitoring_assets(spec), *skew_assets(catalog, spec, views)]
    return dg.Definitions(
        assets=assets,
        jobs=jobs(found),
        schedules=schedules(found),
        sensors=sensors(found),
        resources={"platform": PlatformResource(), "io_manager": DeltaIOManager(), "mlflow": tracking_resource},
    )


@dg.resource(description="dagster-mlflow's resource: opens an MLflow run for the Dagster run and tags one with the other")
def tracking_resource(context: dg.InitResourceContext) -> Iterator[Any]:
    """Made in the run that needs it: importing the integration takes seconds, and its settings are the run's."""
    clients = PlatformResource().clients
    clients.registry.ensure_experiment(EXPERIMENT)
    config: dict[str, Any] = {
        "experiment_name": EXPERIMENT,
        "mlflow_tracking_uri": clients.settings.mlflow_uri,
        "parent_run_id": None,
        "mlflow_run_id": None,
        "env": {},
        "env_to_tag": None,
        "extra_tags": {},
    }
    with warnings.catch_warnings():
        # A legacy resource in beta, which it says at import and at every use; it is used for this binding only.
        warnings.simplefilter("ignore")
        from dagster_mlflow import mlflow_tracking

        wrapped = mlflow_tracking.resource_fn(context.replace_config(config))
        tracking = next(wrapped)
    try:
        yield tracking
    finally:
        wrapped.close()
        # The integration leaves ending to a hook on each job; a run that is never ended shows as running for ever.
        tracking.end_run()
