"""What `feast -c feature_definitions …` reads: the Feast objects of every feature package, each once.

Belongs here: collecting them. Does not belong here: declaring any. Left to itself, Feast imports every file under a second name
(`flights.views` beside `feature_definitions.flights.views`) and finds each view twice, which `feast plan` refuses; so
`.feastignore` leaves it this file alone.
"""

import importlib
import pkgutil
from collections.abc import Iterator

from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView
from feast.data_source import DataSource

import feature_definitions


def _objects() -> Iterator[tuple[str, object]]:
    for package in pkgutil.iter_modules(feature_definitions.__path__, "feature_definitions."):
        if not package.ispkg:
            continue
        for module in pkgutil.iter_modules(importlib.import_module(package.name).__path__, f"{package.name}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, Entity | FeatureView | OnDemandFeatureView | FeatureService | DataSource):
                    yield f"{module.name}.{name}", value


# Feast takes the attributes of the module, whatever they are called.
globals().update(_objects())
