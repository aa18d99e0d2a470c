"""Gradient-boosted trees for a binary question, with XGBoost's native Booster.

Belongs here: its search space, fitting, and UBJ files. Does not belong here: rows, folds, the registry.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

# OpenMP reads this once, when XGBoost loads it, so it must stand before the import. Its default, threads that spin while
# they wait, cost 2.7 times the CPU and 2.6 times the wall time on two cores that other processes used as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import xgboost as xgb
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from xgboost.callback import EarlyStopping, TrainingCallback

from mlplatform.training.trainers.base import BINARY, METRICS, Floats, Matrix, OnRound, Resources, Target, cuda_devices

MODEL_FILE: Final = "model.ubj"
_XGBOOST_METRIC: Final = {"log_loss": "logloss", "auc": "auc"}
_MAX_ROUNDS: Final = 1000
_PATIENCE: Final = 30
# A quarter of the default: a fit takes about half the time, and on the flights the figures did not move beyond noise.
_MAX_BIN: Final = 64


@dataclass(frozen=True)
class FittedBooster:
    """A Booster cut at its best round, so that predicting needs to know no round."""

    booster: xgb.Booster
    params: Mapping[str, Any]
    rounds: int
    score: float | None
    curves: Mapping[str, tuple[float, ...]]
    importances: Mapping[str, float]

    def predict(self, values: Floats) -> Floats:
        """The call the prediction service makes, so both give the same bits."""
        return np.asarray(self.booster.inplace_predict(values, validate_features=False), dtype=np.float64)

    def save(self, folder: Path) -> str:
        self.booster.save_model(folder / MODEL_FILE)
        return MODEL_FILE


class XGBoostClassifier:
    """See `Trainer`. `device` is cpu or cuda[:n]; asking for CUDA where there is none raises RuntimeError."""

    framework: Literal["xgboost", "torch"] = "xgboost"
    default_params: Mapping[str, Any] = {
        "max_depth": 6,
        "eta": 0.08,
        "min_child_weight": 100.0,
        "subsample": 0.8,
        "colsample_bytree": 0.3,
        "lambda": 20.0,
    }

    # Each report is a synchronous write to the study's storage.
    report_every = 10
    warm_up = 60

    def tolerance(self, quantiles: Sequence[float]) -> float:
        return 0.0

    def search_space(self) -> dict[str, BaseDistribution]:
        # Not eta: a smaller step is better given the rounds, and two step sizes cannot be compared at the same round, which
        # is what pruning does.
        return {
            "max_depth": IntDistribution(3, 9),
            "min_child_weight": FloatDistribution(5.0, 400.0, log=True),
            "subsample": FloatDistribution(0.5, 1.0),
            "colsample_bytree": FloatDistribution(0.15, 0.8),
            "lambda": FloatDistribution(1.0, 100.0, log=True),
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
    ) -> FittedBooster:
        """See `Trainer.fit`. Raises ValueError without both validation rows and rounds, or for one class only. One process
        fits, whatever `resources.workers` says: the threads are XGBoost's own."""
        use = resources or Resources()
        _refuse_missing_cuda(use.device)
        if target != BINARY:
            raise ValueError("this family answers a binary question only")
        if validate is None and rounds is None:
            raise ValueError("fitting without validation rows needs the number of rounds")
        target.check(metric, train.label)
        settings = {
            **self.default_params,
            **params,
            "objective": "binary:logistic",
            "eval_metric": _XGBOOST_METRIC[metric],
            "tree_method": "hist",
            "max_bin": _MAX_BIN,
            "device": use.device,
            "nthread": use.threads,
            "seed": seed % 2**31,
        }
        data = _quantiles(train)
        watched = [(data, "train")]
        callbacks: list[TrainingCallback] = []
        if validate is not None:
            watched.append((_quantiles(validate, reference=data), "validate"))
            callbacks.append(EarlyStopping(rounds=_PATIENCE, maximize=METRICS[metric], save_best=False))
        if on_round is not None:
            callbacks.append(_Report(on_round))
        history: dict[str, dict[str, list[float]]] = {}
        booster = xgb.train(
            settings, data, rounds or _MAX_ROUNDS, evals=watched, evals_result=history, verbose_eval=False, callbacks=callbacks
        )
        curves = {f"{part}_{metric}": tuple(values[_XGBOOST_METRIC[metric]]) for part, values in history.items()}
        kept, score = len(curves[f"train_{metric}"]), None
        if validate is not None:
            kept, score = booster.best_iteration + 1, booster.best_score
        return FittedBooster(_cut(booster, kept), settings, kept, score, curves, _gain_shares(booster, train.columns))


class _Report(TrainingCallback):  # type: ignore[misc] # XGBoost has no types mypy reads here
    def __init__(self, on_round: OnRound) -> None:
        super().__init__()
        self._on_round = on_round

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        (values,) = evals_log["validate" if "validate" in evals_log else "train"].values()
        self._on_round(epoch, float(values[-1]))
        return False


def _quantiles(matrix: Matrix, reference: xgb.DMatrix | None = None) -> xgb.QuantileDMatrix:
    # Native splits on sets of categories: on the flights (August 2013) log loss .4814 against .4860 with the positions
    # taken for numbers. An unknown category is encoded as missing, so no code is met that training did not see.
    return xgb.QuantileDMatrix(
        matrix.values,
        label=matrix.label,
        feature_names=list(matrix.columns),
        feature_types=["c" if name in matrix.categorical else "q" for name in matrix.columns],
        enable_categorical=True,
        max_bin=_MAX_BIN,
        ref=reference,
    )


def _cut(booster: xgb.Booster, rounds: int) -> xgb.Booster:
    """The first `rounds` rounds, without early stopping's attributes, which would otherwise differ with the patience."""
    cut = booster[:rounds]
    cut.set_attr(best_iteration=None, best_score=None)
    return cut


def _gain_shares(booster: xgb.Booster, columns: tuple[str, ...]) -> dict[str, float]:
    gains = {name: float(np.sum(gain)) for name, gain in booster.get_score(importance_type="total_gain").items()}
    total = sum(gains.values()) or 1.0
    return {name: gains.get(name, 0.0) / total for name in columns}


def _refuse_missing_cuda(device: str) -> None:
    if not device.startswith("cuda"):
        return
    if not xgb.build_info().get("USE_CUDA"):
        raise RuntimeError("device cuda was asked for, but this XGBoost was built without it: install the extra 'cuda'")
    if not cuda_devices():
        raise RuntimeError("device cuda was asked for, but the driver shows no CUDA device")


TRAINER = XGBoostClassifier()
