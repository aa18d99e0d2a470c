"""What the guide for data scientists declares: its lines run at the ends of the files they name, and give what they say."""

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from mlplatform.features.declared import plans
from mlplatform.features.engine import compute
from mlplatform.features.plan import ViewPlan

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide-features.md").read_text()
SNIPPET = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
NOON = datetime(2013, 9, 1, 12, tzinfo=UTC)


def snippets(path: str) -> str:
    found = [code for file, code in SNIPPET.findall(GUIDE) if file == path]
    assert found, f"the guide has no snippet for {path}"
    return "\n".join(found)


def with_snippets(path: str, **names: object) -> ModuleType:
    """The module at `path` with the guide's lines at its end; `names` are there for them."""
    module = ModuleType(f"guide_{Path(path).stem}")
    vars(module).update(names)
    exec(compile(f"{(ROOT / path).read_text()}\n{snippets(path)}", path, "exec"), vars(module))  # noqa: S102  # our own text
    return module


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ViewPlan]]:
    """The plans of the flights' views and of those that the guide adds."""
    folder = tmp_path_factory.mktemp("guide") / "guide_features"
    folder.mkdir()
    for file in ("views.py", "recipes.py"):
        path = f"feature_definitions/flights/{file}"
        (folder / file).write_text(f"{(ROOT / path).read_text()}\n{snippets(path)}")
    (folder / "__init__.py").touch()
    sys.path.insert(0, str(folder.parent))
    yield plans("guide_features")
    sys.path.remove(str(folder.parent))


def times(*hours_before_noon: float) -> pl.Series:
    return pl.Series([NOON - timedelta(hours=h) for h in hours_before_noon], dtype=pl.Datetime("us", "UTC"))


def test_the_windowed_feature_is_the_share_of_cancelled_flights(declared: dict[str, ViewPlan]) -> None:
    plan = declared["destination_cancellations"]
    assert plan.features == ("dest_cancelled_6h", "dest_cancelled_24h")
    arrivals = pl.DataFrame(
        {
            "flight_id": ["a", "b", "c"],
            "origin": ["JFK"] * 3,
            "dest": ["IAH"] * 3,
            "carrier": ["UA"] * 3,
            "flight": [1, 2, 3],
            "known_at": times(1, 5, 6),
            "status": ["cancelled", "arrived", "cancelled"],
            "arrival_delay_min": [None, 3.0, None],
        }
    )
    # A window is half-open: what became known exactly 6 hours ago is out of it.
    assert compute(plan, {"arrivals": arrivals}, NOON, NOON).rows() == [("IAH", NOON, 1 / 2, 2 / 3)]


def test_the_computed_feature_is_of_the_observation_that_became_known_at_the_tick(declared: dict[str, ViewPlan]) -> None:
    plan = declared["origin_fog"]
    assert plan.recipe.on_stale == "refuse"
    weather = pl.DataFrame({"origin": ["JFK", "JFK"], "time_hour": times(1, 0), "temp": [60.0, 50.0], "dewp": [58.5, 50.0]})
    assert compute(plan, {"weather": weather}, NOON, NOON).rows() == [("JFK", NOON, 1.5)]


def test_the_request_time_feature_knows_new_yorks_midnight() -> None:
    functions = with_snippets("feature_definitions/flights/request_time.py")
    declarations = with_snippets("feature_definitions/flights/request_functions.py", overnight=functions.overnight)
    added = declarations.REQUEST_FUNCTIONS[-1]
    assert set(added.outputs) <= set(declarations.DESCRIPTIONS)
    # 03:00 UTC is 23:00 of the day before in New York.
    leaves = np.array(["2013-09-02T03:00", "2013-09-02T03:00", "NaT"], dtype="datetime64[us]")
    lands = np.array(["2013-09-02T03:30", "2013-09-02T05:00", "2013-09-02T05:00"], dtype="datetime64[us]")
    found = added.function({"scheduled_departure": leaves, "scheduled_arrival": lands})
    np.testing.assert_array_equal(found["overnight"], [0.0, 1.0, np.nan])
    assert found["overnight"].dtype == np.float64
