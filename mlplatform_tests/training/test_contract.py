"""The serving contract names a source for every input, and its examples are the model's own answers."""

import math
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.contracts import ServingContract
from mlplatform.specs import FeatureRecipe, RequestFunction
from mlplatform.training import fitting, scoring
from mlplatform.training.contract import build_contract, from_json_numbers, json_number, view_layout
from mlplatform.training.dataset import assemble
from mlplatform.training.trainers.base import Resources
from mlplatform.training.trainers.xgboost_classifier import TRAINER


def squared(columns):
    return {"load_squared": columns["load"] ** 2}


FUNCTION = RequestFunction(name="load_shape", function=squared, inputs=("load",), outputs=("load_squared",))
RECIPE = FeatureRecipe(
    view="machine", inputs={}, cadence=timedelta(minutes=5), compute=lambda tables, ticks: tables["m"], defaults={"x0": 0.0}
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, module_spec, module_rows):
    spec, (rows, features) = module_spec, module_rows
    load = pl.Series("load_squared", np.linspace(0, 1, rows.height))
    data = assemble(spec, rows, features.with_columns(load))
    model = fitting.fit(spec, data, TRAINER, {"max_depth": 3}, Resources(threads=1))
    return spec, data, model, fitting.save(model.fitted, tmp_path_factory.mktemp("model"))


def views():
    return [
        view_layout("machine", ("site",), ("x1", "x0", "x2"), timedelta(hours=1), RECIPE),
        view_layout("site_state", ("site",), ("x3", "x4", "x5", "unused"), timedelta(hours=2), RECIPE.model_copy(update={"defaults": {}})),
        view_layout("idle", ("site",), ("nothing",), timedelta(hours=2), RECIPE.model_copy(update={"defaults": {}})),
    ]


def contract_of(trained, **changes):
    spec, data, model, saved = trained
    given = {"views": views(), "functions": [FUNCTION], "framework": "xgboost", "training_set_hash": "abc", "project": "test"}
    return build_contract(spec, data, model, saved, **(given | changes))


def test_every_input_has_a_source_in_the_models_order(trained):
    contract = contract_of(trained)
    assert [f.name for f in contract.features] == [*trained[1].columns]
    kinds = {f.name: (f.kind, f.source, f.column) for f in contract.features}
    assert kinds["x0"] == ("view", "machine", "x0")
    assert kinds["load_squared"] == ("request", f"{__name__}:squared", "load_squared")
    assert kinds["site"] == ("category", "site", "site")
    assert contract.features[-1].categories == ("A", "B", "C")
    assert [v.name for v in contract.views] == ["machine", "site_state"]
    assert contract.threshold == pytest.approx(1 / 6)


def test_views_keep_their_packed_order_ages_and_defaults():
    view = views()[0]
    assert view.features == ("x1", "x0", "x2")
    assert view.ttl_s == 3600
    assert view.defaults == {"x1": None, "x0": 0.0, "x2": None}
    with pytest.raises(ValueError, match="defaults name features it does not have"):
        view_layout("machine", ("site",), ("x1",), timedelta(hours=1), RECIPE)


def test_the_contract_survives_json(trained):
    contract = contract_of(trained)
    assert ServingContract.model_validate_json(contract.canonical_json()) == contract


def test_the_examples_are_sixteen_rows_with_the_models_own_bits(trained):
    contract = contract_of(trained)
    assert len(contract.example_features) == 16
    answers = trained[2].fitted.predict(from_json_numbers(contract.example_features))
    assert tuple(answers) == contract.example_predictions


def test_an_input_nobody_provides_or_two_provide_is_refused(trained):
    with pytest.raises(ValueError, match="'load_squared' is found nowhere"):
        contract_of(trained, functions=[])
    twin = view_layout("twin", ("site",), ("x0",), timedelta(hours=1), RECIPE)
    with pytest.raises(ValueError, match="'x0' is found in machine and twin"):
        contract_of(trained, views=[*views(), twin])


def test_json_has_no_nan_and_no_infinity():
    assert json_number(math.nan) is None
    assert json_number(0.1) == 0.1
    with pytest.raises(ValueError, match="infinite"):
        json_number(math.inf)


def test_a_stored_version_scores_a_frame_with_the_same_bits(trained):
    _, data, model, saved = trained
    scorer = scoring.load(saved.folder, contract_of(trained))
    test = data.part("test")
    assert np.array_equal(scorer.predict(test), model.predict(data, "test"))
    with pytest.raises(ValueError, match=r"lack inputs of breakdown: \['x0'\]"):
        scorer.predict(test.drop("x0"))


def test_a_changed_model_file_or_wrong_answers_are_refused(trained, tmp_path):
    contract = contract_of(trained)
    (tmp_path / contract.model_file).write_bytes(b"something else")
    with pytest.raises(scoring.ModelFileError, match="SHA-256"):
        scoring.load(tmp_path, contract)
    wrong = contract.model_copy(update={"example_predictions": tuple(1 - p for p in contract.example_predictions)})
    with pytest.raises(scoring.ModelFileError, match="does not answer its examples"):
        scoring.load(trained[3].folder, wrong)
