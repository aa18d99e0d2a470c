"""Policy that cuts across stages, mapped over asset specs in one place: groups, kinds, owners, retries, concurrency.

Belongs here: what is the same for every asset of a stage. Does not belong here: anything about one asset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import dagster as dg

from mlplatform.features.plan import ViewPlan


@dataclass(frozen=True)
class Stage:
    """One word per stage: asset key prefix, group, kinds, and what analysts read about it."""

    group: str
    kinds: frozenset[str]


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "raw": Stage("ingestion", frozenset({"polars", "deltalake"})),
        "validated": Stage("validation", frozenset({"polars", "deltalake"})),
        "quarantine": Stage("validation", frozenset({"polars", "deltalake"})),
        "feature_registry": Stage("features", frozenset({"feast"})),
        "offline": Stage("features", frozenset({"polars", "deltalake", "feast"})),
        "online": Stage("features", frozenset({"redis", "feast"})),
        "training_set": Stage("training", frozenset({"polars", "deltalake", "feast"})),
        "tuning": Stage("training", frozenset({"optuna"})),
        "model": Stage("training", frozenset({"mlflow"})),
        "evaluation": Stage("evaluation", frozenset({"mlflow"})),
        "deployment": Stage("deployment", frozenset({"mlflow"})),
        "predictions": Stage("monitoring", frozenset({"redis", "deltalake"})),
        "outcomes": Stage("monitoring", frozenset({"polars", "deltalake"})),
        "canary": Stage("deployment", frozenset({"polars", "mlflow"})),
        "shadow": Stage("deployment", frozenset({"polars"})),
        "experiment": Stage("deployment", frozenset({"polars"})),
        "performance": Stage("monitoring", frozenset({"polars"})),
        "data_drift": Stage("monitoring", frozenset({"evidently"})),
        "prediction_drift": Stage("monitoring", frozenset({"evidently"})),
        "skew": Stage("monitoring", frozenset({"polars", "deltalake"})),
    }
)

# Reading a source again is safe (every write is idempotent), and most source failures pass by themselves.
SOURCE_RETRIES = dg.RetryPolicy(max_retries=2, delay=2, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


SHORTEST_WINDOW = timedelta(minutes=1)  # Dagster takes no shorter freshness window


def key(stage: str, name: str) -> dg.AssetKey:
    """The asset key of one thing at one stage; an unknown stage is a mistake in the code."""
    if stage not in STAGES:
        raise KeyError(f"'{stage}' is not a stage: {sorted(STAGES)}")
    return dg.AssetKey([stage, name])


def spec(
    stage: str,
    name: str,
    *,
    description: str,
    owner: str,
    deps: list[dg.AssetDep] | None = None,
    partitions: dg.PartitionsDefinition | None = None,
    metadata: Mapping[str, object] | None = None,
    condition: dg.AutomationCondition[Any] | None = None,
    code_version: str | None = None,
    freshness: dg.FreshnessPolicy | None = None,
    extra_kinds: frozenset[str] = frozenset(),
) -> dg.AssetSpec:
    """An asset's spec with its stage's policy applied."""
    stage_policy = STAGES[stage]
    return dg.AssetSpec(
        key=key(stage, name),
        description=description,
        owners=[owner],
        group_name=stage_policy.group,
        kinds=set(stage_policy.kinds | extra_kinds),
        deps=deps or [],
        partitions_def=partitions,
        metadata=dict(metadata or {}),
        automation_condition=condition,
        code_version=code_version,
        freshness_policy=freshness,
    )


def freshness(plan: ViewPlan) -> dg.FreshnessPolicy:
    """Of both of a view's assets: late when a tick and its way online are overdue, failed when values reach their ttl."""
    late, failed = plan.cadence + plan.recipe.propagation_budget, max(plan.ttl, SHORTEST_WINDOW)
    return dg.FreshnessPolicy.time_window(fail_window=failed, warn_window=late if SHORTEST_WINDOW <= late < failed else None)
