"""Reads a feature package's Feast declarations and recipes into plain plans, and refuses what does not fit together.

Belongs here: the one place outside the feature store that looks into Feast objects. Feast is imported inside, because
importing it takes seconds. Does not belong here: computing anything.
"""

import hashlib
import importlib
import inspect
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mlplatform.features.plan import FeatureError, ViewPlan, WindowPlan, microseconds
from mlplatform.specs import FeatureRecipe

if TYPE_CHECKING:
    from feast import FeatureView

FUNCTIONS = ("sum", "count", "mean", "min", "max")


class DeclarationError(FeatureError):
    """A view's declaration and its recipe disagree; names the view and what to mend."""


def plans(package: str) -> dict[str, ViewPlan]:
    """The plan of each stored view of a feature package (such as `feature_definitions.flights`), by view name.

    Reads the Feast views in `<package>.views` and `RECIPES` in `<package>.recipes`. Raises DeclarationError.
    """
    from feast import FeatureView

    views_module = importlib.import_module(f"{package}.views")
    recipes_module = importlib.import_module(f"{package}.recipes")
    views = {v.name: v for v in vars(views_module).values() if isinstance(v, FeatureView)}
    recipes: dict[str, FeatureRecipe] = {}
    for recipe in recipes_module.RECIPES:
        if recipe.view in recipes:
            raise DeclarationError(f"view {recipe.view}: RECIPES of {package}.recipes has two recipes for it; keep one")
        recipes[recipe.view] = recipe
    if orphans := sorted(set(recipes) - set(views)):
        raise DeclarationError(f"{package}.recipes has recipes for {orphans}, but {package}.views declares no such view: add or drop it")
    if bare := sorted(set(views) - set(recipes)):
        raise DeclarationError(f"{package}.views declares {bare} without a recipe: add one to RECIPES in {package}.recipes")
    source = inspect.getsource(recipes_module)
    found = {name: _plan(view, recipes[name], source) for name, view in views.items()}
    _check_names(found)
    return found


def _plan(view: "FeatureView", recipe: FeatureRecipe, source: str) -> ViewPlan:
    join_keys = tuple(sorted(column.name for column in view.entity_columns))
    if len(join_keys) != len(view.entities):
        raise DeclarationError(f"view {view.name}: its schema must name each join key of its entities {list(view.entities)}")
    if any(str(f.dtype) != "Float64" for f in view.features):
        raise DeclarationError(f"view {view.name}: every stored feature is a Float64, not {sorted({str(f.dtype) for f in view.features})}")
    if not view.ttl:
        raise DeclarationError(f"view {view.name}: declare a ttl, or a value is served however old it is")
    if view.ttl < recipe.cadence:
        raise DeclarationError(
            f"view {view.name}: its ttl {view.ttl} is shorter than its cadence {recipe.cadence}; values would expire too soon"
        )
    features = tuple(f.name for f in view.features)
    aggregations = tuple(
        WindowPlan(a.column, a.function, a.time_window, a.resolved_name(a.time_window)) for a in getattr(view, "aggregations", ())
    )
    hop = _hop(view, aggregations)
    _check_recipe(view.name, recipe, features, aggregations, hop)
    return ViewPlan(
        name=view.name,
        join_keys=join_keys,
        features=features,
        ttl=view.ttl,
        description=view.description,
        owner=view.owner,
        recipe=recipe,
        aggregations=aggregations,
        hop=hop,
        tags=dict(view.tags),
        feature_descriptions={f.name: f.description for f in view.features},
        feature_units={f.name: f.tags["unit"] for f in view.features if "unit" in f.tags},
        fingerprint=_fingerprint(view.name, join_keys, features, view.ttl, aggregations, hop, recipe, source),
    )


def _hop(view: "FeatureView", aggregations: tuple[WindowPlan, ...]) -> timedelta | None:
    if not aggregations:
        return None
    # Only a stream feature view has aggregations, and its tiling stands beside them.
    stream: Any = view
    if not stream.enable_tiling or not stream.tiling_hop_size:
        raise DeclarationError(
            f"view {view.name}: the tails of its windows move hop by hop; declare enable_tiling=True and tiling_hop_size"
        )
    hop: timedelta = stream.tiling_hop_size
    return hop


def _check_recipe(
    name: str, recipe: FeatureRecipe, features: tuple[str, ...], aggregations: tuple[WindowPlan, ...], hop: timedelta | None
) -> None:
    if unknown := sorted(set(recipe.defaults) - set(features)):
        raise DeclarationError(f"view {name}: its recipe gives defaults for {unknown}, which are no features of the view")
    if (recipe.events is not None) != bool(aggregations):
        raise DeclarationError(
            f"view {name}: aggregations are declared exactly where the recipe gives events; "
            + ("declare aggregations" if recipe.events is not None else "give the recipe events in place of compute")
        )
    if hop is None:
        return
    _check_windows(name, recipe, aggregations, hop)
    missing = sorted(set(features) - {a.name for a in aggregations})
    if missing and recipe.finish is None:
        raise DeclarationError(f"view {name}: nobody computes {missing}; add an aggregation of that name, or a finish to its recipe")


def _check_windows(name: str, recipe: FeatureRecipe, aggregations: tuple[WindowPlan, ...], hop: timedelta) -> None:
    names = [a.name for a in aggregations]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DeclarationError(f"view {name}: two aggregations are named {twice}; rename one")
    for a in aggregations:
        if a.function not in FUNCTIONS:
            raise DeclarationError(f"view {name}: {a.name} uses {a.function!r}; the engine computes {', '.join(FUNCTIONS)}")
        if a.window is None and a.function != "sum":
            raise DeclarationError(f"view {name}: {a.name} has no time_window, which only a sum may leave out (a running sum)")
        if a.window is not None and microseconds(a.window) % microseconds(hop):
            raise DeclarationError(f"view {name}: {a.name}'s window {a.window} is no multiple of the hop {hop}")
    # Between ticks there are no rows, unless an event triggers them.
    if recipe.trigger == "cadence" and microseconds(recipe.cadence) % microseconds(hop):
        raise DeclarationError(f"view {name}: its cadence {recipe.cadence} is no multiple of the hop {hop}; lower tiling_hop_size")
    longest = max((a.window for a in aggregations if a.window is not None), default=None)
    if longest is None:
        raise DeclarationError(f"view {name}: it has running sums only; a time_window must say how long an entity lives")
    if max(recipe.inputs.values()) < longest:
        raise DeclarationError(
            f"view {name}: its longest window is {longest}, but no input of its recipe looks back that far; raise a lookback"
        )


def _check_names(found: dict[str, ViewPlan]) -> None:
    """Feast joins views side by side under bare feature names, so a name belongs to one view."""
    owner: dict[str, str] = {}
    for plan in found.values():
        for feature in plan.features:
            if feature in owner:
                raise DeclarationError(f"views {owner[feature]} and {plan.name} both have a feature {feature}; rename one")
            owner[feature] = plan.name


def _fingerprint(*parts: object) -> str:
    """Changes with the declaration and with any line of the recipes' module."""
    *declared, recipe, source = parts
    assert isinstance(recipe, FeatureRecipe)
    recipe_values = (sorted(recipe.inputs.items()), recipe.cadence, recipe.trigger, sorted(recipe.defaults.items()), recipe.on_stale)
    return hashlib.sha256(repr((declared, recipe_values, source)).encode()).hexdigest()
