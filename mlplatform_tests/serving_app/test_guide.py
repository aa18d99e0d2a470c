"""The guide for applications: each of its commands and programs runs, and each route has a command."""

import hashlib
import io
import re
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xgboost as xgb

from feature_definitions.flights.request_functions import REQUEST_FUNCTIONS
from mlplatform.catalog.flights import CATALOG
from mlplatform.contracts import CONTRACT_FILE, ServingContract, source_hash
from mlplatform.features.declared import plans
from mlplatform.training.contract import function_path, json_number, view_layout

GUIDE = (Path(__file__).parents[2] / "docs" / "guide-application.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
# Of what is served, these are for browsers and for MLflow.
NOT_FOR_APPLICATIONS = {"/v1/hooks/mlflow"}


@pytest.fixture
def client(tmp_path, open_service) -> httpx.Client:
    """`flight_disruption` with the demo's own fields, functions and views; its trees know nothing of flights."""
    [spec] = [model for model in CATALOG.models if model.name == "flight_disruption"]
    views = list(plans(CATALOG.feature_package).values())
    named = [(name, "view", view.name) for view in views for name in view.features]
    named += [(name, "request", function_path(f)) for f in REQUEST_FUNCTIONS for name in f.outputs]
    names = [name for name, _, _ in named] + list(spec.categorical)
    rows = np.random.default_rng(0).normal(size=(200, len(names)))
    booster = xgb.train({"nthread": 1, "objective": "binary:logistic"}, xgb.DMatrix(rows, rows[:, 0] > 0, feature_names=names), 3)
    raw = bytes(booster.save_raw("ubj"))
    contract = ServingContract(
        model=spec.name,
        task="binary",
        description=spec.description,
        framework="xgboost",
        model_file="model.ubj",
        model_sha256=hashlib.sha256(raw).hexdigest(),
        project="flights",
        fields=[field.model_dump() for field in spec.request_fields],
        views=[view_layout(view.name, view.join_keys, view.features, view.ttl, view.recipe) for view in views],
        functions=[
            {"path": function_path(f), "inputs": f.inputs, "outputs": f.outputs, "source_hash": source_hash(f.function)}
            for f in REQUEST_FUNCTIONS
        ],
        features=[
            *({"name": name, "kind": kind, "source": source, "column": name} for name, kind, source in named),
            *({"name": n, "kind": "category", "source": n, "column": n, "categories": ["UA", "EWR", "IAH"]} for n in spec.categorical),
        ],
        threshold=0.5,
        training_set_hash="t",
        example_features=[[json_number(v) for v in row] for row in rows[:4]],
        example_predictions=[float(p) for p in booster.predict(xgb.DMatrix(rows[:4], feature_names=names))],
    )
    folder = tmp_path / "serving" / "models" / spec.name / "1"
    folder.mkdir(parents=True)
    (folder / "model.ubj").write_bytes(raw)
    (folder / CONTRACT_FILE).write_text(contract.canonical_json())
    (folder / "origin.json").write_text('{"source": "test"}')
    (folder.parent / "serving.json").write_text('{"version": 1, "source": "test"}')
    opened: httpx.Client = open_service()
    return opened


def test_every_command_is_answered(client, tmp_path) -> None:
    loud = 'set -euo pipefail\ncurl() { command curl --silent --show-error --fail-with-body "$@"; echo; }\n'
    for block in SHELL:
        script = loud + block.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
    explained = [block for block in SHELL if "explain=true" in block]
    assert len(explained) == 1


def test_every_program_runs(client, tmp_path) -> None:
    assert len(PYTHON) == 4
    for program in PYTHON:
        text = io.StringIO()
        source = program.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}").replace('"8000/', f'"{client.base_url.port}/')
        with redirect_stdout(text):
            exec(compile(source, "guide-application.md", "exec"), {"__name__": "guide"})  # noqa: S102  # our own text
        assert re.search(r"0\.\d+", text.getvalue()), program


def test_every_route_has_a_command(client) -> None:
    asked = {re.sub(r"\?.*", "", path) or "/" for path in re.findall(r"curl '?http://127\.0\.0\.1:8000([^\s']*)", GUIDE)}
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    patterns = {path: re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) + "$") for path in paths}
    assert {path for path, pattern in patterns.items() if not any(map(pattern.match, asked))} == NOT_FOR_APPLICATIONS
    assert asked - {a for a in asked if any(pattern.match(a) for pattern in patterns.values())} == {"/openapi.json"}


def test_every_kind_of_problem_an_application_may_meet_is_in_the_guide() -> None:
    service = Path(__file__).parents[2] / "serving_app"
    source = "".join(path.read_text() for path in sorted(service.rglob("*.py")) if path.name != "hooks.py")
    kinds = set(re.findall(r'(?:ProblemError|unavailable|_refuse)\(\s*(?:\d{3}, |\d{3},\s+)?"([a-z-]+)"|[45]\d\d[,:] "([a-z-]+)"', source))
    found = {kind for pair in kinds for kind in pair if kind}
    assert {"overloaded", "rate-limited", "head-too-slow", "model-not-found", "version-not-loaded", "method-not-allowed"} <= found
    assert sorted(kind for kind in found if f"`{kind}`" not in GUIDE) == []
