"""Neural networks with embedded categories, for a binary question or for quantiles, trained with DistributedDataParallel.

Belongs here: the search space, what a fit is made of, and what it gives. Does not belong here: the network (`mlplatform.networks`), the
training loop and its processes (`training.ddp`), rows, the registry. torch is imported only once a fit is asked for.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mlplatform.training.trainers.base import BINARY, Floats, Matrix, OnRound, Resources, Target, cuda_devices

if TYPE_CHECKING:
    from mlplatform.networks import TabularNetwork

MODEL_FILE: Final = "model.safetensors"
EXPORT_FILE: Final = "model.pt2"
_EPOCHS: Final = 6
_PATIENCE: Final = 3
_BATCH: Final = 1024
_STEPS: Final = 32  # at least, in an epoch: fewer rows make smaller batches
# Of each rank. These networks are small: two threads wait for each other at every layer, for far longer than they save where other
# processes want the same cores. More cores are for more ranks.
_THREADS: Final = 1
_IMPORTANCE_ROWS: Final = 2000


@dataclass(frozen=True)
class FittedNetwork:
    """The weights of the best epoch."""

    network: "TabularNetwork"
    params: Mapping[str, Any]
    rounds: int
    score: float | None
    curves: Mapping[str, tuple[float, ...]]
    importances: Mapping[str, float]

    def predict(self, values: Floats) -> Floats:
        """The call the prediction service makes."""
        from mlplatform.networks import predict, with_threads

        with with_threads(_THREADS):
            return predict(self.network, values).astype(np.float64)

    def save(self, folder: Path) -> str:
        """Writes the weights as safetensors, which is the model file, and beside it the same network as `torch.export`'s pt2."""
        from mlplatform.networks import to_bytes
        from mlplatform.training.ddp.export import export

        (folder / MODEL_FILE).write_bytes(to_bytes(self.network))
        export(self.network, folder / EXPORT_FILE)
        return MODEL_FILE


class TorchTabular:
    """See `Trainer`. `resources.workers` processes share a fit; the same world size and seed give the same file."""

    framework: Literal["xgboost", "torch"] = "torch"
    default_params: Mapping[str, Any] = {
        "width": 128,
        "depth": 2,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
    }

    report_every = 1
    warm_up = 2

    def tolerance(self, quantiles: Sequence[float]) -> float:
        # float32 sums come out otherwise with the batch's size and the processor: some units in the seventh digit of the largest
        # label, or of a probability.
        return 1e-2 if quantiles else 1e-5

    def search_space(self) -> dict[str, BaseDistribution]:
        return {
            "width": CategoricalDistribution((64, 128, 256)),
            "depth": IntDistribution(1, 3),
            "dropout": FloatDistribution(0.0, 0.4),
            "learning_rate": FloatDistribution(3e-4, 3e-3, log=True),
            "weight_decay": FloatDistribution(1e-3, 1e-1, log=True),
        }

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
    ) -> FittedNetwork:
        """See `Trainer.fit`. Raises ValueError without both validation rows and rounds, for labels that are all the same, and for
        categories of unknown size."""
        use = resources or Resources()
        if use.device.startswith("cuda") and not cuda_devices():
            raise RuntimeError("device cuda was asked for, but the driver shows no CUDA device")
        if validate is None and rounds is None:
            raise ValueError("fitting without validation rows needs the number of rounds")
        target.check(metric, train.label)
        if use.folder is not None:
            return self._fit(use.folder, params, train, validate, seed, target, metric, rounds, use, on_round)
        with tempfile.TemporaryDirectory(prefix="fit-") as folder:
            return self._fit(Path(folder) / "job", params, train, validate, seed, target, metric, rounds, use, on_round)

    def _fit(
        self,
        folder: Path,
        params: Mapping[str, Any],
        train: Matrix,
        validate: Matrix | None,
        seed: int,
        target: Target,
        metric: str,
        rounds: int | None,
        use: Resources,
        on_round: OnRound | None,
    ) -> FittedNetwork:
        from mlplatform.networks import with_threads, with_weights
        from mlplatform.training.ddp.job import Job
        from mlplatform.training.ddp.launch import run

        chosen = {**self.default_params, **params}
        architecture = _architecture(chosen, train, target)
        job = Job(
            architecture=architecture.to_json(),
            seed=seed % 2**31,
            metric=metric,
            epochs=_EPOCHS,
            last=min(rounds or _EPOCHS, _EPOCHS),
            patience=_PATIENCE,
            batch=_batch(train.rows),
            learning_rate=float(chosen["learning_rate"]),
            weight_decay=float(chosen["weight_decay"]),
            device=use.device,
            threads=_THREADS,
            asks=on_round is not None and validate is not None,
        )
        progress, weights = run(folder, job, _arrays(train, validate), use.workers, on_round if validate is not None else None)
        network = with_weights(architecture, weights)
        told = {**chosen, "batch": job.batch, "epochs": _EPOCHS, "seed": job.seed, "workers": max(progress.worlds), "device": use.device}
        curves = {name: tuple(values) for name, values in progress.curves.items()}
        with with_threads(_THREADS):
            importances = _importances(network, validate or train, target, seed)
        return FittedNetwork(network, told, progress.best_epoch + 1, progress.best_score, curves, importances)


def _batch(rows: int) -> int:
    return max(16, min(_BATCH, rows // _STEPS))


def _architecture(params: Mapping[str, Any], train: Matrix, target: Target) -> Any:
    from mlplatform.networks import Architecture

    categories = [name for name in train.columns if name in train.categorical]
    if train.columns[len(train.columns) - len(categories) :] != tuple(categories) or set(categories) - set(train.sizes):
        raise ValueError("categorical columns must come last, and say how many categories they have")
    centre, scale = 0.0, 1.0
    if target.quantiles:
        centre, scale = float(np.median(train.label)), float(train.label.std()) or 1.0
    return Architecture(
        numeric=len(train.columns) - len(categories),
        categories=tuple(train.sizes[name] for name in categories),
        quantiles=target.quantiles,
        width=int(params["width"]),
        depth=int(params["depth"]),
        dropout=float(params["dropout"]),
        label_centre=centre,
        label_scale=scale,
    )


def _arrays(train: Matrix, validate: Matrix | None) -> dict[str, np.ndarray[Any, Any]]:
    """Rows and labels as float32, and how the training rows' numbers are standardised."""
    numeric = train.values[:, : len(train.columns) - len(train.categorical)]
    present = ~np.isnan(numeric)
    count = np.maximum(present.sum(axis=0), 1)
    mean = np.where(present, numeric, 0).sum(axis=0) / count
    scale = np.sqrt((np.where(present, numeric - mean, 0) ** 2).sum(axis=0) / count)
    arrays = {"values": train.values, "label": train.label, "mean": mean, "scale": np.where(scale > 0, scale, 1.0)}
    if validate is not None:
        arrays |= {"validate_values": validate.values, "validate_label": validate.label}
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


def _importances(network: "TabularNetwork", matrix: Matrix, target: Target, seed: int) -> dict[str, float]:
    """Each column's share of what the loss grows by when the column alone is shuffled among rows (L. Breiman, "Random Forests",
    Machine Learning 45, 2001, section 10)."""
    from mlplatform.networks import predict
    from mlplatform.training.ddp.losses import measure

    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = np.sort(rng.permutation(matrix.rows)[:_IMPORTANCE_ROWS])
    rows, label = matrix.values[chosen], matrix.label[chosen]
    metric = "pinball" if target.quantiles else "log_loss"

    def loss(values: Floats) -> float:
        return measure(metric, predict(network, values).astype(np.float64), label, target.quantiles)

    base, grown = loss(rows), {}
    for place, name in enumerate(matrix.columns):
        shuffled = rows.copy()
        shuffled[:, place] = rng.permutation(shuffled[:, place])
        grown[name] = max(0.0, loss(shuffled) - base)
    total = sum(grown.values()) or 1.0
    return {name: value / total for name, value in grown.items()}


TRAINER = TorchTabular()
