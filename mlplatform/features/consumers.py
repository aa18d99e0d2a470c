"""Who uses a view: the feature services that name it and the models behind them.

Belongs here: reading the services a feature package declares, and matching them with models. Does not belong here: views
(`declared`). Feast is imported inside, because importing it takes seconds.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlplatform.specs import ModelSpec

# Service name → view name → the features it takes of it.
Services = Mapping[str, Mapping[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Consumer:
    """A feature service that takes `features` of a view, and a model behind it; `model` is None where nothing uses the service.

    `left_out` are those of the features which the model declares that it does not take.
    """

    service: str
    model: str | None
    features: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model or 'no model'} ({self.service})"


def services(package: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """The feature services in `<package>.services`, each with its views' features. Empty for a package without services."""
    from feast import FeatureService

    name = f"{package}.services"
    if importlib.util.find_spec(name) is None:
        return {}
    declared = [s for s in vars(importlib.import_module(name)).values() if isinstance(s, FeatureService)]
    return {s.name: {p.name: tuple(f.name for f in p.features) for p in s.feature_view_projections} for s in declared}


def consumers(view: str, declared: Services, models: Sequence[ModelSpec]) -> tuple[Consumer, ...]:
    """Who takes features of the view, by service and model name."""
    found: list[Consumer] = []
    for service, views in sorted(declared.items()):
        if view not in views:
            continue
        users = sorted((m for m in models if m.feature_service == service), key=lambda m: m.name)
        found += [Consumer(service, m.name, views[view], tuple(f for f in views[view] if f in m.left_out)) for m in users]
        if not users:
            found.append(Consumer(service, None, views[view]))
    return tuple(found)
