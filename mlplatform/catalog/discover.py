"""Finding every catalog of the installation: each module of this package that has a `CATALOG`.

Belongs here: looking, and refusing what contradicts itself. Does not belong here: any use case by name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable

from mlplatform import catalog
from mlplatform.specs import Catalog


class CatalogError(ValueError):
    """Catalogs contradict each other, or refer to what nobody declares."""


def catalogs() -> tuple[Catalog, ...]:
    """Every `CATALOG` in the modules and packages directly under `mlplatform.catalog`, by name.

    A module without one is left alone. Raises `CatalogError` where two declare a catalog, source or model of the same
    name, or a contract refers to a source that no catalog has; an import error of a catalog is the caller's to see.
    """
    found = []
    for module in sorted(pkgutil.iter_modules(catalog.__path__, f"{catalog.__name__}."), key=lambda m: m.name):
        if module.name == __name__:
            continue
        declared = getattr(importlib.import_module(module.name), "CATALOG", None)
        if declared is None:
            continue
        if not isinstance(declared, Catalog):
            raise CatalogError(f"{module.name}.CATALOG is a {type(declared).__name__}, not a Catalog")
        found.append(declared)
    return checked(found)


def checked(found: Iterable[Catalog]) -> tuple[Catalog, ...]:
    """The catalogs by name, after looking for contradictions. Raises `CatalogError`."""
    ordered = tuple(sorted(found, key=lambda c: c.name))
    kinds: dict[str, Callable[[Catalog], list[str]]] = {
        "catalog": lambda c: [c.name],
        "source": lambda c: [s.name for s in c.sources],
        "model": lambda c: [m.name for m in c.models],
    }
    for kind, names_of in kinds.items():
        _refuse_twice(kind, [(name, c.name) for c in ordered for name in names_of(c)])
    _refuse_unknown(ordered)
    return ordered


def _refuse_twice(kind: str, named: list[tuple[str, str]]) -> None:
    owners: dict[str, list[str]] = {}
    for name, owner in named:
        owners.setdefault(name, []).append(owner)
    if twice := [f"'{name}' (in {', '.join(where)})" for name, where in owners.items() if len(where) > 1]:
        raise CatalogError(f"declared twice: {kind} {'; '.join(twice)}")


def _refuse_unknown(ordered: tuple[Catalog, ...]) -> None:
    sources = {source.name: source for c in ordered for source in c.sources}
    for source in sources.values():
        wanted = [(r.source, r.to) for r in source.contract.references] + [(c.source, (*c.columns, c.at)) for c in source.contract.coverage]
        for name, columns in wanted:
            if name not in sources:
                raise CatalogError(f"source '{source.name}' refers to '{name}', which nobody declares")
            declared = {column.name for column in sources[name].contract.columns}
            if unknown := sorted(set(columns) - declared):
                raise CatalogError(f"source '{source.name}' refers to columns '{name}' does not have: {', '.join(unknown)}")
