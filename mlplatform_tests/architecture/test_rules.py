"""Rules of the code base that no linter knows, checked over its text."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mlplatform", "serving_app", "feature_definitions")
LINES = 400
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
DAGSTER_MAY = ("mlplatform/orchestration/", "mlplatform/definitions.py")
PICKLES = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
HEAVY = (
    "feast",
    "mlflow",
    "dagster",
    "polars",
    "pandas",
    "torch",
    "xgboost",
    "evidently",
    "great_expectations",
    "matplotlib",
    "optuna",
    "ray",
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.Module) -> Iterator[str]:
    """Top-level names of every package a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.fixture(scope="session")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in MODULES}


def test_every_module_says_what_belongs_there(trees):
    silent = [
        name(path)
        for path, tree in trees.items()
        if path.name != "__init__.py" and not re.search(r"Belongs here", ast.get_docstring(tree) or "")
    ]
    assert not silent


def test_package_files_are_empty_or_documented(trees):
    assert not [name(path) for path, tree in trees.items() if path.name == "__init__.py" and tree.body and ast.get_docstring(tree) is None]


def test_no_module_is_longer_than_one_can_read():
    assert not {name(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > LINES}


def test_only_orchestration_knows_dagster(trees):
    knows = [
        name(path)
        for path, tree in trees.items()
        if {"dagster", "dagster_aws", "dagster_mlflow"} & set(imported(tree)) and not name(path).startswith(DAGSTER_MAY)
    ]
    assert not knows


def test_nothing_is_pickled(trees):
    assert not [name(path) for path, tree in trees.items() if PICKLES & set(imported(tree))]


def test_nothing_of_the_rooms_asks_the_wall_clock(trees):
    rooms = ("ingestion", "validation", "features", "training", "evaluation", "deployment", "monitoring")
    asks = [
        f"{name(path)}:{node.lineno}"
        for path, tree in trees.items()
        if name(path).startswith(tuple(f"mlplatform/{room}/" for room in rooms))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today") and ast.unparse(node.value) in ("datetime", "date")
    ]
    assert not asks


def test_orchestration_evaluates_its_annotations(trees):
    """`from __future__ import annotations` breaks Dagster's configuration and resource parameters."""
    assert not [
        name(path)
        for path, tree in trees.items()
        if name(path).startswith(DAGSTER_MAY) and any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    ]


def test_no_test_imports_another(trees):
    tests = sorted((ROOT / "mlplatform_tests").rglob("*.py"))
    assert not [name(path) for path in tests if "mlplatform_tests" in set(imported(ast.parse(path.read_text())))]


@pytest.mark.parametrize("module", ["mlplatform.cli", "mlplatform.client", "mlplatform.settings", "mlplatform.contracts"])
def test_importing_what_answers_at_once_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_importing_the_service_imports_no_room_and_no_pipeline_library():
    code = """
import sys, serving_app.main
heavy = {"dagster", "feast", "mlflow", "polars", "pandas", "torch", "optuna", "evidently"}
rooms = ("mlplatform.orchestration", "mlplatform.local", "mlplatform.training", "mlplatform.settings")
print(*sorted(n for n in sys.modules if n.split(".")[0] in heavy or n.startswith(rooms)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_the_import_contracts_are_kept():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed beside this Python")
    found = subprocess.run([str(command), "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stdout


# --- what is in the repository ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every text file git would commit; what it ignores is nobody's business."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    files = [ROOT / line for line in listed.stdout.splitlines()]
    return [f for f in files if f.is_file() and f.suffix not in {".png", ".parquet", ".jpg"} and f != Path(__file__)]


def test_no_path_of_a_machine_is_written_down(tracked):
    found = _lines(tracked, re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/(?!\.\.\.)[\w.]"))
    # A container's own folders are the image's, not a machine's.
    assert not [line for line in found if not line.startswith(("deploy/", "docker-compose.yml"))]


def test_packages_come_from_where_the_user_says(tracked):
    """A registry's host in the repository would send every user's installation there."""
    assert not _lines(
        tracked,
        re.compile(
            r"--(extra-)?index-url[ =]+http|PIP_INDEX_URL *= *[\"']?http|https?://[^\s'\"]*(/simple\b|pypi|artifactory|nexus)",
            re.IGNORECASE,
        ),
    )


def test_no_secret_is_written_down(tracked):
    assert not _lines(tracked, re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|ghp_[A-Za-z0-9]{36}"))


def _lines(files: list[Path], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name(file)}:{number}: {line.strip()[:120]}"
        for file in files
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
