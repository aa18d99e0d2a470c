"""`mlplatform features` and `mlplatform fingerprint`: what they tell of a real lake, and of none."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result

from mlplatform.cli_features import sparkline
from mlplatform.clients.fingerprints import mark_append
from mlplatform.clients.lake import Lake, with_day
from mlplatform.clock import SimulatedClock
from mlplatform.fingerprint import content_hash

NOW = datetime(2013, 9, 2, 12, tzinfo=UTC)
VIEW = ("offline", "origin_weather")
pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*:RuntimeWarning")


@pytest.fixture(autouse=True)
def environment(clean_environment: None, home: Path) -> None:
    """A home on a simulated clock."""
    home.mkdir()
    SimulatedClock(home / "clock.json").set(NOW)
    os.environ |= {"COLUMNS": "120", "MLPLATFORM_CLOCK": str(home / "clock.json")}


def weather(hours: int, temp: float | None = None) -> pl.DataFrame:
    """One row an hour of one origin up to an hour ago; every second temperature is missing unless `temp` is given."""
    features = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
    names = (*features, "precip_6h", "pressure_change_3h")
    moments = pl.Series([NOW - timedelta(hours=n + 1) for n in range(hours)], dtype=pl.Datetime("us", "UTC"))
    rows = pl.DataFrame({"origin": ["EWR"] * hours, "event_timestamp": moments, "created": moments})
    rows = rows.with_columns(pl.lit(1.5).alias(name) for name in names)
    seconds = [temp if n % 2 == 0 or temp is not None else None for n in range(hours)]
    values = [float(n) if n % 2 else temp for n in range(hours)] if temp is None else seconds
    return with_day(rows.with_columns(pl.Series("temp", values, dtype=pl.Float64)), "event_timestamp")


@pytest.fixture
def lake(home: Path) -> Lake:
    """Two days of weather, in two appends that are recorded."""
    made = Lake(str(home / "lake"))
    for rows in (weather(40)[20:], weather(40)[:20]):
        made.append(VIEW, rows, metadata=mark_append(made, VIEW, rows).metadata())
    return made


# --- features ------------------------------------------------------------------------------------------------------------


def test_the_views_are_listed_with_their_newest_value_and_their_consumers(run, lake) -> None:
    views = {row["view"]: row for row in json.loads(run("features", "--json").stdout)}
    found = views["origin_weather"]
    assert (found["keys"], found["features"], found["rows"]) == (["origin"], 11, 40)
    assert (found["newest_value"], found["age_s"]) == ("2013-09-02T11:00:00+00:00", 3600)
    assert [(c["model"], c["service"]) for c in found["consumers"]] == [
        ("arrival_delay", "flight_disruption_v1"),
        ("flight_disruption", "flight_disruption_v1"),
    ]
    assert views["nyc_state"]["note"] == "no table yet"
    shown = run("features").stdout
    assert "1 h ago" in shown
    assert "no table yet" in shown


def test_a_view_is_shown_with_nulls_quantiles_and_a_histogram_of_each_feature(run, lake) -> None:
    found = json.loads(run("features", "origin_weather", "--json").stdout)
    temp = next(f for f in found["features"] if f["feature"] == "temp")
    assert (temp["unit"], temp["rows"], temp["null_share"]) == ("degF", 40, 0.5)
    assert temp["quantiles"]["0.5"] == 20
    assert sum(temp["histogram"]["counts"]) == 20
    assert temp["computed_as"].endswith("()")
    assert found["inputs_lookback_s"].keys() == {"weather"}
    shown = run("features", "origin_weather").stdout
    assert "Air temperature [degF]" in shown
    assert "50%" in shown
    assert "flight_disruption through flight_disruption_v1" in shown


def test_a_correction_replaces_the_value_it_corrects(run, lake) -> None:
    corrected = weather(1, temp=99.0).with_columns(pl.lit(NOW).cast(pl.Datetime("us", "UTC")).alias("created"))
    lake.append(VIEW, corrected)
    temp = next(f for f in json.loads(run("features", "origin_weather", "--json").stdout)["features"] if f["feature"] == "temp")
    assert (temp["rows"], temp["quantiles"]["1"]) == (40, 99)


def test_a_value_past_its_ttl_is_told_and_so_is_a_table_without_recent_rows(run, lake, home) -> None:
    SimulatedClock(home / "clock.json").set(NOW + timedelta(hours=8))
    assert "9 h ago, past its ttl" in run("features", "origin_weather").stdout
    SimulatedClock(home / "clock.json").set(NOW + timedelta(minutes=7, seconds=12))
    assert "1 h 7 min ago" in run("features").stdout
    SimulatedClock(home / "clock.json").set(NOW + timedelta(days=30))
    assert "none since 2013-09-25; 40 rows in all" in run("features", "origin_weather").stdout


def test_without_a_lake_the_declarations_are_told_all_the_same(run) -> None:
    found = json.loads(run("features", "origin_congestion", "--json").stdout)
    assert found["note"] == "no table yet"
    assert all(f["description"] and "rows" not in f for f in found["features"])
    assert "values of the last 7 days: no table yet" in run("features", "origin_congestion").stdout


def test_a_name_nobody_declares_is_answered_with_those_declared(fails) -> None:
    assert "choose one of carrier_record" in fails("features", "weather")


def test_a_histogram_is_one_character_for_two_bins() -> None:
    assert sparkline([0, 0, 1, 0, 4, 4, 2, 2]) == " ▁█▄"
    assert sparkline([]) == ""


# --- fingerprint ---------------------------------------------------------------------------------------------------------


def told(answer: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_the_fingerprint_of_a_table_is_what_its_commits_record(run, lake) -> None:
    whole = content_hash(lake.read(VIEW))
    found = told(run("fingerprint", "offline/origin_weather", "--json"))
    assert (found["version"], found["fingerprint"], found["recorded_in"], found["computed"]) == (1, whole, "commits", None)
    older = told(run("fingerprint", "offline/origin_weather", "--version", "0", "--json"))
    assert older["fingerprint"] == content_hash(lake.read(VIEW, version=0)) != whole


def test_verifying_reads_the_rows(run, lake) -> None:
    answer = run("fingerprint", "offline/origin_weather", "--verify")
    assert answer.exit_code == 0
    assert "its rows give the same" in answer.stdout


def test_rows_that_are_not_what_was_recorded_are_found(run, lake) -> None:
    """A commit that says it has other rows than it has: as if a file had been replaced."""
    lake.append(VIEW, weather(1, temp=7.0), metadata=mark_append(lake, VIEW, weather(1, temp=8.0)).metadata())
    answer = run("fingerprint", "offline/origin_weather", "--verify")
    assert answer.exit_code == 1
    assert "its rows differ from what is recorded in the commits" in answer.stdout


def test_where_nothing_is_recorded_the_rows_tell_and_nothing_is_verified(run, home) -> None:
    Lake(str(home / "lake")).replace(("raw", "shops"), pl.DataFrame({"shop": ["a"]}))
    answer = run("fingerprint", "raw/shops")
    assert answer.exit_code == 0
    assert content_hash(pl.DataFrame({"shop": ["a"]})) in answer.stdout
    assert run("fingerprint", "raw/shops", "--verify").exit_code == 1


def test_a_training_set_is_compared_with_its_manifest(run, home) -> None:
    rows = pl.DataFrame({"x": [1.0]})
    metadata = {"mlplatform.manifest": json.dumps({"content_hash": content_hash(rows)})}
    Lake(str(home / "lake")).replace(("training_set", "m"), rows, metadata=metadata)
    answer = run("fingerprint", "training_set/m", "--verify")
    assert answer.exit_code == 0
    assert "recorded in the training manifest" in answer.stdout


def test_a_table_or_a_version_that_is_not_there_is_told_in_one_line(fails, lake) -> None:
    for name in ("weather", "../x", "../offline/origin_weather", "offline/..", "/offline", "offline/origin_weather/", ".hidden/x", "a/b/c"):
        assert f"'{name}' is no table of the lake" in fails("fingerprint", name)
    assert "does not exist yet" in fails("fingerprint", "offline/nothing")
    assert "versions go from 0 to 1" in fails("fingerprint", "offline/origin_weather", "--version", "2")
