"""What a model version was made of, besides its data: recorded with it, and compared when it is made again.

Belongs here: naming each ingredient so that a change of it can be told by name. Does not belong here: the data (its manifest says that),
making a version again (`rebuild`).
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from mlplatform.code_version import code_version
from mlplatform.contracts import source_hash
from mlplatform.features.plan import ViewPlan
from mlplatform.specs import ModelSpec, RequestFunction
from mlplatform.training.trainers.base import Resources

INGREDIENTS_TAG = "ingredients"  # of a version: JSON, by name
PARAMS = "parameters"
# They may differ and the version come out the same: told, but a rebuild goes on.
CIRCUMSTANCES = ("code", "packages", "python", "machine", "engine")


def ingredients(
    spec: ModelSpec,
    plans: Mapping[str, ViewPlan],
    functions: Sequence[RequestFunction],
    params: Mapping[str, Any],
    resources: Resources,
    stated_code: str = "",
) -> dict[str, str]:
    """By name: hashes of what defines the features and the rows, what the fit was given, and the circumstances.

    A view's is its plan's fingerprint, of a function the hash of its source, of the rows the hash of the module that selects them.
    """
    commit, dirty = code_version(stated_code)
    return {
        **{f"view {name}": plan.fingerprint[:16] for name, plan in sorted(plans.items())},
        **{f"function {f.name}": source_hash(f.function)[:16] for f in functions},
        "rows": _digest(inspect.getsource(inspect.getmodule(spec.rows) or spec.rows)),
        "trainer": spec.trainer,
        "seed": str(spec.seed),
        "quantiles": json.dumps(spec.quantiles),
        PARAMS: json.dumps(dict(params), sort_keys=True),
        "device": resources.device,
        "threads": str(resources.threads),
        "workers": str(resources.workers),
        "code": f"{commit} (changed)" if dirty else commit,
        "packages": _digest("\n".join(sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions()))),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "engine": resources.engine.name,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
