"""The Feast repository as Feast sees it: applied by its own command, read back, and asked for history."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from feast import FeatureStore, RepoConfig

from feature_definitions.columns import columns
from feature_definitions.environment import feast_environment
from feature_definitions.flights.request_functions import REQUEST_FUNCTIONS
from mlplatform.clients.lake import Lake, with_day
from mlplatform.features.declared import plans
from mlplatform.settings import Profile, Settings

ROOT = Path(__file__).parents[2]
# Feast marks both kinds of view as experimental whenever it builds one, also from its registry.
pytestmark = pytest.mark.filterwarnings("ignore:(Stream|On demand) feature view:RuntimeWarning")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("feast_home")
    return feast_environment(Settings(home=home, lake="", feast_registry=""))


@pytest.fixture(scope="module")
def store(environment: dict[str, str]) -> FeatureStore:
    """A store on the registry that `feast apply` wrote."""
    Path(environment["MLPLATFORM_FEAST_REGISTRY"]).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("feast")), "-c", "feature_definitions", "apply"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return FeatureStore(
        config=RepoConfig(
            project="flights",
            provider="local",
            registry=environment["MLPLATFORM_FEAST_REGISTRY"],
            offline_store={"type": "mlplatform.feature_store.offline.DeltaOfflineStore"},
            online_store={"type": "mlplatform.feature_store.online.RedisOnlineStore"},
            entity_key_serialization_version=3,
        )
    )


def test_feast_registers_every_declared_view_and_the_models_service(store: FeatureStore, environment: dict[str, str]) -> None:
    declared = plans("feature_definitions.flights")
    service = store.get_feature_service("flight_disruption_v1")
    assert {p.name for p in service.feature_view_projections} == {*declared, "flight_request_features"}
    for name, plan in declared.items():
        view = store.registry.get_any_feature_view(name, "flights")
        # A stream feature view comes back from Feast's registry in any order, with its join keys among the features.
        assert {f.name for f in view.features} - set(plan.join_keys) == set(plan.features)
        assert tuple(sorted(c.name for c in view.entity_columns)) == plan.join_keys
        assert view.batch_source.path == f"{environment['MLPLATFORM_LAKE']}/offline/{name}"
        assert view.batch_source.created_timestamp_column == "created"


def test_history_through_feast_equals_the_request_functions_called_directly(store: FeatureStore, environment: dict[str, str]) -> None:
    asked = datetime(2013, 3, 10, 5, tzinfo=UTC)
    stored = pl.DataFrame(
        {"origin": ["JFK", "JFK"], "event_timestamp": [asked - timedelta(hours=1), asked + timedelta(hours=1)], "temp": [40.0, 50.0]},
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC")},
    ).with_columns(pl.col("event_timestamp").alias("created"))
    Lake(environment["MLPLATFORM_LAKE"]).replace(("offline", "origin_weather"), with_day(stored, "event_timestamp"))
    departures = [asked + timedelta(minutes=120 + 37 * k) for k in range(40)]
    questions = pl.DataFrame(
        {
            "row": list(range(40)),
            "origin": ["JFK"] * 39 + ["ZZZ"],
            "event_timestamp": [asked] * 40,
            "scheduled_departure": departures,
            "scheduled_arrival": [d + timedelta(minutes=95) for d in departures],
            "distance_miles": [100.5 + k for k in range(40)],
            "scheduled_load": list(range(40)),
        },
        schema_overrides={n: pl.Datetime("us", "UTC") for n in ("event_timestamp", "scheduled_departure", "scheduled_arrival")},
    )
    outputs = [name for f in REQUEST_FUNCTIONS for name in f.outputs]
    features = ["origin_weather:temp", *(f"flight_request_features:{name}" for name in outputs)]
    got = pl.DataFrame(store.get_historical_features(entity_df=questions.to_pandas(), features=features).to_arrow()).sort("row")
    assert got["temp"].to_list() == [40.0] * 39 + [None]
    given = columns({n: questions[n].to_list() for n in questions.columns[3:]}, times=("scheduled_departure", "scheduled_arrival"))
    for function in REQUEST_FUNCTIONS:
        for name, values in function.function(given).items():
            np.testing.assert_array_equal(got[name].to_numpy(), values, err_msg=name)


def test_the_environment_names_the_kind_of_registry_and_the_lakes_keys() -> None:
    production = Settings(
        profile=Profile.PRODUCTION,
        lake="s3://bucket/lake",
        redis_url="redis://:secret@redis:6379/0",
        mlflow_url="http://mlflow:5000",
        optuna_storage="postgresql://optuna",
        feast_registry="postgresql://registry",
        s3_endpoint_url="http://s3:8333",
        s3_allow_http=True,
    )
    got = feast_environment(production)
    assert (got["FEAST_REGISTRY_TYPE"], got["MLPLATFORM_LAKE"]) == ("sql", "s3://bucket/lake")
    assert (got["AWS_ENDPOINT_URL"], got["AWS_ALLOW_HTTP"]) == ("http://s3:8333", "true")
    assert got["FEAST_ONLINE_URL"] == "redis://:secret@redis:6379/0"


def test_every_variable_of_the_configuration_is_in_the_environment(environment: dict[str, str]) -> None:
    text = (ROOT / "feature_definitions" / "feature_store.yaml").read_text()
    named = {part.split("}")[0] for line in text.splitlines() if not line.startswith("#") for part in line.split("${")[1:]}
    assert named <= set(environment)
