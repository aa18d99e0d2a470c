"""A local platform's own model, with all its views and the requests it was asked, instead of the made-up one.

Belongs here: reading a home and copying what a service needs of it, so that nothing in the home changes. Does not belong here:
the made-up model (`world`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from redis import Redis

from mlplatform.clients.lake import Lake
from mlplatform.clients.registry import Registry
from mlplatform.clock import SimulatedClock
from mlplatform.contracts import PRODUCTION, ServingContract
from mlplatform.local.bench_serving.world import Question

Predict = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float32]]


class NothingToServeError(LookupError):
    """The home lacks the model, or was never asked; says how to get there."""


class HomeWorld:
    """`questions` draws from the requests the home's prediction table holds. The clock stands still at the home's time."""

    def __init__(self, folder: Path, home: Path, model: str) -> None:
        lake = Lake(str(home / "lake"))
        if not (home / "clock.json").exists() or not lake.exists(("predictions", model)):
            raise NothingToServeError(
                f"the model '{model}' was never asked on a platform under {home}; `mlplatform demo --home {home}` makes one"
            )
        rows = lake.scan(("predictions", model)).select("inputs").collect().get_column("inputs").to_list()
        self.model = model
        self._asked: list[Mapping[str, Any]] = [json.loads(row) for row in rows]
        for name in ("valkey", "mlflow"):
            shutil.copytree(home / name, folder / name)
        clock = SimulatedClock(folder / "clock.json")
        clock.set(SimulatedClock(home / "clock.json").now())
        self.clock = str(clock.path)
        self.model_file = folder / "model"
        self.tolerance = 0.0
        self._rng = np.random.default_rng(7)

    def prepare(self, _: Redis, registry: Registry) -> None:
        """Values and versions are there already: fetches the model file. Raises NothingToServeError where no version serves."""
        version = registry.by_alias(self.model, PRODUCTION)
        if version is None:
            raise NothingToServeError(f"no version of '{self.model}' carries the alias '{PRODUCTION}'")
        folder = registry.download(version, self.model_file.parent / "downloaded")
        contract = registry.contract_of(version)
        self.tolerance = contract.tolerance
        raw = (folder / contract.model_file).read_bytes()
        self.model_file.write_bytes(raw)
        self._predict = _network(raw, contract) if contract.framework == "torch" else _booster(raw)

    def questions(self, count: int, rows: int) -> list[Question]:
        drawn = self._rng.integers(0, len(self._asked), (count, rows))
        return [Question([self._asked[place] for place in places]) for places in drawn]

    def predict(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """float64 features are rounded to float32, as everywhere."""
        return self._predict(rows)


def _booster(raw: bytes) -> Predict:
    import xgboost

    booster = xgboost.Booster(model_file=bytearray(raw))

    def predict(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        answers: npt.NDArray[np.float32] = booster.predict(xgboost.DMatrix(rows, feature_names=booster.feature_names))
        return answers

    return predict


def _network(raw: bytes, contract: ServingContract) -> Predict:
    from mlplatform import networks

    network = networks.from_bytes(raw)

    def predict(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        answers = networks.predict(network, rows)
        return answers[:, contract.median] if contract.quantiles else answers

    return predict
