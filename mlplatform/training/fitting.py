"""The final fit of a model on its training set, with the chosen parameters.

Belongs here: which rows it takes and what it hands over. Does not belong here: searching, judging or registering.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlplatform.specs import ModelSpec
from mlplatform.training import engines
from mlplatform.training.dataset import Dataset, to_matrix
from mlplatform.training.trainers.base import Fitted, Floats, Matrix, Resources, Target, Trainer


@dataclass(frozen=True)
class TrainedModel:
    """A fitted model and how its inputs are encoded. `curves` and `score` are of the fit that was stopped early."""

    fitted: Fitted
    numeric: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    curves: Mapping[str, tuple[float, ...]]
    score: float

    def matrix(self, dataset: Dataset, *parts: str) -> Matrix:
        return to_matrix(dataset.part(*parts), self.numeric, self.categories)

    def predict(self, dataset: Dataset, *parts: str) -> Floats:
        """The answers for the rows of `parts`, in the order of `dataset.part(*parts)`; shapes as `Fitted.predict` gives them."""
        return self.fitted.predict(self.matrix(dataset, *parts).values)


@dataclass(frozen=True)
class SavedModel:
    """A model file: its name within the folder it lies in, and the SHA-256 of its bytes."""

    folder: Path
    name: str
    sha256: str


def fit(spec: ModelSpec, dataset: Dataset, trainer: Trainer, params: Mapping[str, Any], resources: Resources | None = None) -> TrainedModel:
    """Fits on train with early stopping on validate, then on both with the rounds so found: the newest rows are the most
    like the ones to come (on the flights this halved the calibration error). The test part is never seen.

    The same inputs give the same file, byte for byte, whichever engine runs it. Raises EngineError and TaskLostError of the engine.
    """
    use = resources or Resources()
    metric = default_metric(spec)
    settings: dict[str, Any] = {"seed": spec.seed, "target": target_of(spec), "metric": metric}
    known = dataset.categories()
    train, validate = (to_matrix(dataset.part(part), dataset.numeric, known) for part in ("train", "validate"))
    categories = dataset.categories("train", "validate")
    both = to_matrix(dataset.part("train", "validate"), dataset.numeric, categories)
    with engines.caller(use, 2 * both.nbytes) as call:
        stopped: Fitted = call(trainer.fit, params, train, validate, resources=within(engines.here(use), "stopped"), **settings)
        if stopped.score is None:
            raise ValueError(f"trainer '{spec.trainer}' gave no score for its validation rows")
        final = within(engines.here(use), "final")
        fitted: Fitted = call(trainer.fit, params, both, None, rounds=stopped.rounds, resources=final, **settings)
    return TrainedModel(fitted, dataset.numeric, categories, stopped.curves, stopped.score)


def target_of(spec: ModelSpec) -> Target:
    return Target(spec.quantiles)


def default_metric(spec: ModelSpec) -> str:
    """What the final fit stops on: a proper score, whatever the study was judged by."""
    return "pinball" if spec.quantiles else "log_loss"


def within(resources: Resources, name: str) -> Resources:
    """The same with the folder `name` in its folder, where it has one: two fits must not share what they resume from."""
    return resources if resources.folder is None else replace(resources, folder=resources.folder / name)


def save(fitted: Fitted, folder: Path) -> SavedModel:
    """Writes the model file into `folder` (made where missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    name = fitted.save(folder)
    return SavedModel(folder, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
