"""XGBoost's C function for a dense matrix, called without the Python wrapper around it.

Belongs here: the call and its arguments. Does not belong here: which rows, checking answers (the handle's warm-up compares them
with `Booster.predict`, bit by bit, and leaves this way where one differs).

`Booster.inplace_predict` makes a proxy matrix and three JSON texts anew for each call: 50 µs that a single row notices. A proxy that the C
function makes itself reads the control group's files for a limit of processors, 35 µs; so each thread keeps one.
Source: `XGBoosterPredictFromDense` in XGBoost's C API, https://xgboost.readthedocs.io/en/stable/dev/c__api_8h.html
"""

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serving_app.device import native_xgboost

if TYPE_CHECKING:
    from xgboost import Booster

_CONFIG = b'{"type": 0, "training": false, "iteration_begin": 0, "iteration_end": 0, "strict_shape": false, "cache_id": 0, "missing": NaN}'


class DensePredictor:
    """One booster's predictions for float32 rows in host memory. Thread-safe: XGBoost keeps the answer in thread-local memory, and the
    proxy that says where the rows are is one for each thread."""

    def __init__(self, booster: "Booster") -> None:
        self._booster = booster  # owns the handle
        self._library: Any = native_xgboost().core._LIB
        self._library.XGBGetLastError.restype = ctypes.c_char_p
        self._call = self._library.XGBoosterPredictFromDense
        self._proxies = threading.local()

    def __call__(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`rows` float32 of shape (n, features), contiguous, NaN is missing; the answer float32 of shape (n,) or (n, classes)."""
        n, features = rows.shape
        if n == 0:
            return np.empty(0, np.float32)
        interface = b'{"data": [%d, false], "shape": [%d, %d], "typestr": "<f4", "version": 3}' % (rows.ctypes.data, n, features)
        shape, dims, answer = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64(), ctypes.POINTER(ctypes.c_float)()
        try:
            proxy = self._proxies.proxy
        except AttributeError:
            proxy = self._proxies.proxy = _Proxy(self._library)
        told = ctypes.byref(shape), ctypes.byref(dims), ctypes.byref(answer)
        _check(self._library, self._call(self._booster.handle, interface, _CONFIG, proxy.handle, *told))
        size = tuple(shape[i] for i in range(dims.value))
        return np.ctypeslib.as_array(answer, size).copy()


class _Proxy:
    """XGBoost's matrix without rows of its own, freed with the thread that it is of."""

    def __init__(self, library: Any) -> None:
        self.handle = ctypes.c_void_p()
        self._free = library.XGDMatrixFree
        _check(library, library.XGProxyDMatrixCreate(ctypes.byref(self.handle)))

    def __del__(self) -> None:
        self._free(self.handle)


def _check(library: Any, failed: int) -> None:
    if failed:
        raise RuntimeError(f"XGBoost does not predict: {library.XGBGetLastError().decode(errors='replace').splitlines()[0]}")
