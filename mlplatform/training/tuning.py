"""The search for parameters: a resumable Optuna study over time-ordered folds.

Belongs here: the study's name, storage, sampling, pruning and resumption. Does not belong here: a model library (a trainer
brings its own search space) or the final fit.

A study is named after what it searches (model, training set, folds, space), so a run that was killed goes on where it
stopped, and a changed training set starts a new one. The sampler is seeded anew for each trial from the number of trials
finished before it: a trial lost to a kill is drawn again with the same parameters, and the study ends as it would have.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState

from mlplatform.records import TrialResult, TuningResult
from mlplatform.specs import ModelSpec
from mlplatform.training import folds
from mlplatform.training.dataset import Dataset
from mlplatform.training.fitting import target_of
from mlplatform.training.trainers.base import METRICS, Resources, Trainer
from mlplatform.training.trials import TrialTask, pruner_of, runner

_FINISHED: Final = (TrialState.COMPLETE, TrialState.PRUNED)
_OWNER: Final = "mlplatform.owner"
# Below this many complete trials an importance is an accident.
_TRIALS_FOR_IMPORTANCES: Final = 4

# (the trial just finished, trials finished so far, trials wanted)
OnTrial = Callable[[TrialResult, int, int], None]


def tune(
    spec: ModelSpec,
    dataset: Dataset,
    trainer: Trainer,
    *,
    storage: str,
    training_set_hash: str,
    resources: Resources | None = None,
    workers: int = 1,
    on_trial: OnTrial | None = None,
) -> TuningResult:
    """Searches until `spec.tuning.trials` trials are complete or pruned, earlier ones of the same study counted in.

    `storage` is a journal file or a database URL. A trial's value is its folds' mean of `spec.tuning.metric` at the best round.
    `workers` trials run at once, in processes of their own; they are drawn together, and the next ones when all have ended, so that
    the same seed and number of workers give the same study whichever ends first. `timeout_s` ends the search between trials once
    one is complete. A trial that raises is recorded as failed and its error goes on to the caller. Raises ValueError for a metric
    no trainer measures.
    """
    metric = spec.tuning.metric
    if metric not in METRICS:
        raise ValueError(f"model {spec.name}: tuning metric '{metric}' is none of {sorted(METRICS)}")
    # Optuna would print a line per study and trial; progress is the caller's to show (`on_trial`).
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts = folds.build(spec, dataset)
    name = study_name(spec, trainer, training_set_hash)
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(storage),
        direction="maximize" if METRICS[metric] else "minimize",
        load_if_exists=True,
        pruner=pruner_of(trainer),
    )
    _fail_stale_trials(study)
    owner = _owner()
    wanted = spec.tuning.trials
    deadline = None if spec.tuning.timeout_s is None else time.monotonic() + spec.tuning.timeout_s
    # Every trial begins at the beginning: one that is drawn again reports all its rounds, so that it is pruned as it would have been.
    task = TrialTask(trainer, tuple(parts), spec.seed, metric, target_of(spec), replace(resources or Resources(), folder=None))
    with runner(study, storage, task, workers) as run:
        while (done := len(_finished(study))) < wanted:
            if deadline is not None and time.monotonic() > deadline and study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                break
            trials = [_ask(study, spec, trainer, done + ahead, wanted) for ahead in range(min(workers, wanted - done))]
            for trial in trials:
                trial.set_user_attr(_OWNER, owner)
            for place, (trial, outcome) in enumerate(zip(trials, run(trials), strict=True)):
                study.tell(trial, outcome.value, outcome.state)
                if on_trial is not None and outcome.error is None:
                    on_trial(_result(study.trials[trial.number]), done + place + 1, wanted)
                if outcome.error is not None:
                    for other in trials[place + 1 :]:
                        study.tell(other, state=TrialState.FAIL)
                    raise outcome.error
    best = study.best_trial
    return TuningResult(
        model=spec.name,
        study=name,
        metric=metric,
        best_value=float(best.value),
        best_params={**trainer.default_params, **best.params},
        trials=tuple(_result(t) for t in study.trials),
        importances=_importances(study),
    )


def study_name(spec: ModelSpec, trainer: Trainer, training_set_hash: str) -> str:
    """`<model>-<training set, 12 digits>-<space, 8 digits>`: what two searches must share to be the same study."""
    space = {name: distribution_to_json(d) for name, d in sorted(trainer.search_space().items())}
    tuning = spec.tuning
    searched = [
        spec.trainer,
        space,
        dict(trainer.default_params),
        tuning.metric,
        tuning.folds,
        tuning.max_rows,
        spec.seed,
        spec.split.model_dump(mode="json"),
        *spec.quantiles,
    ]
    return f"{spec.name}-{training_set_hash[:12]}-{hashlib.sha256(json.dumps(searched, sort_keys=True).encode()).hexdigest()[:8]}"


def open_storage(storage: str) -> BaseStorage:
    """A database URL's storage, or a journal file's, its folder made."""
    if "://" in storage:
        return RDBStorage(storage)
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path))
    _drop_torn_entry(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _drop_torn_entry(path: Path, lock: JournalFileSymlinkLock) -> None:
    """Cuts off a last line without its end: a writer died within it, and the next append would spoil the journal for good."""
    if not path.exists() or path.stat().st_size == 0:
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _ask(study: optuna.Study, spec: ModelSpec, trainer: Trainer, done: int, wanted: int) -> Trial:
    space: dict[str, BaseDistribution] = dict(trainer.search_space())
    study.sampler = optuna.samplers.TPESampler(seed=(spec.seed + done) % 2**32, n_startup_trials=max(3, wanted // 4))
    if done == 0 and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial({name: trainer.default_params[name] for name in space})
    return study.ask(space)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return list(study.get_trials(deepcopy=False, states=_FINISHED))


def _fail_stale_trials(study: optuna.Study) -> None:
    """Fails trials left running by a dead process of this machine. Another machine's are left alone: it may be at work."""
    host = socket.gethostname()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner: Mapping[str, Any] = trial.user_attrs.get(_OWNER, {"host": host, "pid": -1})
        # Our own process id cannot be at work on it: in a container the next process often gets the last one's id.
        if owner["host"] == host and (owner["pid"] == os.getpid() or not _alive(owner["pid"])):
            study.tell(trial.number, state=TrialState.FAIL)


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "session": uuid.uuid4().hex}


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _importances(study: optuna.Study) -> dict[str, float]:
    """Each parameter's share of the variation among good trials (PED-ANOVA); empty where there are too few to tell."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _TRIALS_FOR_IMPORTANCES or len({t.value for t in complete}) < 2:
        return {}
    return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}


def _result(trial: FrozenTrial) -> TrialResult:
    value = trial.value if trial.state == TrialState.COMPLETE else None
    return TrialResult(trial.number, value, trial.state.name.lower(), dict(trial.params))
