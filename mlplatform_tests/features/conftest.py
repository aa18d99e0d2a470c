"""The real year for the flight views, one copy per session; and feature packages of a test's own."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from textwrap import dedent

import polars as pl
import pytest

from mlplatform.features.declared import plans
from mlplatform.features.plan import ViewPlan
from mlplatform.local.nycflights import load_world


@pytest.fixture(scope="session")
def year() -> Mapping[str, pl.DataFrame]:
    world = load_world()
    return {name: getattr(world, name) for name in ("schedules", "departures", "arrivals", "weather")}


@pytest.fixture(scope="session")
def flight_plans(feast_imported: None) -> dict[str, ViewPlan]:
    return plans("feature_definitions.flights")


@pytest.fixture
def declare(feast_imported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], dict[str, ViewPlan]]]:
    """Reads a package with the given texts of views.py and recipes.py, under a name of its own each time."""
    names = (f"declared_{tmp_path.name.replace('-', '_')}_{n}" for n in count())

    def read(views: str, recipes: str) -> dict[str, ViewPlan]:
        folder = tmp_path / next(names)
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "views.py").write_text(dedent(views))
        (folder / "recipes.py").write_text(dedent(recipes))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Stream feature views are experimental", category=RuntimeWarning)
            return plans(folder.name)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield read
    for name in [m for m in sys.modules if m.startswith("declared_")]:
        del sys.modules[name]
