"""XGBoost's C function for a dense matrix, called without the Python wrapper around it.

Belongs here: the call and its arguments. Does not belong here: which rows, checking answers (the handle's warm-up compares them
with `Booster.predict`, bit by bit, and leaves this way where one differs).

`Booster.inplace_predict` makes a proxy matrix and three JSON texts anew for each call: 50 µs that a single row notices.
Source: `XGBoosterPredictFromDense` in XGBoost's C API, https://xgboost.readthedocs.io/en/stable/dev/c__api_8h.html
"""

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serving_app.device import native_xgboost

if TYPE_CHECKING:
    from xgboost import Booster

_CONFIG = b'{"type": 0, "training": false, "iteration_begin": 0, "iteration_end": 0, "strict_shape": false, "cache_id": 0, "missing": NaN}'


class DensePredictor:
    """One booster's predictions for float32 rows in host memory. Thread-safe: XGBoost keeps the answer in thread-local memory."""

    def __init__(self, booster: "Booster") -> None:
        self._booster = booster  # owns the handle
        library: Any = native_xgboost().core._LIB
        self._call = library.XGBoosterPredictFromDense
        self._error = library.XGBGetLastError
        self._error.restype = ctypes.c_char_p

    def __call__(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`rows` float32 of shape (n, features), contiguous, NaN is missing; the answer float32 of shape (n,) or (n, classes)."""
        n, features = rows.shape
        if n == 0:
            return np.empty(0, np.float32)
        interface = b'{"data": [%d, false], "shape": [%d, %d], "typestr": "<f4", "version": 3}' % (rows.ctypes.data, n, features)
        shape, dims, answer = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64(), ctypes.POINTER(ctypes.c_float)()
        failed = self._call(self._booster.handle, interface, _CONFIG, None, ctypes.byref(shape), ctypes.byref(dims), ctypes.byref(answer))
        if failed:
            raise RuntimeError(f"XGBoost does not predict: {self._error().decode(errors='replace').splitlines()[0]}")
        size = tuple(shape[i] for i in range(dims.value))
        return np.ctypeslib.as_array(answer, size).copy()
