"""Request-time feature functions, found by the import path in a model version's contract.

Belongs here: the lookup, its limits and the check that the code is the one the model was trained with. Does not belong here: calling them.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from mlplatform.contracts import ContractFunction, source_hash

# A contract comes from the registry: it may name code of this package only, never an arbitrary importable.
PACKAGE = "feature_definitions"
_PATH = re.compile(rf"^({PACKAGE}(?:\.[A-Za-z_]\w*)+):([A-Za-z_]\w*)$")

Function = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class FunctionRefusedError(ValueError):
    """The function cannot be used: outside the allowed package, not there, or changed since training."""


def resolve(declared: ContractFunction) -> Function:
    """The function behind `declared.path`. Raises FunctionRefusedError."""
    match = _PATH.match(declared.path)
    if match is None:
        raise FunctionRefusedError(f"'{declared.path}' is not 'module:function' below the package {PACKAGE}")
    module_name, name = match.groups()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise FunctionRefusedError(f"'{declared.path}' cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not inspect.isfunction(function) or not function.__module__.startswith(PACKAGE + "."):
        raise FunctionRefusedError(f"'{declared.path}' is not a function written below the package {PACKAGE}")
    found = source_hash(function)
    if found != declared.source_hash:
        raise FunctionRefusedError(
            f"'{declared.path}' has changed since training: source hash {found[:12]}, trained with {declared.source_hash[:12]}"
        )
    return function
