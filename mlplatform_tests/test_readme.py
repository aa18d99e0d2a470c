"""What README and the guides say is so: snippets run where they say they belong, links lead somewhere, commands and settings exist."""

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
import typer

from mlplatform.catalog.flights import CATALOG
from mlplatform.cli import app
from mlplatform.contracts import prediction_stream
from mlplatform.features.declared import plans
from mlplatform.features.engine import compute
from mlplatform.settings import Settings
from mlplatform.specs import Catalog
from serving_app.settings import ServingSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
IMPORTS = "from collections.abc import Mapping\n\nimport polars as pl\n"  # those README names beside a snippet
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def snippet(path: str) -> str:
    found = [code for file, code in SNIPPET.findall(README) if file == path]
    assert len(found) == 1, f"README has {len(found)} snippets for {path}"
    return str(found[0])


def with_snippet(path: str, name: str) -> ModuleType:
    """The module at `path` with README's lines at its end, run under another name."""
    module = ModuleType(name)
    exec(compile(f"{IMPORTS}{(ROOT / path).read_text()}\n{snippet(path)}", path, "exec"), vars(module))  # noqa: S102  # our own text
    return module


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Catalog, str]]:
    """The flights catalog with all that README adds, and the name of its feature package."""
    sources = with_snippet("mlplatform/catalog/flights/sources.py", "readme_sources")
    models = with_snippet("mlplatform/catalog/flights/models.py", "readme_models")
    folder = tmp_path_factory.mktemp("readme") / "readme_features"
    folder.mkdir()
    for file in ("views.py", "recipes.py"):
        path = f"feature_definitions/flights/{file}"
        (folder / file).write_text(f"{(ROOT / path).read_text()}\n{snippet(path)}")
    (folder / "__init__.py").touch()
    sys.path.insert(0, str(folder.parent))
    yield CATALOG.model_copy(update={"sources": sources.SOURCES, "models": models.MODELS}), "readme_features"
    sys.path.remove(str(folder.parent))


def test_the_source_and_the_model_of_the_readme_become_assets(extended: tuple[Catalog, str]) -> None:
    from mlplatform.orchestration.build import build

    catalog, _ = extended
    keys = {key.to_user_string() for key in build([catalog]).resolve_asset_graph().get_all_asset_keys()}
    source = {"raw/runway_closures", "validated/runway_closures", "quarantine/runway_closures"}
    model = {f"{stage}/flight_very_late" for stage in ("training_set", "model", "evaluation", "deployment", "performance")}
    assert source | model <= keys


@pytest.mark.parametrize("path", [path for path, _ in SNIPPET.findall(README)])
def test_a_module_with_its_snippet_passes_the_projects_own_checks(path: str, tmp_path: Path) -> None:
    # As a person adds it: imports at the top, the lines at the end.
    head, _, body = (ROOT / path).read_text().partition('"""\n\n')
    missing = "".join(f"{line}\n" for line in IMPORTS.splitlines() if line and line not in body)
    changed = tmp_path / Path(path).name
    changed.write_text(f'{head}"""\n\n{missing}{body}\n\n{snippet(path)}')
    config = ["--config", str(ROOT / "pyproject.toml")]
    subprocess.run([sys.executable, "-m", "ruff", "check", "--fix", "--quiet", *config, str(changed)], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *config, str(changed)], check=True)
    shadow = [
        sys.executable,
        "-m",
        "mypy",
        "--shadow-file",
        str(ROOT / path),
        str(changed),
        "-m",
        path.removesuffix(".py").replace("/", "."),
    ]
    types = subprocess.run(shadow, cwd=ROOT, capture_output=True, text=True, check=False)
    assert types.returncode == 0, types.stdout


def test_the_feature_of_the_readme_has_the_values_one_expects(extended: tuple[Catalog, str]) -> None:
    plan = plans(extended[1])["origin_closures"]
    assert plan.features == ("origin_closures_3h", "origin_closures_24h")
    noon = datetime(2013, 9, 1, 12, tzinfo=UTC)
    closures = pl.DataFrame(
        {
            "origin": ["EWR", "EWR", "JFK"],
            "closed_at": pl.Series([noon - timedelta(hours=n) for n in (0, 3, 30)], dtype=pl.Datetime("us", "UTC")),
            "runways": [1, 2, 4],
        }
    )
    rows = compute(plan, {"runway_closures": closures}, noon, noon)
    # A window is half-open: what happened exactly 3 hours ago is out. JFK's closure was 30 hours ago.
    assert rows.rows() == [("EWR", noon, 1.0, 3.0)]


def test_the_rows_of_the_readmes_model_carry_its_own_label(extended: tuple[Catalog, str]) -> None:
    catalog, _ = extended
    model = next(m for m in catalog.models if m.name == "flight_very_late")
    due = datetime(2013, 9, 1, 12, tzinfo=UTC)
    flights = {
        "flight_id": ["a", "b", "c"],
        "carrier": ["UA"] * 3,
        "flight": [1, 2, 3],
        "origin": ["EWR"] * 3,
        "dest": ["IAH"] * 3,
        "scheduled_departure": [due] * 3,
        "scheduled_arrival": [due + timedelta(hours=4)] * 3,
        "distance_miles": [1400.0] * 3,
    }
    schema = {"scheduled_departure": pl.Datetime("us", "UTC"), "scheduled_arrival": pl.Datetime("us", "UTC")}
    schedules = pl.DataFrame(flights, schema_overrides=schema)
    outcomes = {"flight_id": ["a", "b"], "status": ["arrived"] * 2, "arrival_delay_min": [61.0, 20.0], "known_at": [due] * 2}
    arrivals = pl.DataFrame(outcomes, schema_overrides={"known_at": pl.Datetime("us", "UTC")})
    rows = model.rows({"schedules": schedules, "arrivals": arrivals})
    assert dict(rows.select("flight_id", "label").iter_rows()) == {"a": 1, "b": 0, "c": None}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists(page: Path) -> None:
    text = page.read_text()
    command = typer.main.get_command(app)
    known = set(command.commands)  # type: ignore[attr-defined]  # the top command is a group
    named = set(re.findall(r"`(?:\.venv/bin/)?mlplatform ([a-z]+)", text)) | set(
        re.findall(r"^(?:\.venv/bin/)?mlplatform ([a-z]+)", text, re.MULTILINE)
    )
    assert named <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_of_a_page_exists(page: Path) -> None:
    fields = {f"MLPLATFORM_{name.upper()}" for settings in (Settings, ServingSettings) for name in settings.model_fields}
    named = set(re.findall(r"MLPLATFORM_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
    others = {"MLPLATFORM_DEBUG"}  # read by the command line itself
    prefixes = {name for name in named if any(field.startswith(f"{name}_") for field in fields)}
    assert named - fields - others - prefixes == set()


def test_the_names_in_the_guide_for_applications_are_those_of_the_client() -> None:
    guide = (ROOT / "docs" / "guide-application.md").read_text()
    client = import_module("mlplatform.client")
    for name in re.findall(r"from mlplatform\.client import ([A-Za-z, ]+)", guide):
        assert all(hasattr(client, one.strip()) for one in name.split(","))
    assert prediction_stream("flight_disruption").startswith("mlplatform:predictions:")
