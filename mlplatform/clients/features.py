"""Opening the Feast feature store of this repository with the platform's settings.

Belongs here: the repository's place and the variables its `feature_store.yaml` names. Does not belong here: the stores
themselves (`mlplatform.feature_store`).
"""

import importlib
import importlib.util
import os
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from mlplatform.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

REPOSITORY = "feature_definitions"


def repository() -> Path:
    """The folder with `feature_store.yaml`. Raises LookupError where the package is not installed."""
    spec = importlib.util.find_spec(REPOSITORY)
    if spec is None or spec.origin is None:
        raise LookupError(f"package {REPOSITORY} is not installed: run `make install` in the repository")
    return Path(spec.origin).parent


def open_store(settings: Settings) -> "FeatureStore":
    """Feast's store over our two plug-ins. Sets the variables its configuration names, in this process."""
    os.environ.update(importlib.import_module(f"{REPOSITORY}.environment").feast_environment(settings))
    if "://" not in settings.feast_registry_path:
        Path(settings.feast_registry_path).parent.mkdir(parents=True, exist_ok=True)
    from feast import FeatureStore

    return FeatureStore(repo_path=str(repository()))


def declared_objects(package: str) -> list[object]:
    """Every Feast object of a feature package, as `feast apply` would find them: module attributes of all its modules."""
    from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView
    from feast.data_source import DataSource

    found: dict[int, object] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Entity | FeatureView | OnDemandFeatureView | FeatureService | DataSource):
                found[id(value)] = value
    return list(found.values())
