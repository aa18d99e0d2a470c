"""The final fit: rounds from early stopping, rows up to the test part, and the same file every time."""

import pytest

from mlplatform.training import fitting
from mlplatform.training.dataset import assemble
from mlplatform.training.trainers.base import Resources
from mlplatform.training.trainers.xgboost_classifier import TRAINER

ONE_THREAD = Resources(threads=1)


@pytest.fixture(scope="module")
def trained(module_spec, dataset):
    return fitting.fit(module_spec, dataset, TRAINER, {"max_depth": 3}, ONE_THREAD)


def test_it_keeps_the_rounds_at_which_validation_was_best(trained):
    curve = trained.curves["validate_log_loss"]
    assert trained.fitted.rounds == curve.index(min(curve)) + 1
    assert trained.score == pytest.approx(min(curve))
    assert trained.fitted.params["max_depth"] == 3


def test_the_same_inputs_give_the_same_file(trained, module_spec, dataset, tmp_path):
    again = fitting.fit(module_spec, dataset, TRAINER, {"max_depth": 3}, ONE_THREAD)
    assert fitting.save(again.fitted, tmp_path / "a").sha256 == fitting.save(trained.fitted, tmp_path / "b").sha256


def test_the_test_part_has_no_say(trained, module_spec, module_rows, dataset, tmp_path):
    rows, features = module_rows
    kept = ~rows["row_id"].is_in(dataset.part("test")["row_id"].tail(100).implode())
    fewer = assemble(module_spec, rows.filter(kept), features.filter(kept))
    again = fitting.fit(module_spec, fewer, TRAINER, {"max_depth": 3}, ONE_THREAD)
    assert fitting.save(again.fitted, tmp_path / "a").sha256 == fitting.save(trained.fitted, tmp_path / "b").sha256


def test_the_validation_part_counts_in_the_final_model(trained, module_spec, module_rows, dataset, tmp_path):
    rows, features = module_rows
    kept = ~rows["row_id"].is_in(dataset.part("validate")["row_id"].tail(100).implode())
    fewer = assemble(module_spec, rows.filter(kept), features.filter(kept))
    again = fitting.fit(module_spec, fewer, TRAINER, {"max_depth": 3}, ONE_THREAD)
    assert fitting.save(again.fitted, tmp_path / "a").sha256 != fitting.save(trained.fitted, tmp_path / "b").sha256
