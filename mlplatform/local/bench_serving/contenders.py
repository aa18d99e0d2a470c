"""Who is measured: our service and its peers, each with how it is started, asked and read.

Belongs here: one entry per contender. Does not belong here: their applications (`apps`), starting processes (`server`).

Peers run with their defaults, on one core, MLServer with one setting that helps it (its micro-batches). "Features given": they stand in
the request, and nothing is looked up.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlplatform.local import services
from mlplatform.local.bench_serving.peer_environment import peer_environment
from mlplatform.local.bench_serving.world import COLUMNS, MODEL, Question, Subject, World
from mlplatform.local.supervisor import Launch, free_port

OURS, MLSERVER, TUTORIAL, FASTAPI, UVICORN, MLFLOW = "ours", "mlserver", "tutorial", "fastapi-hello", "uvicorn-hello", "mlflow-serve"
DEFAULT_PEERS = (MLSERVER, TUTORIAL, FASTAPI, UVICORN)
WITHOUT_MODEL = (FASTAPI, UVICORN)

_APPS = "mlplatform.local.bench_serving.apps"
_MLSERVER_PACKAGES = ("mlserver==1.7.1", "mlserver-xgboost==1.7.1", "xgboost==3.2.0")
_BATCH, _BATCH_WAIT_S = 64, 0.001


@dataclass(frozen=True)
class Site:
    """What a contender finds: the model, where its values and files are, and a `cache` that outlives the run."""

    folder: Path
    cache: Path
    subject: Subject
    redis_url: str
    mlflow_url: str
    log_url: str = ""  # of the prediction log's Redis, where that is not the online store's


@dataclass(frozen=True)
class Contender:
    """One service.

    `launch(site, port)` says how it starts, `path` where it is asked (it may name the `{model}`). `ask` makes the body of a
    request; without it, it is asked by GET and has no model. `read` gives the predictions of an answer. `cases`: the loads it is put
    under; of the others it would need minutes. `keeps_log`: a prediction log, to be emptied between loads.
    """

    name: str
    title: str
    launch: Callable[[Site, int], Launch]
    path: str
    cases: frozenset[str]
    ask: Callable[[Question], Mapping[str, Any]] | None = None
    read: Callable[[Any], Sequence[float]] | None = None
    keeps_log: bool = False


def service_launch(settings: Mapping[str, str], port: int) -> Launch:
    """Our service as deploy/serving.Dockerfile starts it."""
    # One that ends under load is a finding, so nobody starts it again.
    return replace(services.prediction_service(settings, port), name=OURS, restart=False)


def _ours(site: Site, port: int) -> Launch:
    settings = {
        "MLPLATFORM_HOME": str(site.folder),
        "MLPLATFORM_REDIS_URL": site.log_url or site.redis_url,
        "MLPLATFORM_ONLINE_URL": site.redis_url,
        "MLPLATFORM_MLFLOW_URL": site.mlflow_url,
        "MLPLATFORM_CLOCK": site.subject.clock,
        "MLPLATFORM_DEVICE": "cpu",
    }
    return service_launch(settings, port)


def _mlserver(site: Site, port: int) -> Launch:
    programs = peer_environment(site.cache, MLSERVER, _MLSERVER_PACKAGES)
    folder = site.folder / MLSERVER
    folder.mkdir(exist_ok=True)
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    # Its worker processes are for several models and cores; with one of each they would be a hop more.
    server = {"host": services.HOST, "debug": False, "parallel_workers": 0, **ports}
    (folder / "settings.json").write_text(json.dumps(server))
    model = {"name": MODEL, "implementation": "mlserver_xgboost.XGBoostModel", "parameters": {"uri": str(site.subject.model_file)}}
    (folder / "model-settings.json").write_text(json.dumps(model | {"max_batch_size": _BATCH, "max_batch_time": _BATCH_WAIT_S}))
    return _peer(MLSERVER, [str(programs / "mlserver"), "start", str(folder)], port, {"PATH": _first_in_path(programs)})


def _tutorial(site: Site, port: int) -> Launch:
    from mlplatform.local.bench_serving.apps import tutorial

    repository = site.folder / TUTORIAL
    assert isinstance(site.subject, World), "only the made-up model's values are handed to peers"
    tutorial.write_repository(repository, site.redis_url, site.subject)
    environment = {tutorial.REPOSITORY: str(repository), "MLFLOW_TRACKING_URI": site.mlflow_url}
    return _uvicorn(TUTORIAL, f"{_APPS}.tutorial:create_app", port, environment)


def _mlflow(site: Site, port: int) -> Launch:
    options = ["-m", f"models:/{MODEL}@production", "-p", str(port), "-h", services.HOST, "--env-manager", "local", "-w", "1"]
    environment = {"MLFLOW_TRACKING_URI": site.mlflow_url, "PATH": _first_in_path(Path(sys.executable).parent)}
    return _peer(MLFLOW, [sys.executable, "-m", "mlflow", "models", "serve", *options], port, environment)


def _uvicorn(name: str, factory: str, port: int, environment: Mapping[str, str] | None = None) -> Launch:
    options = ["--host", services.HOST, "--port", str(port), "--workers", "1", "--no-access-log", "--log-level", "warning"]
    return _peer(name, [sys.executable, "-m", "uvicorn", "--factory", factory, *options], port, environment or {})


def _peer(name: str, command: Sequence[str], port: int, environment: Mapping[str, str]) -> Launch:
    # One core: more threads than that would only get in each other's way.
    quiet = services.QUIET | {"OMP_NUM_THREADS": "1"}
    return Launch(name, command, lambda _: True, f"http://{services.HOST}:{port}", port, quiet | dict(environment))


def _first_in_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def _decimal(features: npt.NDArray[np.float32] | None) -> list[list[float]]:
    """The shortest decimals that are these float32: what a client of a 32-bit tensor would send."""
    assert features is not None, "only the made-up model's features are known beforehand"
    return [[float(str(value)) for value in row] for row in features]


def _tensor(question: Question) -> dict[str, Any]:
    rows = _decimal(question.features)
    data = [value for row in rows for value in row]
    return {"inputs": [{"name": "x", "shape": [len(rows), len(COLUMNS)], "datatype": "FP32", "data": data}]}


_ALL = frozenset({"1x1", "1x16", "1x64", "100x64", "open"})

CONTENDERS = {
    c.name: c
    for c in (
        Contender(
            name=OURS,
            title="this service",
            launch=_ours,
            path="/v1/models/{model}/predict",
            cases=_ALL,
            ask=lambda question: {"inputs": question.inputs},
            read=lambda answer: [row["prediction"] for row in answer["predictions"]],
            keeps_log=True,
        ),
        Contender(
            name=MLSERVER,
            title="MLServer, features given",
            launch=_mlserver,
            path="/v2/models/{model}/infer",
            cases=_ALL,
            ask=_tensor,
            read=lambda answer: list(answer["outputs"][0]["data"]),
        ),
        Contender(
            name=TUTORIAL,
            title="FastAPI + Feast SDK + pyfunc",
            launch=_tutorial,
            path="/predict",
            cases=frozenset({"1x1", "1x64"}),
            ask=lambda question: question.inputs[0],
            read=lambda answer: list(answer["predictions"]),
        ),
        Contender(
            name=MLFLOW,
            title="mlflow models serve, features given",
            launch=_mlflow,
            path="/invocations",
            cases=frozenset({"1x1", "1x64"}),
            ask=lambda question: {"dataframe_split": {"columns": COLUMNS, "data": _decimal(question.features)}},
            read=lambda answer: list(answer["predictions"]),
        ),
        Contender(
            name=FASTAPI,
            title="FastAPI saying hello",
            launch=lambda _, port: _uvicorn(FASTAPI, f"{_APPS}.hello:fastapi", port),
            path="/hello",
            cases=frozenset({"1x64"}),
        ),
        Contender(
            name=UVICORN,
            title="uvicorn saying hello",
            launch=lambda _, port: _uvicorn(UVICORN, f"{_APPS}.hello:asgi", port),
            path="/hello",
            cases=frozenset({"1x64"}),
        ),
    )
}
