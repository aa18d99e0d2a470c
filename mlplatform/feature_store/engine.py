"""Feast compute engine that moves stored features from Delta to Redis: the class to name in `feature_store.yaml`.

    batch_engine:
      type: mlplatform.feature_store.engine.DeltaComputeEngine

Belongs here: `feast materialize` between our two stores. Does not belong here: computing features: the tables hold them
already, windowed ones too. (Feast's own local engine would run a view's aggregations again, and refuses those with a time window.)
"""

from typing import Any, Literal

import polars as pl
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel

from mlplatform.feature_store.generations import build_generation
from mlplatform.feature_store.online import RedisOnlineStore, layout_of


class DeltaComputeEngineConfig(FeastConfigBaseModel):  # type: ignore[misc]  # Feast is untyped here
    """Options of the Delta compute engine: none."""

    type: Literal["mlplatform.feature_store.engine.DeltaComputeEngine"] = "mlplatform.feature_store.engine.DeltaComputeEngine"


class DeltaComputeEngine(LocalComputeEngine):  # type: ignore[misc]  # Feast is untyped here
    """Materializes the newest stored row of each entity as a new generation, which readers see whole. Needs `RedisOnlineStore`."""

    def __init__(self, *, type: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _materialize_one(self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any) -> MaterializationJob:
        # The job carries no error: an exception passes through, so that Feast neither swallows nor rewords it.
        view, store = task.feature_view, self.online_store
        if not isinstance(store, RedisOnlineStore):
            raise TypeError(f"DeltaComputeEngine writes to {RedisOnlineStore.__module__}.RedisOnlineStore, not to {type(store).__name__}")
        source = view.batch_source
        if source is None:
            raise ValueError(f"feature view {view.name} has no batch source to materialize from")
        stored = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
        layout = layout_of(view)
        keys, features = layout.join_keys, layout.features
        event, created = (stored.get(name, name) for name in (source.timestamp_field, source.created_timestamp_column or ""))

        def rows() -> pl.DataFrame:
            # Not only the newest of each entity, which the builder picks anyway, and once is enough.
            window = self.offline_store.pull_all_from_table_or_query(
                config=self.repo_config,
                data_source=source,
                join_key_columns=[stored.get(k, k) for k in keys],
                feature_name_columns=[stored.get(f, f) for f in features],
                timestamp_field=event,
                created_timestamp_column=created or None,
                start_date=task.start_time,
                end_date=task.end_time,
            )
            found = pl.DataFrame(window.to_arrow()).rename({stored[n]: n for n in (*keys, *features) if n in stored})
            return found.drop_nulls(keys) if keys else found

        # Feast keeps entities that have no row in the window: they come over from the generation before.
        build_generation(
            store.client(self.repo_config),
            task.project,
            view.name,
            keys,
            features,
            rows,
            at=store.now(self.repo_config),
            by="feast materialize",
            event=event,
            created=created or None,
            carry_over=True,
        )
        return LocalMaterializationJob(job_id=f"{view.name}-{task.start_time}-{task.end_time}", status=MaterializationJobStatus.SUCCEEDED)
