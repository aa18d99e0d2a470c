"""Running the trials of a study: in this process, several at once in processes of their own, or as tasks of Ray.

Belongs here: the fits of a trial, their reports to the pruner, the processes. Does not belong here: which parameters are tried, and how
a study is resumed (`tuning`); Ray itself (`on_ray`).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from mlplatform.training import engines
from mlplatform.training.folds import Fold
from mlplatform.training.trainers.base import Resources, Target, Trainer

if TYPE_CHECKING:
    from mlplatform.training.on_ray import Tasks

_STEPS_PER_FOLD: Final = 100_000  # more than any trainer's rounds: the steps of two folds never meet


@dataclass(frozen=True)
class TrialTask:
    """What every trial of a study does with its parameters."""

    trainer: Trainer
    folds: tuple[Fold, ...]
    seed: int
    metric: str
    target: Target
    resources: Resources

    @property
    def nbytes(self) -> int:
        return sum(fold.train.nbytes + fold.validate.nbytes for fold in self.folds)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; `value` where it is complete, `error` where it failed."""

    state: TrialState
    value: float | None = None
    error: Exception | None = None


class TrialLostError(RuntimeError):
    """A process that ran trials was killed; the study can be gone on with."""


Run = Callable[[Sequence[Trial]], Sequence[Outcome]]


def pruner_of(trainer: Trainer) -> optuna.pruners.BasePruner:
    """It compares a trial with the complete ones, so what runs beside it has no say."""
    return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=trainer.warm_up, interval_steps=trainer.report_every)


@contextmanager
def runner(study: optuna.Study, storage: str, task: TrialTask, workers: int) -> Iterator[Run]:
    """Runs trials that were asked for together; their outcomes come in the same order once all have ended.

    One worker: in this process. Several: in spawned ones, which end with this one. With the engine Ray: each in a task, which needs the
    study's storage. Every way gives the same outcomes: a trial's parameters are drawn before, and the pruner knows ended trials only.
    """
    if task.resources.engine.name == "ray":
        with engines.tasks(task.resources, workers, task.nbytes) as tasks:
            yield _OnRay(tasks, storage, study.study_name, replace(task, resources=engines.here(task.resources)))
        return
    if workers == 1:
        yield lambda trials: [_fit(trial, task) for trial in trials]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (storage, study.study_name, task)) as pool:
        yield lambda trials: _together(pool, trials)


def _together(pool: ProcessPoolExecutor, trials: Sequence[Trial]) -> list[Outcome]:
    # Optuna has no public name for what identifies a trial across processes.
    waiting = [pool.submit(_fit_here, trial._trial_id) for trial in trials]
    try:
        return [future.result() for future in waiting]
    except BrokenProcessPool as broken:
        lost = TrialLostError(f"a process that ran trials was killed ({broken}); run the study again, and it goes on")
        return [Outcome(TrialState.FAIL, error=lost) for _ in trials]


class _OnRay:
    """Ray runs a trial again whose process died: it reports the same rounds once more, which the study has already."""

    def __init__(self, tasks: "Tasks", storage: str, study: str, task: TrialTask) -> None:
        self._tasks, self._storage, self._study, self._task = tasks, storage, study, task
        self._shared: Any = None

    def __call__(self, trials: Sequence[Trial]) -> list[Outcome]:
        if self._shared is None:
            self._shared = self._tasks.share(self._task)
        calls = [(self._storage, self._study, self._shared, trial._trial_id) for trial in trials]
        return [_outcome(result) for result in self._tasks.run(_fit_there, calls)]


def _fit_there(storage: str, study: str, task: TrialTask, trial_id: int) -> Outcome:
    try:
        return _fit(Trial(_opened(storage, study, task), trial_id), task)
    except Exception as error:  # noqa: BLE001 - as of a fit: the machine cannot reach the storage, for one
        return Outcome(TrialState.FAIL, error=error)


def _outcome(result: Outcome | engines.TaskLostError) -> Outcome:
    if isinstance(result, Outcome):
        return result
    return Outcome(TrialState.FAIL, error=TrialLostError(f"{result}; run the study again, and it goes on"))


class _Process:
    """What a process of the pool was told when it began."""

    study: optuna.Study
    task: TrialTask


def _begin(storage: str, study: str, task: TrialTask) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no trial outlives its study's process
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _Process.task = task
    _Process.study = _opened(storage, study, task)


def _opened(storage: str, study: str, task: TrialTask) -> optuna.Study:
    from mlplatform.training.tuning import open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.load_study(study_name=study, storage=open_storage(storage), pruner=pruner_of(task.trainer))


def _fit_here(trial_id: int) -> Outcome:
    return _fit(Trial(_Process.study, trial_id), _Process.task)


def _fit(trial: Trial, task: TrialTask) -> Outcome:
    scores: list[float] = []
    try:
        for number, fold in enumerate(task.folds):
            fitted = task.trainer.fit(
                trial.params,
                fold.train,
                fold.validate,
                seed=task.seed,
                target=task.target,
                metric=task.metric,
                resources=task.resources,
                on_round=_reporter(trial, number * _STEPS_PER_FOLD, task.trainer.report_every),
            )
            if fitted.score is None:
                raise ValueError("a fit with validation rows gave no score")
            scores.append(float(fitted.score))
    except optuna.TrialPruned:
        return Outcome(TrialState.PRUNED)
    except Exception as error:  # noqa: BLE001 - whatever it is, the trial is told as failed and the study's caller gets it
        return Outcome(TrialState.FAIL, error=error)
    return Outcome(TrialState.COMPLETE, float(np.mean(scores)))


def _reporter(trial: Trial, first_step: int, every: int) -> Callable[[int, float], None]:
    def report(round_: int, value: float) -> None:
        if round_ % every == 0:
            trial.report(value, first_step + round_)
            if trial.should_prune():
                raise optuna.TrialPruned

    return report
