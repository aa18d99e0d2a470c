"""The XGBoost family: same inputs, same bytes; predictions survive the file; CUDA is never faked."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xgboost as xgb

from mlplatform.training.dataset import to_matrix
from mlplatform.training.trainers import base
from mlplatform.training.trainers.base import Resources, Target
from mlplatform.training.trainers.xgboost_classifier import TRAINER


@pytest.fixture(scope="module")
def parts(dataset):
    return [to_matrix(dataset.part(p), dataset.numeric, dataset.categories()) for p in ("train", "validate", "test")]


@pytest.fixture(scope="module")
def fitted(parts):
    return TRAINER.fit({}, parts[0], parts[1], seed=7, resources=Resources(threads=1))


def test_it_learns_the_question(fitted, parts):
    test = parts[2]
    p = fitted.predict(test.values)
    constant = np.full(test.rows, parts[0].label.mean())
    assert _log_loss(test.label, p) < 0.9 * _log_loss(test.label, constant)
    assert max(fitted.importances, key=fitted.importances.__getitem__) == "x0"
    assert sum(fitted.importances.values()) == pytest.approx(1)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_file(fitted, parts, tmp_path, threads):
    again = TRAINER.fit({}, parts[0], parts[1], seed=7, resources=Resources(threads=threads))
    assert _sha(again, tmp_path / "a") == _sha(fitted, tmp_path / "b")


def test_another_seed_gives_another_file(fitted, parts, tmp_path):
    assert _sha(TRAINER.fit({}, parts[0], parts[1], seed=8, resources=Resources(threads=1)), tmp_path / "a") != _sha(fitted, tmp_path / "b")


def test_the_file_predicts_the_same_bits_in_any_batch(fitted, parts, tmp_path):
    values = parts[2].values
    expected = fitted.predict(values)
    loaded = xgb.Booster(model_file=tmp_path / fitted.save(tmp_path))
    assert np.array_equal(loaded.inplace_predict(values, validate_features=False).astype(np.float64), expected)
    assert np.array_equal(np.concatenate([fitted.predict(values[i : i + 1]) for i in range(20)]), expected[:20])


def test_early_stopping_keeps_the_best_round_only(fitted, parts):
    curve = fitted.curves["validate_log_loss"]
    assert fitted.rounds == int(np.argmin(curve)) + 1 < len(curve)
    assert fitted.score == pytest.approx(min(curve))
    assert fitted.booster.num_boosted_rounds() == fitted.rounds
    assert _log_loss(parts[1].label, fitted.predict(parts[1].values)) == pytest.approx(fitted.score, rel=1e-5)


def test_without_validation_rows_the_rounds_decide(parts):
    fitted = TRAINER.fit({}, parts[0], None, seed=7, rounds=5, resources=Resources(threads=1))
    assert (fitted.rounds, fitted.score) == (5, None)
    with pytest.raises(ValueError, match="number of rounds"):
        TRAINER.fit({}, parts[0], None, seed=7, resources=Resources(threads=1))


def test_auc_is_searched_upwards(parts):
    fitted = TRAINER.fit({}, parts[0], parts[1], seed=7, metric="auc", resources=Resources(threads=1))
    assert fitted.score == pytest.approx(max(fitted.curves["validate_auc"]))


def test_every_round_is_reported_and_may_end_the_fit(parts):
    seen: list[int] = []

    def stop_at_five(round_: int, value: float) -> None:
        seen.append(round_)
        if round_ == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        TRAINER.fit({}, parts[0], parts[1], seed=7, on_round=stop_at_five, resources=Resources(threads=1))
    assert seen == [0, 1, 2, 3, 4, 5]


def test_rows_of_one_class_are_refused(parts):
    with pytest.raises(ValueError, match="one class"):
        TRAINER.fit({}, replace(parts[0], label=np.zeros(parts[0].rows)), parts[1], seed=7, resources=Resources(threads=1))


def test_a_question_for_quantiles_is_refused(parts):
    with pytest.raises(ValueError, match="binary question only"):
        TRAINER.fit({}, parts[0], parts[1], seed=7, target=Target((0.1, 0.5, 0.9)), metric="pinball")


@pytest.mark.skipif(base.cuda_devices() > 0, reason="there is a CUDA device")
def test_asking_for_cuda_where_there_is_none_fails_loudly(parts):
    with pytest.raises(RuntimeError, match="cuda was asked for"):
        TRAINER.fit({}, parts[0], parts[1], seed=7, resources=Resources(device="cuda"))


def test_a_trainer_is_found_by_its_modules_name():
    assert base.get("xgboost_classifier") is TRAINER
    assert set(TRAINER.search_space()) <= set(TRAINER.default_params)
    with pytest.raises(LookupError, match="no trainer 'oracle'"):
        base.get("oracle")


def _sha(fitted, folder: Path) -> str:
    folder.mkdir()
    return hashlib.sha256((folder / fitted.save(folder)).read_bytes()).hexdigest()


def _log_loss(label: np.ndarray, p: np.ndarray) -> float:
    return float(-np.mean(np.where(label == 1, np.log(p), np.log(1 - p))))
