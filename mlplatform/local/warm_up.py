"""Loading the libraries a long local command needs while its services start, on the core they leave free.

Belongs here: which libraries, and the collector's settings afterwards. Does not belong here: any module of ours: theirs
read no settings, ours may.
"""

import gc
import importlib
import os
import threading

from mlplatform.local.services import QUIET

# In the order they are needed; together about ten seconds of one core.
LIBRARIES = (
    "dagster",
    "polars",
    "feast",
    "mlflow",
    "great_expectations",
    "optuna",
    "xgboost",
    "sklearn.linear_model",
    "evidently",
    "matplotlib.figure",
)


def start() -> threading.Thread:
    """Begins loading in a thread that ends with the process. Sets what the libraries read from the environment first."""
    os.environ.update(QUIET)
    thread = threading.Thread(target=_load, name="warm-up", daemon=True)
    thread.start()
    return thread


def _load() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)


def settle() -> None:
    """Takes what is loaded out of the garbage collector's rounds: over a million objects that will never be garbage."""
    gc.collect()
    gc.freeze()
