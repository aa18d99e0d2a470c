"""The real year for the flight views: one copy per session."""

from collections.abc import Mapping

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
def flight_plans() -> dict[str, ViewPlan]:
    return plans("feature_definitions.flights")
