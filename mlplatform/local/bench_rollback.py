"""How long a rollback takes to reach callers, under load: from the decision to the first answer of the old version.

Belongs here: the measurement and its report. Does not belong here: starting services (`services`), the rollback itself
(`orchestration.serving_state`).
"""

import http.client
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import SecretStr
from redis import Redis

from mlplatform.clients.registry import Registry
from mlplatform.local import services
from mlplatform.local.bench_serving import server
from mlplatform.local.bench_serving.contenders import service_launch
from mlplatform.local.bench_serving.world import MODEL, World
from mlplatform.local.supervisor import Supervisor, free_port
from mlplatform.orchestration.recording import verify_ledger
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.printing import print_json, table
from mlplatform.settings import Settings

LIMIT_S = 1.0
_SETTLE_S = 0.3  # of load between two moves


@dataclass
class Caller(threading.Thread):
    """One connection that asks without a pause. `got`: when each answer was there, and its version; `lost`: what was no good answer."""

    port: int
    body: bytes
    stop: threading.Event
    got: list[tuple[float, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    # A thread is told apart by what it is.
    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.stop.is_set():
            try:
                connection.request("POST", f"/v1/models/{MODEL}/predict", self.body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                told = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as fault:
                self.lost.append(repr(fault))
                connection.close()
                continue
            versions = {told.get("version"), *(p["model_version"] for p in told.get("predictions", ()))}
            if answer.status != 200 or len(versions) != 1:
                self.lost.append(f"{answer.status} {sorted(map(str, versions))}")
                continue
            self.got.append((time.monotonic(), told["version"]))
        connection.close()


@dataclass(frozen=True)
class Rollback:
    """Seconds from the decision: to the first answer of the old version, to the last of the new one, to the entry in the ledger."""

    first_old_s: float
    last_new_s: float
    recorded_s: float


def run_bench_rollback(rollbacks: int, connections: int, as_json: bool) -> int:
    """Prints the times. Returns 0 where every rollback was answered within the limit and no request was lost."""
    # An alert for every one of them would stand between the figures.
    logging.getLogger("mlplatform.alerts").setLevel(logging.ERROR)
    with _serving() as (clients, port, body, versions):
        stop = threading.Event()
        callers = [Caller(port, body, stop) for _ in range(connections)]
        for caller in callers:
            caller.start()
        started = time.monotonic()
        measured = [_one(clients, callers, *versions) for _ in range(rollbacks)]
        stop.set()
        for caller in callers:
            caller.join()
        seconds = time.monotonic() - started
        holds = verify_ledger(clients, MODEL).holds
    lost = [fault for caller in callers for fault in caller.lost]
    requests = sum(len(caller.got) for caller in callers)
    slowest = max(r.first_old_s for r in measured)
    found = {
        "rollbacks": rollbacks,
        "connections": connections,
        "answers": requests,
        "answers_per_s": round(requests / seconds, 1),
        "lost_or_mixed": len(lost),
        "ledger_holds": holds,
        "limit_s": LIMIT_S,
        **{f"{name}_s": _spread([getattr(r, f"{name}_s") for r in measured]) for name in ("first_old", "last_new", "recorded")},
    }
    if as_json:
        print_json(found | {"faults": lost[:5]})
    else:
        flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
        table("Rollbacks under load", [flat], empty="")
        rows = [
            {"from the decision to": what, **{k: f"{v:.3f} s" for k, v in _spread([getattr(r, name) for r in measured]).items()}}
            for what, name in (
                ("the first answer of the old version", "first_old_s"),
                ("the last answer of the new version", "last_new_s"),
                ("the entry in the ledger", "recorded_s"),
            )
        ]
        table(f"Limit: first answer of the old version within {LIMIT_S:g} s", rows, empty="")
    return 0 if slowest <= LIMIT_S and not lost and holds else 1


def _one(clients: Clients, callers: Sequence[Caller], old: int, new: int) -> Rollback:
    promote(clients, MODEL, new, "bench", by_hand=True)
    while not all(caller.got and caller.got[-1][1] == new for caller in callers):
        time.sleep(0.01)
    time.sleep(_SETTLE_S)
    decided = time.monotonic()
    roll_back(clients, MODEL, "bench", "bench")
    recorded = time.monotonic()
    while not all(caller.got[-1][1] == old for caller in callers):
        time.sleep(0.01)
    time.sleep(_SETTLE_S)
    after = [(at - decided, version) for caller in callers for at, version in list(caller.got) if at >= decided]
    return Rollback(
        min(at for at, version in after if version == old),
        max((at for at, version in after if version == new), default=0.0),
        recorded - decided,
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(float(np.median(values)), 4), "p95": round(float(np.quantile(values, 0.95)), 4), "max": round(max(values), 4)}


@contextmanager
def _serving() -> Iterator[tuple[Clients, int, bytes, tuple[int, int]]]:
    """A platform of its own with two versions of the made-up model, the first of which serves, and the service on a free port."""
    with tempfile.TemporaryDirectory(prefix="mlplatform-bench-") as name, Supervisor(Path(name)) as supervisor:
        folder = Path(name)
        world = World(folder)
        valkey, mlflow = supervisor.start_all([services.valkey(folder), services.mlflow(folder)])
        registry = Registry(mlflow.url, timeout_s=30.0)
        with Redis.from_url(valkey.url) as redis:
            world.write_values(redis)
        clients = Clients(Settings(home=folder, mlflow_url=mlflow.url, redis_url=SecretStr(valkey.url)))
        old, new = world.register(registry, alias=False), world.register(registry, alias=False)
        promote(clients, MODEL, old, "bench")
        settings = {
            "MLPLATFORM_HOME": str(folder),
            "MLPLATFORM_REDIS_URL": valkey.url,
            "MLPLATFORM_MLFLOW_URL": mlflow.url,
            "MLPLATFORM_DEVICE": "cpu",
            "MLPLATFORM_SERVING_MODELS": MODEL,
        }
        port = free_port()
        supervisor.start_all([service_launch(settings, port)])
        [question] = world.questions(1, 4)
        path = f"/v1/models/{MODEL}/predict"
        while not server.answers(port, path, {"inputs": question.inputs}):
            time.sleep(0.1)
        yield clients, port, json.dumps({"inputs": question.inputs}).encode(), (old, new)
