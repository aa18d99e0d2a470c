"""Opening the Feast feature store of this repository with the platform's settings.

Belongs here: the repository's place and the variables its `feature_store.yaml` names. Does not belong here: the stores
themselves (`mlplatform.feature_store`).
"""

import importlib
import importlib.util
import os
import pkgutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mlplatform.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

REPOSITORY = "feature_definitions"

# Feast 0.67 says so each time a view is read from the registry, of the two kinds of views our features are made of. What it warns
# of does not concern us: it only keeps their declarations, and our own stores and engine do the work.
_EXPERIMENTAL = ("Stream feature views are experimental", "On demand feature view is an experimental feature")


def repository() -> Path:
    """The folder with `feature_store.yaml`. Raises LookupError where the package is not installed."""
    spec = importlib.util.find_spec(REPOSITORY)
    if spec is None or spec.origin is None:
        raise LookupError(f"package {REPOSITORY} is not installed: run `make install` in the repository")
    return Path(spec.origin).parent


def open_store(settings: Settings) -> "FeatureStore":
    """Feast's store over our two plug-ins. Sets the variables its configuration names, and filters two warnings, in this process.

    Asking it for a view or feature nobody declared raises `feast_store.UnknownFeatureError`.
    """
    os.environ.update(importlib.import_module(f"{REPOSITORY}.environment").feast_environment(settings))
    if "://" not in settings.feast_registry_path:
        Path(settings.feast_registry_path).parent.mkdir(parents=True, exist_ok=True)
    from mlplatform.clients.feast_store import NamingFeatureStore

    # After the import: Feast sets filters of its own while it is imported, and the last one set is asked first.
    for kind in _EXPERIMENTAL:
        warnings.filterwarnings("ignore", message=kind, category=RuntimeWarning)
    return NamingFeatureStore(repo_path=str(repository()))


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
