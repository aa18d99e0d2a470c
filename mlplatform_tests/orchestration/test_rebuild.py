"""What a version that was made again is compared by: a network within its declared tolerance, trees byte for byte."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mlplatform.contracts import ContractFeature, ContractField, ServingContract
from mlplatform.orchestration.rebuild import compare
from mlplatform.training.fitting import TrainedModel, save
from mlplatform.training.trainers import base
from mlplatform.training.trainers.base import Matrix, Resources, Target

LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def rows() -> Matrix:
    values = np.random.default_rng(5).normal(size=(600, 2))
    return Matrix(values, 10 * values[:, 0], ("a", "b"))


@pytest.fixture(scope="module", params=["torch_tabular", "xgboost_classifier"])
def made_again(request: pytest.FixtureRequest, rows: Matrix) -> tuple[TrainedModel, ServingContract, str]:
    """A fitted model and the contract of a version that came out just so; the file's hash is another's."""
    trainer = base.get(request.param)
    network = trainer.framework == "torch"
    target = Target(LEVELS) if network else Target()
    matrix = rows if network else Matrix(rows.values, (rows.label > 0).astype(float), rows.columns)
    params = {"width": 8, "depth": 1} if network else {"min_child_weight": 1.0}
    metric = "pinball" if network else "log_loss"
    fitted = trainer.fit(params, matrix, None, seed=3, target=target, metric=metric, rounds=3, resources=Resources(threads=1))
    examples = rows.values[:16]
    contract = ServingContract(
        model="m",
        task="quantiles" if network else "binary",
        description="x",
        framework=trainer.framework,
        model_file="f",
        model_sha256=hashlib.sha256(b"another file").hexdigest(),
        project="p",
        fields=(ContractField(name="a", dtype="float", description="a", example=1.0),),
        views=(),
        functions=(),
        features=tuple(ContractFeature(name=n, kind="request", source=n, column=n) for n in "ab"),
        training_set_hash="h",
        example_features=tuple(map(tuple, examples.tolist())),
        example_predictions=tuple(tuple(p) if network else p for p in fitted.predict(examples).tolist()),
        quantiles=LEVELS if network else (),
        tolerance=trainer.tolerance(target.quantiles),
    )
    return TrainedModel(fitted, rows.columns, {}, {}, 0.0), contract, trainer.framework


def moved(contract: ServingContract, by: float) -> ServingContract:
    """The contract of a version whose answers are off by so much."""
    told = np.array(contract.example_predictions) + by
    return contract.model_copy(update={"example_predictions": tuple(tuple(p) if contract.quantiles else p for p in told.tolist())})


def test_the_same_file_is_the_same(made_again: tuple[TrainedModel, ServingContract, str], tmp_path: Path) -> None:
    trained, contract, _ = made_again
    own = contract.model_copy(update={"model_sha256": save(trained.fitted, tmp_path).sha256})
    assert compare(trained, moved(own, 1.0)).identical


def test_another_file_is_the_same_only_within_a_networks_tolerance(made_again: tuple[TrainedModel, ServingContract, str]) -> None:
    trained, contract, framework = made_again
    found = compare(trained, contract)
    assert (found.identical, found.same) == (False, framework == "torch")
    assert (contract.tolerance > 0) == (framework == "torch")
    step = contract.tolerance or 1e-9
    assert compare(trained, moved(contract, 0.5 * step)).same is (framework == "torch")
    beyond = compare(trained, moved(contract, 2 * step))
    assert not beyond.same
    assert beyond.difference == pytest.approx(2 * step, rel=1e-3)
