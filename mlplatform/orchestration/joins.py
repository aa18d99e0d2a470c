"""Labelled rows of a model, and their features as they were known: the two reads that training and monitoring share.

Belongs here: which validated days and which feature service are read. Does not belong here: what is done with the rows.
"""

from collections.abc import Mapping
from datetime import timedelta

import polars as pl

from mlplatform.feature_store.tables import pinned
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange
from mlplatform.specs import ModelSpec

Versions = Mapping[tuple[str, str], int]  # by table


def model_rows(clients: Clients, spec: ModelSpec, days: DayRange, versions: Versions | None = None) -> pl.DataFrame:
    """The model's rows whose T lies on `days`, labels null where the outcome is not known yet. `versions`: of tables to be read as they
    were then."""
    tables = {}
    for source, extra in spec.inputs.items():
        around = DayRange((days.first - _whole_days(extra)), days.last + _whole_days(extra))
        key = ("validated", source)
        tables[source] = clients.lake.read(key, around if _partitioned(clients, key) else None, (versions or {}).get(key))
    rows = spec.rows(tables)
    return rows.filter(pl.col("event_timestamp").dt.date().is_between(days.first, days.last))


def with_features(clients: Clients, spec: ModelSpec, rows: pl.DataFrame, versions: Versions | None = None) -> pl.DataFrame:
    """The rows' features through Feast, point-in-time, one row out for each row in and in the same order. `versions`: as for
    `model_rows`; each must be of a table that the model's features come from."""
    store = clients.feature_store
    names = ["event_timestamp", *spec.row_key, *(f.name for f in spec.request_fields)]
    entities = rows.select(*dict.fromkeys(names)).to_pandas()
    with pinned({clients.lake.uri(key): version for key, version in (versions or {}).items()}):
        job = store.get_historical_features(entity_df=entities, features=store.get_feature_service(spec.feature_service))
        joined = pl.from_arrow(job.to_arrow())
    assert isinstance(joined, pl.DataFrame)
    return joined.with_columns(pl.col("event_timestamp").cast(pl.Datetime("us", "UTC")))


def _whole_days(span: timedelta) -> timedelta:
    return timedelta(days=-(-span // timedelta(days=1)))


def _partitioned(clients: Clients, key: tuple[str, str]) -> bool:
    return bool(clients.lake.table(key).metadata().partition_columns)
