"""What the command line tells of feature views and of tables' fingerprints, as plain JSON-able values.

Belongs here: reading declarations and the lake for `mlplatform features` and `mlplatform fingerprint`. Does not belong here:
printing (`cli_features`), the other questions (`queries`). Heavy libraries are imported by the question that needs them.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlplatform.queries import QuestionError

if TYPE_CHECKING:
    from mlplatform.clients.lake import Lake
    from mlplatform.features.consumers import Consumer
    from mlplatform.features.plan import ViewPlan
    from mlplatform.settings import Settings


def views(settings: "Settings", now: datetime) -> list[dict[str, Any]]:
    """Every declared view with its newest value and its consumers. Imports Feast (seconds)."""
    lake = _lake(settings)
    return [_view(plan, used_by) | _state(lake, plan, now) for plan, used_by in _declared(settings).values()]


def view(settings: "Settings", name: str, now: datetime) -> dict[str, Any]:
    """One view: what `views` tells of it, and of each feature its declaration and its values over the last days.

    Raises QuestionError for a name nobody declares.
    """
    plan, used_by = _declaration(settings, name)
    lake = _lake(settings)
    state = _state(lake, plan, now)
    profiles = _profiles(lake, plan, now) if state["newest_value"] is not None else {}
    inputs = {source: lookback.total_seconds() for source, lookback in plan.recipe.inputs.items()}
    features = [_feature(plan, feature) | profiles.get(feature, {}) for feature in plan.features]
    return {**_view(plan, used_by), "inputs_lookback_s": inputs, **state, "features": features}


def plan_of(settings: "Settings", name: str) -> "ViewPlan":
    """The plan of a declared view. Raises QuestionError for a name nobody declares."""
    return _declaration(settings, name)[0]


def _declaration(settings: "Settings", name: str) -> "tuple[ViewPlan, Sequence[Consumer]]":
    declared = _declared(settings)
    if name not in declared:
        raise QuestionError(f"no view '{name}' is declared: choose one of {', '.join(sorted(declared))}")
    return declared[name]


def fingerprint(settings: "Settings", table: str, version: int | None, verify: bool) -> dict[str, Any]:
    """The fingerprint of a table of the lake (`offline/origin_weather`), at a Delta version or the newest.

    `recorded` is what the commits (or a training set's manifest) say, None where they say nothing; `computed` is from the
    rows, read where `verify` asks for it or nothing is recorded. Raises QuestionError, MissingTableError.
    """
    from mlplatform.clients import fingerprints

    key = tuple(table.split("/"))
    # A name of the lake, never a way out of it.
    if len(key) != 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in key):
        raise QuestionError(f"'{table}' is no table of the lake: write STAGE/NAME, as offline/origin_weather")
    lake = _lake(settings)
    newest = lake.version(key)
    if version is not None and not 0 <= version <= newest:
        raise QuestionError(f"{table} has no version {version}: its versions go from 0 to {newest}")
    at = newest if version is None else version
    recorded, source = _recorded(lake, key, at)
    computed = fingerprints.computed(lake, key, at).hash if verify or recorded is None else None
    return {
        "table": table,
        "version": at,
        "fingerprint": computed or recorded,
        "recorded": recorded,
        "recorded_in": source,
        "computed": computed,
        "matches": None if recorded is None or computed is None else recorded == computed,
    }


def _recorded(lake: "Lake", key: tuple[str, ...], version: int) -> tuple[str | None, str | None]:
    """(hash, where it is recorded)."""
    from mlplatform.clients import fingerprints
    from mlplatform.training.dataset import MANIFEST

    if (found := fingerprints.recorded(lake, key, version)) is not None:
        return found.hash, "commits"
    commit = next((c for c in lake.commits(key) if c["version"] == version), {})
    if MANIFEST in commit:
        return str(json.loads(commit[MANIFEST])["content_hash"]), "manifest"
    return None, None


def _lake(settings: "Settings") -> "Lake":
    from mlplatform.clients.lake import Lake

    return Lake(settings.lake_root, settings.storage_options())


def _declared(settings: "Settings") -> dict[str, tuple["ViewPlan", Sequence["Consumer"]]]:
    """Every declared view of every catalog, with who uses it."""
    # The declarations read their tables' place from the environment.
    from feature_definitions.environment import feast_environment
    from mlplatform.catalog.discover import catalogs
    from mlplatform.features.consumers import consumers, services
    from mlplatform.features.declared import plans

    os.environ.update(feast_environment(settings))
    found: dict[str, tuple[ViewPlan, Sequence[Consumer]]] = {}
    for catalog in catalogs():
        declared = services(catalog.feature_package)
        for name, plan in plans(catalog.feature_package).items():
            found[name] = plan, consumers(name, declared, catalog.models)
    return found


def _view(plan: "ViewPlan", used_by: Sequence["Consumer"]) -> dict[str, Any]:
    return {
        "view": plan.name,
        "keys": list(plan.join_keys),
        "features": len(plan.features),
        "trigger": plan.recipe.trigger,
        "every_s": plan.cadence.total_seconds(),
        "propagation_s": plan.recipe.propagation_budget.total_seconds(),
        "ttl_s": plan.ttl.total_seconds(),
        "when_stale": plan.recipe.on_stale,
        "owner": plan.owner,
        "description": plan.description,
        "consumers": [
            {"model": c.model, "service": c.service, "features": list(c.features), "left_out": list(c.left_out)} for c in used_by
        ],
    }


def _feature(plan: "ViewPlan", name: str) -> dict[str, Any]:
    from mlplatform.features.plan import computed_as

    return {
        "feature": name,
        "unit": plan.feature_units.get(name, ""),
        "computed_as": computed_as(plan, name),
        "default": plan.recipe.defaults.get(name),
        "description": plan.feature_descriptions.get(name, ""),
    }


def _state(lake: "Lake", plan: "ViewPlan", now: datetime) -> dict[str, Any]:
    """How the view's table is doing at `now`; `note` says why there is no newest value, and is None where there is one."""
    import polars as pl

    from mlplatform.features.plan import TIME
    from mlplatform.features.profile import recent_days

    key = ("offline", plan.name)
    state: dict[str, Any] = {"newest_value": None, "age_s": None, "rows": None, "note": None}
    if not lake.exists(key):
        return state | {"note": "no table yet"}
    state["rows"] = lake.row_count(key)
    days = recent_days(now)
    known = lake.scan(key, days).filter(pl.max_horizontal(TIME, "created") <= pl.lit(now))
    newest = known.select(pl.col(TIME).max()).collect().item()
    if newest is None:
        return state | {"note": f"none since {days.first}"}
    assert isinstance(newest, datetime)
    return state | {"newest_value": newest.isoformat(), "age_s": (now - newest).total_seconds()}


def _profiles(lake: "Lake", plan: "ViewPlan", now: datetime) -> Mapping[str, dict[str, Any]]:
    """Per feature what its values over the last days look like."""
    from mlplatform.features.profile import QUANTILES, newest_versions, profile, recent_days
    from mlplatform.features.restate import with_features

    stored = with_features(lake.read(("offline", plan.name), recent_days(now)), plan.features)
    rows = newest_versions(stored, plan.join_keys, plan.features, now)
    return {
        p.feature: {
            "rows": p.rows,
            "null_share": p.null_share,
            "quantiles": dict(zip((f"{q:g}" for q in QUANTILES), p.quantiles, strict=True)) if p.quantiles else None,
            "histogram": {"from": p.edges[0], "to": p.edges[1], "counts": list(p.counts)} if p.counts else None,
        }
        for p in profile(rows, plan.features)
    }
