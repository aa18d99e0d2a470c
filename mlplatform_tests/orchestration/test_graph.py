"""The whole asset graph against a committed snapshot: a change of it is a decision, seen in the review of `graph.json`.

Renew it with:  MLPLATFORM_RENEW_GRAPH=1 .venv/bin/python -m pytest mlplatform_tests/orchestration/test_graph.py
"""

import json
import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

SNAPSHOT = Path(__file__).with_name("graph.json")
RENEW = "MLPLATFORM_RENEW_GRAPH"
STAGES = (
    *("raw", "validated", "quarantine", "feature_registry", "offline", "online", "training_set", "tuning", "model", "evaluation"),
    *("deployment", "predictions", "outcomes", "canary", "shadow", "experiment", "performance", "data_drift", "prediction_drift", "skew"),
)


@pytest.fixture(scope="session")
def graph(definitions: dg.Definitions) -> Any:
    return definitions.resolve_asset_graph()


def described(graph: Any) -> dict[str, dict[str, Any]]:
    """What of the graph is fixed: by asset key, in a stable order."""
    found = {}
    for key in sorted(graph.get_all_asset_keys(), key=lambda k: k.path):
        node = graph.get(key)
        condition = node.automation_condition
        checks = sorted(graph.get_check_keys_for_assets({key}), key=lambda c: c.name)
        found[key.to_user_string()] = {
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "owners": list(node.owners),
            "deps": sorted(k.to_user_string() for k in node.parent_keys),
            "daily": node.partitions_def is not None,
            "checks": [f"{c.name} (blocking)" if graph.get_check_spec(c).blocking else c.name for c in checks],
            "automation": None if condition is None else condition.get_label() or str(condition.name),
        }
    return found


def test_the_graph_is_the_committed_one(graph):
    now = described(graph)
    if os.environ.get(RENEW):
        SNAPSHOT.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n")
    kept = json.loads(SNAPSHOT.read_text())
    changed = [
        f"{key}: {'new' if key not in kept else 'gone' if key not in now else _differences(kept[key], now[key])}"
        for key in sorted({*kept, *now})
        if kept.get(key) != now.get(key)
    ]
    assert not changed, (
        "the asset graph is not the committed one:\n  "
        + "\n  ".join(changed)
        + f"\nIf that is meant, renew {SNAPSHOT.name}: {RENEW}=1 python -m pytest mlplatform_tests/orchestration/test_graph.py"
    )


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {kept.get(name)}, is {now.get(name)}" for name in sorted({*kept, *now}) if kept.get(name) != now.get(name)
    )


def test_every_asset_says_what_it_is_and_whose(graph):
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.kinds, key


def test_keys_are_a_stage_and_a_name(graph):
    for key in graph.get_all_asset_keys():
        assert len(key.path) == 2
        assert key.path[0] in STAGES


def test_nothing_depends_on_a_later_stage(graph):
    order = {stage: number for number, stage in enumerate(STAGES)}
    for key in graph.get_all_asset_keys():
        for parent in graph.get(key).parent_keys:
            assert order[parent.path[0]] <= order[key.path[0]], f"{parent} above {key}"


def test_tables_have_a_column_schema(graph):
    for key in graph.get_all_asset_keys():
        if key.path[0] in ("validated", "quarantine", "offline"):
            assert "dagster/column_schema" in graph.get(key).metadata, key


def test_what_lies_below_a_gate_waits_for_it(graph):
    """Plain `eager()` would run past a failed blocking check at the next tick."""
    for key in graph.get_all_asset_keys():
        condition = graph.get(key).automation_condition
        gated = any(graph.get_check_spec(c).blocking for p in graph.get(key).parent_keys for c in graph.get_check_keys_for_assets({p}))
        if condition is not None and gated:
            assert "all_deps_blocking_checks_passed" in repr(condition), key


def test_backfills_of_daily_assets_are_one_run(definitions):
    for asset in definitions.resolve_all_asset_specs():
        if asset.partitions_def is not None:
            node = definitions.resolve_asset_graph().get(asset.key)
            assert node.backfill_policy == dg.BackfillPolicy.single_run(), asset.key
