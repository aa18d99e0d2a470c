"""Who is measured: our service and its peers, each with how it is started, asked and read.

Belongs here: one entry per contender. Does not belong here: their applications (`apps`), starting processes (`server`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlplatform.local import services
from mlplatform.local.bench_serving.world import MODEL, Question, World
from mlplatform.local.supervisor import Launch

OURS = "ours"


@dataclass(frozen=True)
class Site:
    """What a contender finds: the model and where its values and files are."""

    folder: Path
    world: World
    redis_url: str
    mlflow_url: str


@dataclass(frozen=True)
class Contender:
    """One service. `ask` makes the body of a request (None: it is asked by GET, has no model), `read` gives the predictions of an answer.

    `launch(site, port, workers)` says how it starts.
    """

    name: str
    title: str
    launch: Callable[[Site, int, int], Launch]
    path: str
    ask: Callable[[Question], Mapping[str, Any]] | None = None
    read: Callable[[Any], list[float]] | None = None


def _ours(site: Site, port: int, workers: int) -> Launch:
    settings = {
        "MLPLATFORM_HOME": str(site.folder),
        "MLPLATFORM_REDIS_URL": site.redis_url,
        "MLPLATFORM_MLFLOW_URL": site.mlflow_url,
        "MLPLATFORM_CLOCK": "system",
        "MLPLATFORM_DEVICE": "cpu",
    }
    launch = services.prediction_service(settings, port)
    # As deploy/serving.Dockerfile starts it.
    command = [*launch.command, "--no-access-log", "--workers", str(workers)]
    return Launch(OURS, command, launch.ready, launch.url, port, launch.environment)


CONTENDERS = {
    c.name: c
    for c in (
        Contender(
            name=OURS,
            title="this service",
            launch=_ours,
            path=f"/v1/models/{MODEL}/predict",
            ask=lambda question: {"inputs": question.inputs},
            read=lambda answer: [row["prediction"] for row in answer["predictions"]],
        ),
    )
}
