"""What `mlplatform bench join` lets run against each other: the same three views, asked by four engines.

Belongs here: the made-up lake and the engines. Does not belong here: rounds, timing, the table (`bench_join.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

START = datetime(2013, 1, 1, tzinfo=UTC)
SPAN = timedelta(days=30)
TTL = timedelta(days=3)
FEATURES = 10
CORRECTED_SHARE = 0.02
CUSTOMERS, MERCHANTS, PAIRS = 20_000, 2_000, 50_000
BARE, STORE, CORRECTED = "bare Polars join_asof", "this store", "this store, corrections"
DUCKDB, DASK = "Feast duckdb", "Feast dask"
OURS = "mlplatform.feature_store.offline.DeltaOfflineStore"
_TIME = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class BenchView:
    """One view: its join keys, and the rows of its table before corrections, as a share of the largest."""

    name: str
    keys: tuple[str, ...]
    share: float

    @property
    def features(self) -> list[str]:
        return [f"{self.name}_{i}" for i in range(FEATURES)]


VIEWS = (
    BenchView("customer", ("customer",), 0.61),
    BenchView("merchant", ("merchant",), 0.8),
    BenchView("pair", ("customer", "merchant"), 1.0),
)
REFS = [f"{view.name}:{feature}" for view in VIEWS for feature in view.features]


def _pairs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, CUSTOMERS, PAIRS), rng.integers(0, MERCHANTS, PAIRS)


def _moments(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.datetime64(START.replace(tzinfo=None), "us") + rng.integers(0, SPAN // timedelta(microseconds=1), n).astype("timedelta64[us]")


def _entities(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Customers as numbers, merchants as texts, together as pairs that do occur."""
    customers, merchants = _pairs(np.random.default_rng(0))
    chosen = rng.integers(0, PAIRS, n)
    names = pl.Series([f"m{i:05d}" for i in range(MERCHANTS)])
    return {"customer": customers[chosen], "merchant": names.gather(merchants[chosen])}


def write_lake(lake: Path, rows: int) -> dict[str, int]:
    """The three tables, partitioned by day as the platform's are; 2 % of their rows are corrected up to 12 hours later.

    Returns the rows of each. The largest has about `rows`.
    """
    written = {}
    for number, view in enumerate(VIEWS):
        rng = np.random.default_rng(number + 1)
        n = round(rows * view.share / (1 + CORRECTED_SHARE))
        keys = {name: values for name, values in _entities(rng, n).items() if name in view.keys}
        known = pl.Series(_moments(rng, n)).cast(_TIME)
        table = pl.DataFrame(keys).with_columns(known.alias("event_timestamp"), known.alias("created"))
        late = pl.Series(rng.integers(1, 12 * 3600, round(n * CORRECTED_SHARE))) * timedelta(seconds=1)
        corrections = table[rng.choice(n, len(late), replace=False)].with_columns(pl.col("created") + late)
        table = pl.concat([table, corrections])
        values = {feature: rng.normal(size=table.height) for feature in view.features}
        table = table.with_columns(pl.col("event_timestamp").dt.date().alias("event_date"), **{f: pl.Series(v) for f, v in values.items()})
        write_deltalake(str(lake / view.name), table.to_arrow(compat_level=pl.CompatLevel.oldest()), partition_by=["event_date"])
        written[view.name] = table.height
    return written


def entity_rows(n: int) -> pd.DataFrame:
    """n questions in no order, numbered by `row`."""
    rng = np.random.default_rng(99)
    entities = _entities(rng, n)
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "customer": entities["customer"],
            "merchant": entities["merchant"].to_pandas(),
            "event_timestamp": pd.DatetimeIndex(_moments(rng, n)).tz_localize("UTC"),
        }
    )


def bare_polars(lake: Path, entities: pd.DataFrame) -> pa.Table:
    """What one would write by hand: an as-of join per view. It knows event times only, so that later corrections leak in."""
    asked = pl.from_pandas(entities).with_columns(pl.col("event_timestamp").cast(_TIME)).sort("event_timestamp")
    for view in VIEWS:
        rows = pl.scan_delta(str(lake / view.name)).sort("event_timestamp", "created").select(*view.keys, "event_timestamp", *view.features)
        asked = (
            asked.lazy()
            .join_asof(rows, on="event_timestamp", by=list(view.keys), strategy="backward", tolerance=TTL, check_sortedness=False)
            .collect()
        )
    return asked.sort("row").to_arrow(compat_level=pl.CompatLevel.oldest())


def feast_store(folder: Path, lake: Path, offline: dict[str, Any]) -> Any:
    """A Feast store over the lake with that offline store and its options."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource
    from feast.data_format import DeltaFormat
    from feast.repo_config import RepoConfig
    from feast.types import Float64, Int64, String
    from feast.value_type import ValueType

    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"customer": (ValueType.INT64, Int64), "merchant": (ValueType.STRING, String)}
    entities = {name: Entity(name=name, join_keys=[name], value_type=kind) for name, (kind, _) in kinds.items()}
    views = [
        FeatureView(
            name=view.name,
            entities=[entities[key] for key in view.keys],
            ttl=TTL,
            schema=[Field(name=key, dtype=kinds[key][1]) for key in view.keys] + [Field(name=f, dtype=Float64) for f in view.features],
            source=FileSource(
                name=f"{view.name}_table",
                path=str(lake / view.name),
                file_format=DeltaFormat(),
                timestamp_field="event_timestamp",
                created_timestamp_column="created",
            ),
        )
        for view in VIEWS
    ]
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(folder / "registry.db"),
        offline_store=offline,
        online_store=None,
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    store.apply([*entities.values(), *views])
    return store


def ask(store: Any, entities: pd.DataFrame, as_known_then: bool = True) -> pa.Table:
    """All 30 features through the Feast SDK; `as_known_then` leaves out values created after the question's time."""
    return store.get_historical_features(entities, REFS, filter_by_created_timestamp=as_known_then).to_arrow()


@contextmanager
def duckdb_reads_delta() -> Iterator[None]:
    """Feast's duckdb store over Delta without downloading an extension: tables are handed over as Arrow data sets."""
    import ibis
    from feast.infra.offline_stores import duckdb as stock

    def read(source: Any, _repo_path: str) -> Any:
        backend = ibis.get_backend()
        backend.con.register(source.name, DeltaTable(source.path).to_pyarrow_dataset())
        return backend.table(source.name)

    original = stock._read_data_source
    stock._read_data_source = read
    try:
        yield
    finally:
        stock._read_data_source = original


@dataclass(frozen=True)
class Contender:
    """One engine, ready to answer. By its rule it must answer as `like` does; a `heavy` one is asked once, and for a tenth of the rows."""

    name: str
    answer: Callable[[pd.DataFrame], pa.Table]
    like: str
    heavy: bool = False


def contenders(folder: Path, lake: Path, stock: bool) -> Sequence[Contender]:
    """Ours and bare Polars; with `stock` Feast's own stores over the same tables too."""
    ours = feast_store(folder / "ours", lake, {"type": OURS})
    # The rule of an as-of join that knows event times only, so that the two answers can be compared.
    corrected = feast_store(folder / "corrected", lake, {"type": OURS, "later_corrections": True})
    found = [
        Contender(BARE, lambda rows: bare_polars(lake, rows), like=CORRECTED),
        Contender(STORE, lambda rows: ask(ours, rows), like=STORE),
        Contender(CORRECTED, lambda rows: ask(corrected, rows, as_known_then=False), like=STORE),
    ]
    if stock:
        duckdb, dask = (feast_store(folder / name, lake, {"type": name}) for name in ("duckdb", "dask"))
        found += [
            Contender(DUCKDB, lambda rows: ask(duckdb, rows), like=STORE),
            Contender(DASK, lambda rows: ask(dask, rows), like=STORE, heavy=True),
        ]
    return found
