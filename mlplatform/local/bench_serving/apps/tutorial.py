"""The peer most tutorials build: FastAPI, Feast's SDK over its own Redis store, MLflow's pyfunc.

Belongs here: the feature repository with its values, and the application (`uvicorn --factory`). Does not belong here: anything to
make it faster: it stands for what people have.
"""

import contextlib
import io
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel

from mlplatform.contracts import PRODUCTION
from mlplatform.local.bench_serving.world import COLUMNS, MODEL, VIEWS, World

REPOSITORY = "MLPLATFORM_BENCH_FEAST_REPOSITORY"  # of the application's process: the folder `write_repository` made


def write_repository(folder: Path, redis_url: str, world: World) -> None:
    """A Feast repository as its quickstart has it, the world's values written to database 1 of the Redis by Feast itself."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    folder.mkdir()
    address = redis_url.removeprefix("redis://").partition("/")[0]
    settings = {
        "project": "bench",
        "provider": "local",
        "registry": str(folder / "registry.db"),
        "offline_store": {"type": "file"},
        "online_store": {"type": "redis", "connection_string": f"{address},db=1"},
        "entity_key_serialization_version": 3,
    }
    # JSON is YAML.
    (folder / "feature_store.yaml").write_text(json.dumps(settings))
    moment = datetime.now(UTC)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        store = FeatureStore(repo_path=str(folder))
        frames = {}
        for (view, (key, columns)), values in zip(VIEWS.items(), world.values, strict=True):
            frame = pd.DataFrame(values, columns=list(columns))
            frame[key], frame["event_timestamp"] = range(len(frame)), moment
            frame.to_parquet(folder / f"{view}.parquet")
            entity = Entity(name=key, join_keys=[key], value_type=ValueType.INT64)
            source = FileSource(path=str(folder / f"{view}.parquet"), timestamp_field="event_timestamp")
            schema = [Field(name=column, dtype=Float64) for column in columns]
            store.apply([entity, FeatureView(name=view, entities=[entity], ttl=timedelta(days=30), schema=schema, source=source)])
            frames[view] = frame
        for view, frame in frames.items():
            store.write_to_online_store(view, frame)


class Row(BaseModel):
    user_id: int
    merchant_id: int
    device_id: int


class Answer(BaseModel):
    predictions: list[float]


def create_app() -> FastAPI:
    """Where the repository and MLflow are stands in the environment."""
    import mlflow
    from feast import FeatureStore

    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@{PRODUCTION}")
    store = FeatureStore(repo_path=os.environ[REPOSITORY])
    references = [f"{view}:{column}" for view, (_, columns) in VIEWS.items() for column in columns]
    app = FastAPI()

    @app.post("/predict")
    def predict(row: Row) -> Answer:
        found = store.get_online_features(features=references, entity_rows=[row.model_dump()]).to_dict()
        rows = pd.DataFrame({column: found[column] for column in COLUMNS})
        return Answer(predictions=[float(p) for p in model.predict(rows)])

    return app
