"""Predicting many rows with a registered version, as its serving contract says.

Belongs here: a stored version applied to a training-set frame (the champion on the challenger's rows, a batch). Does not
belong here: answering requests (the service does, from the same contract).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from mlplatform.contracts import ServingContract
from mlplatform.training.contract import from_json_numbers
from mlplatform.training.dataset import encode_category
from mlplatform.training.trainers.base import Floats


class ModelFileError(RuntimeError):
    """The model file is not the one its contract names, or does not answer as it did in training."""


@dataclass(frozen=True)
class Scorer:
    """A version's model and contract."""

    contract: ServingContract
    _answer: Callable[[Floats], Floats]

    def inputs(self, frame: pl.DataFrame) -> Floats:
        """The contract's features of each row, (n, d) float64. Raises ValueError for columns the frame lacks."""
        features = self.contract.features
        needed = [f.column if f.kind == "category" else f.name for f in features]
        if missing := sorted(set(needed) - set(frame.columns)):
            raise ValueError(f"the rows lack inputs of {self.contract.model}: {missing}")
        columns = [
            encode_category(frame[column], feature.categories or ())
            if feature.kind == "category"
            else frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
            for feature, column in zip(features, needed, strict=True)
        ]
        return np.column_stack(columns)

    def predict(self, frame: pl.DataFrame) -> Floats:
        """Probabilities, shape (n,), or quantiles, (n, levels)."""
        return self.predict_matrix(self.inputs(frame))

    def predict_matrix(self, values: Floats) -> Floats:
        return np.asarray(self._answer(values), dtype=np.float64)

    def points(self, values: Floats) -> Floats:
        """What stands as the prediction, shape (n,): the probability, or the median."""
        answers = self.predict_matrix(values)
        return answers if answers.ndim == 1 else answers[:, self.contract.median]


def _xgboost(content: bytes, threads: int) -> Callable[[Floats], Floats]:
    import xgboost

    booster = xgboost.Booster()
    booster.load_model(bytearray(content))
    booster.set_param({"nthread": threads})
    return lambda values: booster.inplace_predict(values, validate_features=False)  # type: ignore[no-any-return]


def _torch(content: bytes, threads: int) -> Callable[[Floats], Floats]:
    from mlplatform import networks

    network = networks.from_bytes(content)

    def answer(values: Floats) -> Floats:
        with networks.with_threads(threads or 1):  # unless asked: one, as in training
            return networks.predict(network, values).astype(np.float64)

    return answer


_READERS: dict[str, Callable[[bytes, int], Callable[[Floats], Floats]]] = {"xgboost": _xgboost, "torch": _torch}


def predictor(framework: str, content: bytes, threads: int = 0) -> Callable[[Floats], Floats]:
    """A model file's bytes as a function from inputs (n, d) to answers. `threads` of each call; 0: the family's own choice."""
    return _READERS[framework](content, threads)


def load(folder: Path, contract: ServingContract, threads: int = 0) -> Scorer:
    """A version's files as the registry downloads them. Verifies the file's hash and the contract's example answers. `threads` as
    for `predictor`.

    Raises ModelFileError where either differs.
    """
    content = (folder / contract.model_file).read_bytes()
    if hashlib.sha256(content).hexdigest() != contract.model_sha256:
        raise ModelFileError(f"{contract.model_file} of {contract.model} is not the file its contract names (SHA-256 differs)")
    scorer = Scorer(contract, predictor(contract.framework, content, threads))
    if contract.example_features:
        answers = scorer.predict_matrix(from_json_numbers(contract.example_features))
        if not np.allclose(answers, contract.example_predictions, rtol=0, atol=max(1e-6, contract.tolerance)):
            raise ModelFileError(f"{contract.model} does not answer its examples as it did in training")
    return scorer
