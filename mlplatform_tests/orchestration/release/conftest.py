"""What tests of releases share: a model with versions in a real MLflow store, a ledger in Delta, notices in Redis."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xgboost as xgb
from redis import Redis

from mlplatform.clients.registry import NewVersion, Registry
from mlplatform.contracts import (
    EVALUATION_TAG,
    GATES_TAG,
    MODELS_CHANNEL,
    TRAINED_BY_TAG,
    VERIFIED_TAG,
    ContractFeature,
    ContractField,
    ServingContract,
)
from mlplatform.orchestration import resources
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import TrainingManifest
from mlplatform.settings import load_settings
from mlplatform.verified import Identity, seal

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")


@pytest.fixture(scope="session")
def booster() -> bytes:
    values = np.random.default_rng(0).normal(size=(100, 1))
    data = xgb.QuantileDMatrix(values, label=(values[:, 0] > 0).astype(float), feature_names=["x"])
    return bytes(xgb.train({"objective": "binary:logistic", "nthread": 1}, data, 2).save_raw("ubj"))


@pytest.fixture
def clients(environment: pytest.MonkeyPatch, registry: Registry) -> Clients:
    environment.setenv("MLPLATFORM_MLFLOW_URL", registry.tracking_uri)
    load_settings.cache_clear()
    resources._CACHE.clear()
    return PlatformResource().clients


@pytest.fixture
def new_model(registry: Registry, booster: bytes, tmp_path: Path) -> Callable[..., str]:
    """`new_model()`: the name of a model of its own with three versions: 1 and 2 passed their gates, 3 was refused. `fields`: asked for."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "model.ubj").write_bytes(booster)

    def make(fields: tuple[str, ...] = ("x",)) -> str:
        name = f"model_{next(_NUMBERS)}"
        contract = ServingContract(
            model=name,
            task="binary",
            description="Is x positive?",
            framework="xgboost",
            model_file="model.ubj",
            model_sha256=hashlib.sha256(booster).hexdigest(),
            project="test",
            fields=tuple(ContractField(name=field, dtype="float", description=field, example=1.0) for field in fields),
            views=(),
            functions=(),
            features=(ContractFeature(name="x", kind="request", source="x", column="x"),),
            training_set_hash="abc",
        )
        manifest = TrainingManifest(name, "s", 1, 1, ("x",), "abc", {}, "def", {}, {}, 0.5, {})
        for verdict in ("passed", "passed", "refused"):
            version = registry.log_version(NewVersion(contract, manifest, files))
            told = {VERIFIED_TAG: seal("", Identity(name, version.version, contract.digest(), contract.model_sha256), "{}")}
            gates = {TRAINED_BY_TAG: "tom", GATES_TAG: verdict, EVALUATION_TAG: "{}"}
            registry.set_tags(version, gates | (told if verdict == "passed" else {}))
        return name

    return make


@pytest.fixture
def model(new_model: Callable[[], str]) -> str:
    return new_model()


@pytest.fixture
def notices(valkey_url: str) -> Iterator[Callable[[], list[str]]]:
    """Names published on the models' channel so far."""
    with Redis.from_url(valkey_url, decode_responses=True) as redis, redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(MODELS_CHANNEL)
        channel.get_message(timeout=1)

        def heard() -> list[str]:
            found = []
            while (message := channel.get_message(timeout=0.2)) is not None:
                found.append(message["data"])
            return found

        yield heard
