"""Feast offline store over Delta tables: the class to name in `feature_store.yaml`.

    offline_store:
      type: mlplatform.feature_store.offline.DeltaOfflineStore

Belongs here: Feast's interface and its objects' translation into queries. Does not belong here: the join (`join.py`),
reading tables (`tables.py`), running a retrieval (`retrieval.py`).

n entity rows in are n rows out, in the caller's order. Per view the newest row with `event_timestamp <= t` counts and, by default,
`created <= t`: what was known and available then. `later_corrections: true` in the configuration takes corrections
made after t as well. A value older than the view's ttl (age > ttl), an unknown entity and a missing key give null.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.utils import compute_non_entity_date_range
from pydantic import Field

from mlplatform.feature_store.join import TIME, newest
from mlplatform.feature_store.retrieval import DeltaRetrievalJob, ViewQuery, enrich, entity_table, questions_in_range
from mlplatform.feature_store.tables import FeatureTable, arrow


class DeltaOfflineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]  # Feast is untyped here
    """Options of the Delta offline store."""

    type: Literal["mlplatform.feature_store.offline.DeltaOfflineStore"] = "mlplatform.feature_store.offline.DeltaOfflineStore"
    # As deltalake and Polars take them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …). What is not here comes from the environment.
    storage_options: dict[str, str] = Field(default_factory=dict)
    # Take values corrected after the entity row's time: for analysis, never for training.
    later_corrections: bool = False
    # Partition column with the UTC day of the event time, used to skip files. "" switches it off.
    partition_column: str = "event_date"


class DeltaOfflineStore(OfflineStore):  # type: ignore[misc]  # Feast is untyped here
    """Point-in-time correct history from Delta tables with Polars."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: Any,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        *,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """See Feast. `entity_df` may also be a Polars or Arrow frame; None asks for [start_date, end_date] (`questions_in_range`).

        `filter_by_created_timestamp=True` forces the default rule where the configuration says `later_corrections`.
        """
        later_corrections = _options(config).later_corrections and not filter_by_created_timestamp
        queries = [q for view in feature_views if (q := _query(config, view, feature_refs, full_feature_names)).features]
        if entity_df is None:
            start, end = compute_non_entity_date_range(feature_views, start_date, end_date)
            entities, time = questions_in_range(queries, start, end, later_corrections=later_corrections)
        else:
            entities, time = entity_table(entity_df)
        times = pl.Series(pl.from_arrow(entities.column(time)))
        first, last = times.min(), times.max()
        return DeltaRetrievalJob(
            lambda: enrich(entities, time, queries, later_corrections=later_corrections),
            table_of=_storage_table(config),
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            full_feature_names=full_feature_names,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entities.column_names if name != time],
                min_event_timestamp=first if isinstance(first, datetime) else None,
                max_event_timestamp=last if isinstance(last, datetime) else None,
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row per entity with start <= event time <= end, ties by created.

        Corrections count whenever they were made: what is served next is the best that is known now.
        """

        def evaluate() -> pa.Table:
            rows = _pull(
                config, data_source, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column, start_date, end_date
            )
            return arrow(newest(rows, keys=_real(join_key_columns), event=timestamp_field, created=created_timestamp_column or None))

        return DeltaRetrievalJob(evaluate, table_of=_storage_table(config))

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row with start <= event time <= end."""
        return DeltaRetrievalJob(
            lambda: arrow(
                _pull(
                    config,
                    data_source,
                    join_key_columns,
                    feature_name_columns,
                    timestamp_field,
                    created_timestamp_column,
                    start_date,
                    end_date,
                )
            ),
            table_of=_storage_table(config),
        )

    @staticmethod
    def offline_write_batch(config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None) -> None:
        """Appends rows to the view's table in one commit, filling in the day partition. A table that is not there is created.

        Times may be ISO 8601 texts, which is how `feast serve` hands on what is pushed to it.
        """
        source = _source(feature_view)
        event, created = (_stored(feature_view, name) for name in (source.timestamp_field, source.created_timestamp_column or ""))
        rows = pl.DataFrame(table)
        texts = [name for name in (event, created) if rows.schema.get(name) == pl.String]
        rows = rows.with_columns(_moments(rows.get_column(name)) for name in texts)
        _table(config, source, event).append(rows)
        if progress:
            progress(rows.height)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """A table that is not there yet is fine: its asset writes it after `feast apply`. One without its time column is not."""
        table = _table(config, data_source)
        if not table.exists():
            return
        columns = table.schema()
        stored = {name: raw for raw, name in (data_source.field_mapping or {}).items()}.get(table.event, table.event)
        if table.event and stored not in columns:
            raise ValueError(f"table {table.uri} has no timestamp column {stored}; it has {', '.join(columns)}")

    def get_table_column_names_and_types_from_data_source(self, config: RepoConfig, data_source: DataSource) -> Iterable[tuple[str, str]]:
        """Columns and Arrow types, without the day partition, which writers never fill in themselves."""
        table = _table(config, data_source)
        empty = arrow(pl.DataFrame(schema=table.schema()))
        return [(f.name, str(f.type).removeprefix("large_")) for f in empty.schema if f.name != table.day]


def _options(config: RepoConfig) -> DeltaOfflineStoreConfig:
    options = config.offline_store
    assert isinstance(options, DeltaOfflineStoreConfig)
    return options


def _table(config: RepoConfig, source: DataSource, event: str = "") -> FeatureTable:
    options = _options(config)
    return FeatureTable.of(source, config.repo_path, options.storage_options, options.partition_column, event)


def _storage_table(config: RepoConfig) -> Callable[[SavedDatasetStorage], FeatureTable]:
    return lambda storage: _table(config, storage.to_data_source())


def _source(view: FeatureView) -> DataSource:
    if view.batch_source is None:
        raise ValueError(f"feature view {view.name} has no batch source: there is no history to read or to write")
    return view.batch_source


def _stored(view: FeatureView, name: str) -> str:
    """A column's name in the table, where the source maps it to another."""
    stored: dict[str, str] = {mapped: raw for raw, mapped in (_source(view).field_mapping or {}).items()}
    return stored.get(name, name)


def _real(join_keys: Iterable[str]) -> list[str]:
    """Without the key Feast invents for views without entities."""
    return [key for key in join_keys if key != DUMMY_ENTITY_ID]


def _query(config: RepoConfig, view: FeatureView, feature_refs: Sequence[str], full_feature_names: bool) -> ViewQuery:
    source, projection = _source(view), view.projection
    prefix = f"{projection.name_to_use()}:"
    shown = f"{projection.name_alias or view.name}__" if full_feature_names else ""
    names = dict.fromkeys(ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix))
    event = _stored(view, source.timestamp_field)
    return ViewQuery(
        view=view.name,
        table=_table(config, source, event),
        on={projection.join_key_map.get(key, key): _stored(view, key) for key in _real(c.name for c in view.entity_columns)},
        event=event,
        created=_stored(view, source.created_timestamp_column) if source.created_timestamp_column else None,
        ttl=view.ttl or None,
        features={_stored(view, name): f"{shown}{name}" for name in names},
    )


def _pull(
    config: RepoConfig,
    source: DataSource,
    join_keys: Sequence[str],
    features: Sequence[str],
    event: str,
    created: str | None,
    start: datetime | None,
    end: datetime | None,
) -> pl.DataFrame:
    # No features named: Feast wants every column, for a transformation of its own.
    columns = [*_real(join_keys), *features, event, *([created] if created else [])] if features else None
    rows = _table(config, source, event).read(columns, _utc(start), _utc(end))
    # Feast files a view without entities under a key of its own making, and wants to find it as a column.
    return rows if join_keys else rows.with_columns(pl.lit(DUMMY_ENTITY_VAL).alias(DUMMY_ENTITY_ID))


def _moments(texts: pl.Series) -> pl.Series:
    """Texts without a zone are UTC. Raises ValueError for one that is no time."""
    times = pd.to_datetime(pd.Series(texts.to_list()), utc=True, format="ISO8601").dt.as_unit("us")
    return pl.Series(texts.name, times.dt.tz_localize(None).to_numpy()).cast(TIME)


def _utc(time: datetime | None) -> datetime | None:
    if time is None:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
