"""One loaded model version: its contract, its parser, its feature plan and its native runtime.

Belongs here: loading from verified files, warming up, comparing with the recorded examples, predicting.
Does not belong here: where the files come from, which version serves.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from mlplatform.contracts import CONTRACT_FILE, ServingContract
from mlplatform.verified import Sealed
from serving_app.features import FeaturePlan, FunctionOutputError, PlanError
from serving_app.inputs import FieldFaultError, InputParser
from serving_app.problems import ProblemError
from serving_app.request_functions import FunctionRefusedError
from serving_app.row_texts import RowWriter, members
from serving_app.runtimes import Runtime, RuntimeRefusedError, load_runtime


class ModelRefusedError(Exception):
    """A version that must not serve; `step` says which check it failed, `reason` why."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason


@dataclass(frozen=True)
class VersionRef:
    """A registered version. `source` tells apart two registries that both count from 1. `sealed`: what its tags say of its gates; None
    for one a cache of an earlier release remembered, which had no such tags."""

    model: str
    version: int
    source: str
    sealed: Sealed | None = field(default=None, compare=False)


def safe_relative(name: str) -> bool:
    """Whether a file name from a contract stays below its folder."""
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\x00" not in name


def read_contract(raw: bytes, model: str) -> ServingContract:
    """The contract in a file's bytes. Raises ModelRefusedError."""
    try:
        contract = ServingContract.model_validate_json(raw)
    except ValidationError as error:
        raise ModelRefusedError(
            "contract", f"{CONTRACT_FILE} is not a serving contract: {error.error_count()} errors, first: {error.errors()[0]['msg']}"
        ) from error
    if contract.model != model:
        raise ModelRefusedError("contract", f"it was written for the model '{contract.model}', not '{model}'")
    if not safe_relative(contract.model_file):
        raise ModelRefusedError("contract", f"the model file's name leaves its folder: {contract.model_file!r}")
    return contract


def verify_model(contract: ServingContract, raw: bytes) -> None:
    """Raises ModelRefusedError where the bytes are not the ones the contract vouches for."""
    found = hashlib.sha256(raw).hexdigest()
    if found != contract.model_sha256:
        raise ModelRefusedError(
            "hash", f"{contract.model_file} has sha256 {found[:12]}…, the contract says {contract.model_sha256[:12]}…: altered or truncated"
        )


STAGES = ("features", "assemble", "predict", "wait")  # see the metric `mlplatform_stage_seconds`


class ModelHandle:
    """Ready to predict; thread-safe; never changed after it was made, so that an answer can't mix two versions."""

    def __init__(self, ref: VersionRef, contract: ServingContract, runtime: Runtime, device: str) -> None:
        self.ref = ref
        self.contract = contract
        self.device = device
        self.digest = contract.digest()
        self.parser = InputParser(contract)
        self.plan = FeaturePlan(contract)
        self.writer = RowWriter(contract)
        # What every answer says of it, members of a JSON object.
        self.told = members({"model": ref.model, "version": ref.version, "threshold": contract.threshold})
        self.stages = {stage: (ref.model, str(ref.version), stage) for stage in STAGES}
        # The place of the prediction among an answer's quantiles; None for an answer of one number.
        self.median = contract.median if contract.quantiles else None
        self._runtime = runtime

    @property
    def name(self) -> str:
        return self.ref.model

    @property
    def version(self) -> int:
        return self.ref.version

    def predict(self, matrix: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Probabilities, float32 of shape (rows,), or quantiles, (rows, levels), as the native runtime gives them for the same float32
        features; NaN is missing."""
        return self._runtime.predict(np.ascontiguousarray(matrix, dtype=np.float32))

    def explain(self, matrix: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32] | None:
        """What each feature adds to the margin (log-odds), float32 of shape (rows, features + 1): a row's sum is its margin, and the
        last column the model's expectation. TreeSHAP, path-dependent: S. Lundberg et al., "From local explanations to global
        understanding with explainable AI for trees", Nature Machine Intelligence 2 (2020), algorithm 2. None: not a model of trees.
        """
        return self._runtime.explain(np.ascontiguousarray(matrix, dtype=np.float32))

    def warm_up(self) -> None:
        """Runs the field examples and the recorded example features through; raises ModelRefusedError where an answer differs."""
        self._try_field_examples()
        examples = self.contract.example_features
        if len(examples) != len(self.contract.example_predictions) or not examples:
            raise ModelRefusedError("examples", "the contract holds no example features with predictions to compare with")
        if any(len(row) != len(self.contract.features) for row in examples):
            raise ModelRefusedError("examples", f"an example does not have the contract's {len(self.contract.features)} features")
        matrix = np.array([[np.nan if v is None else v for v in row] for row in examples], dtype=np.float64)
        self._runtime.settle(matrix.astype(np.float32))
        wanted = np.array(self.contract.example_predictions, dtype=np.float32)
        found = self.predict(matrix)
        if found.shape != wanted.shape:
            raise ModelRefusedError("examples", f"the answers in training had the shape {wanted.shape}, these have {found.shape}")
        if not (np.abs(found - wanted) <= self._runtime.tolerance).all() or not np.isfinite(found).all():
            off = np.abs(found - wanted).reshape(len(found), -1).max(axis=1)
            worst = int(np.nanargmax(off)) if np.isfinite(off).any() else 0
            raise ModelRefusedError("examples", f"example {worst} was {wanted[worst]!r} in training and is {found[worst]!r} here")

    def _try_field_examples(self) -> None:
        example = {f.name: f.example for f in self.contract.fields if f.constant is None}
        try:
            parsed = self.parser.parse([example], rows_limit=1)
            keys = self.plan.keys([parsed])
            columns = self.parser.columns([parsed], self.plan.fields)
            features = self.plan.assemble(columns, keys, self.plan.nothing(keys, "unreachable"), 0)
        except (ProblemError, FunctionOutputError) as error:
            raise ModelRefusedError("warm-up", f"the contract's own field examples do not work: {error}") from error
        self.predict(features.matrix)


def load_model(ref: VersionRef, folder: Path, device: str, threads: int) -> ModelHandle:
    """Loads, verifies, warms up and compares. Raises ModelRefusedError; OSError where the files are not there."""
    contract = read_contract((folder / CONTRACT_FILE).read_bytes(), ref.model)
    raw = (folder / contract.model_file).read_bytes()
    verify_model(contract, raw)
    try:
        runtime = load_runtime(contract, raw, device, threads)
    except RuntimeRefusedError as error:
        raise ModelRefusedError(error.step, str(error)) from error
    try:
        handle = ModelHandle(ref, contract, runtime, device)
    except FunctionRefusedError as error:
        raise ModelRefusedError("functions", str(error)) from error
    except (PlanError, FieldFaultError, KeyError, ValueError) as error:
        raise ModelRefusedError("contract", str(error)) from error
    handle.warm_up()
    return handle
