"""Where predictions run: the processor, or a CUDA device that is really there.

Belongs here: the choice, and importing XGBoost without what the service does not use. Does not belong here: models.
"""

import ctypes
import importlib
import sys
from types import ModuleType


class DeviceError(RuntimeError):
    """The device asked for is not there."""


def native_xgboost() -> ModuleType:
    """XGBoost without scikit-learn and pandas, which its import would bring along where they are installed.

    They cost a second of start-up and 70 MB for a wrapper that is never used here. Where XGBoost was imported before
    (a test process), it is taken as it is.
    """
    if "xgboost" in sys.modules or "sklearn" in sys.modules:
        return importlib.import_module("xgboost")
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        return importlib.import_module("xgboost")
    finally:
        del sys.modules["sklearn"]


def cuda_devices() -> int:
    """CUDA devices that XGBoost could use: 0 where it was built without CUDA or no driver answers."""
    if not native_xgboost().build_info().get("USE_CUDA"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def pick_device(setting: str) -> str:
    """`cpu` or `cuda:n` for the setting auto, cpu or cuda[:n]. Raises DeviceError where CUDA was asked for and is missing."""
    if setting == "cpu":
        return "cpu"
    devices = cuda_devices()
    if setting == "auto":
        return "cuda:0" if devices else "cpu"
    wanted = int(setting.partition(":")[2] or 0)
    if wanted >= devices:
        built = "" if native_xgboost().build_info().get("USE_CUDA") else "; this XGBoost was built without CUDA (install the extra 'cuda')"
        raise DeviceError(f"MLPLATFORM_DEVICE={setting}, but {devices} CUDA devices are usable{built}")
    return f"cuda:{wanted}"
