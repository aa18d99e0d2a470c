"""The native runtimes: a model file's bytes as something that predicts.

Belongs here: loading a family's file, predicting with it, explaining where it can. Does not belong here: which rows, examples, the
contract's other parts (`model_handle`). A family is one class here and one line in `_FAMILIES`; its library is imported when a model
of it is loaded, and not before.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mlplatform.contracts import ServingContract
from serving_app.device import native_xgboost
from serving_app.native import DensePredictor

if TYPE_CHECKING:
    from xgboost import Booster

    from mlplatform.networks import TabularNetwork

Rows = npt.NDArray[np.float32]
# On a CUDA device sums and exponentials may round otherwise in the last bits; on the processor nothing may differ.
_CUDA_TOLERANCE = 1e-5


class RuntimeRefusedError(Exception):
    """The file is not one this runtime serves; `step` says which check it failed."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class Runtime(Protocol):
    """One loaded model file. Thread-safe."""

    tolerance: float  # how far an answer may be from the one recorded in training

    def predict(self, rows: Rows) -> Rows:
        """Probabilities (n,) or quantiles (n, levels) for contiguous rows (n, features); NaN is missing."""
        ...

    def settle(self, rows: Rows) -> None:
        """Once before the first request, with the contract's examples: chooses the way to predict."""
        ...

    def explain(self, rows: Rows) -> Rows | None:
        """See `ModelHandle.explain`; None for a family that explains nothing."""
        ...


def load_runtime(contract: ServingContract, raw: bytes, device: str, threads: int) -> Runtime:
    """Raises RuntimeRefusedError."""
    return _FAMILIES[contract.framework](contract, raw, device, threads)


class XGBoostRuntime:
    """Bit-identical to `Booster.predict` on the same float32 features."""

    def __init__(self, contract: ServingContract, raw: bytes, device: str, threads: int) -> None:
        self._xgboost: Any = native_xgboost()
        try:
            booster: Booster = self._xgboost.Booster(model_file=bytearray(raw))
        except self._xgboost.core.XGBoostError as error:
            raise RuntimeRefusedError("load", f"XGBoost does not read {contract.model_file}: {str(error).splitlines()[0]}") from error
        booster.set_param({"device": device, "nthread": threads})
        names = tuple(f.name for f in contract.features)
        if booster.num_features() != len(names) or (booster.feature_names is not None and tuple(booster.feature_names) != names):
            raise RuntimeRefusedError(
                "features", f"the booster's {booster.num_features()} features are not the contract's {len(names)} in their order"
            )
        self.tolerance = _CUDA_TOLERANCE if device.startswith("cuda") else 0.0
        self._booster = booster
        # Rows from host memory go to a CUDA device as one DMatrix.
        self._dense = None if device.startswith("cuda") else DensePredictor(booster)

    def predict(self, rows: Rows) -> Rows:
        return self._by_dmatrix(rows) if self._dense is None else self._dense(rows)

    def settle(self, rows: Rows) -> None:
        if self._dense is not None and not np.array_equal(self.predict(rows), self._by_dmatrix(rows)):
            self._dense = None  # never seen with numeric features; a booster that needs the DMatrix gets it

    def explain(self, rows: Rows) -> Rows | None:
        return np.asarray(self._booster.predict(self._dmatrix(rows), pred_contribs=True), dtype=np.float32)

    def _by_dmatrix(self, rows: Rows) -> Rows:
        return np.asarray(self._booster.predict(self._dmatrix(rows)), dtype=np.float32)

    def _dmatrix(self, rows: Rows) -> Any:
        return self._xgboost.DMatrix(
            rows, feature_names=self._booster.feature_names, feature_types=self._booster.feature_types, enable_categorical=True
        )


class TorchRuntime:
    """The platform's own networks, from safetensors: plain arrays and an architecture, no code and no pickle (ADR 22)."""

    def __init__(self, contract: ServingContract, raw: bytes, device: str, threads: int) -> None:
        try:
            import torch

            from mlplatform import networks
        except ImportError as missing:
            raise RuntimeRefusedError("load", f"this service was installed without the extra 'torch': {missing}") from missing
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeRefusedError("device", f"the device is {device}, and the installed torch can use none")
        # One number for the process, whatever its models: more threads wait for each other at every small layer.
        torch.set_num_threads(threads)
        try:
            network: TabularNetwork = networks.from_bytes(raw, device)
        except networks.NetworkFileError as error:
            raise RuntimeRefusedError("load", f"{contract.model_file}: {error}") from error
        architecture = network.architecture
        sizes = [None if f.categories is None else len(f.categories) for f in contract.features]
        if (
            sizes != [*(None for _ in range(architecture.numeric)), *architecture.categories]
            or architecture.quantiles != contract.quantiles
        ):
            raise RuntimeRefusedError("features", "the network's inputs or quantiles are not the contract's in their order")
        self.tolerance = max(contract.tolerance, _CUDA_TOLERANCE if device.startswith("cuda") else 0.0)
        self._network = network
        self._device = device
        self._predict = networks.predict

    def predict(self, rows: Rows) -> Rows:
        return self._predict(self._network, rows, self._device)

    def settle(self, rows: Rows) -> None:
        """The first pass sets up the libraries' own buffers."""
        self.predict(rows)

    def explain(self, rows: Rows) -> Rows | None:
        return None


_FAMILIES: Mapping[str, Callable[[ServingContract, bytes, str, int], Runtime]] = {"xgboost": XGBoostRuntime, "torch": TorchRuntime}
