"""What a model family must offer: a search space, a fit with early stopping, and a model file in a native format.

Belongs here: the protocol, the matrix it works on, and finding a trainer by name. Does not belong here: any model library.
A family is one module in this package that defines `TRAINER`; `get("its_module_name")` finds it.
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mlplatform.training.engines import LOCAL, Engine

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Floats = npt.NDArray[np.float64]
# Called after each round with (round, the metric on the validation rows); it may raise to abandon the fit.
OnRound = Callable[[int, float], None]
METRICS = {"log_loss": False, "auc": True, "pinball": False}  # name: whether higher is better


@dataclass(frozen=True)
class Target:
    """What is predicted: the probability that a label of 0 and 1 is 1, or `quantiles` (levels, ascending) of a label that is a number."""

    quantiles: tuple[float, ...] = ()

    @property
    def task(self) -> str:
        return "quantiles" if self.quantiles else "binary"

    def check(self, metric: str, label: Floats) -> None:
        """Raises ValueError for labels that cannot be learned from, or a metric of another kind of target."""
        if (metric == "pinball") != bool(self.quantiles):
            raise ValueError(f"the metric '{metric}' is not one of the target '{self.task}'")
        if len(np.unique(label)) < 2:
            raise ValueError("the training rows have one class only" if not self.quantiles else "the training rows have one label only")


BINARY = Target()


@dataclass(frozen=True)
class Resources:
    """What a fit may use. `workers`: processes that share one fit, where the family can; `threads`: of each. `folder`: where
    a fit may keep what it needs to go on after it was killed; None: it need not be able to. `engine`: where it runs; a trainer
    is called there, and need not know."""

    device: str = "cpu"
    threads: int = 2
    workers: int = 1
    folder: Path | None = None
    engine: Engine = LOCAL


@dataclass(frozen=True)
class Matrix:
    """Model inputs: `values` (n, d) float64 with NaN = missing, `label` (n,) float64, the d column names.

    Columns in `categorical` hold positions in a list of categories; `sizes` says how many each list has, where it is known.
    """

    values: Floats
    label: Floats
    columns: tuple[str, ...]
    categorical: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.label.nbytes)

    def take(self, positions: npt.NDArray[np.intp]) -> "Matrix":
        return Matrix(self.values[positions], self.label[positions], self.columns, self.categorical, self.sizes)


class Fitted(Protocol):
    """A fitted model. It predicts with exactly what `save` writes."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Every parameter it was fitted with, the defaults included."""
        ...

    @property
    def rounds(self) -> int:
        """Rounds (trees, epochs) kept."""
        ...

    @property
    def score(self) -> float | None:
        """The metric on the validation rows at the round kept; None where there were none."""
        ...

    @property
    def curves(self) -> Mapping[str, tuple[float, ...]]:
        """Per name (`train_log_loss`, …) one value per round, the rounds given up by early stopping included."""
        ...

    @property
    def importances(self) -> Mapping[str, float]:
        """Each column's share of what all of them bring, as the family measures it; columns never used have 0."""
        ...

    def predict(self, values: Floats) -> Floats:
        """For inputs (n, d): probabilities, shape (n,), or quantiles, shape (n, levels), never descending within a row."""
        ...

    def save(self, folder: Path) -> str:
        """Writes the model file into `folder` and returns its name."""
        ...


class Trainer(Protocol):
    """A model family."""

    framework: Literal["xgboost", "torch"]
    default_params: Mapping[str, Any]  # a sound starting point; the first trial of every study
    report_every: int  # rounds from one report of a study's trial to the next
    warm_up: int  # rounds before a trial may be pruned

    def tolerance(self, quantiles: Sequence[float]) -> float:
        """How far, in units of the answer, the same file may answer otherwise in another batch or on another processor; 0: not at all."""
        ...

    def search_space(self) -> "Mapping[str, BaseDistribution]":
        """What a study searches; its keys are keys of `default_params`."""
        ...

    def fit(
        self,
        params: Mapping[str, Any],
        train: Matrix,
        validate: Matrix | None,
        *,
        seed: int,
        target: Target = BINARY,
        metric: str = "log_loss",
        rounds: int | None = None,
        resources: Resources | None = None,
        on_round: OnRound | None = None,
    ) -> Fitted:
        """Fits on `train`. With `validate`, stops early on its `metric`; without, `rounds` says when to stop.

        The same inputs, parameters, seed and resources give the same model file, byte for byte. Raises ValueError for a target
        the family cannot answer.
        """
        ...


def get(name: str) -> Trainer:
    """The trainer of a family by its module's name. Raises LookupError naming the module that was looked for."""
    path = f"{__package__}.{name}"
    if importlib.util.find_spec(path) is None:
        raise LookupError(f"no trainer '{name}': there is no module {path}")
    trainer: Trainer = importlib.import_module(path).TRAINER
    return trainer


def cuda_devices() -> int:
    """How many CUDA devices the driver sees; 0 without a driver. Needs no CUDA library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
