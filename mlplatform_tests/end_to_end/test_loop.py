"""The whole loop on real flights, shortened: a month of history, four hours of requests, a second version, a rollback."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from redis import Redis

from mlplatform.catalog.discover import catalogs
from mlplatform.client import PredictionClient
from mlplatform.clients.fingerprints import recorded
from mlplatform.contracts import GATE_RESULTS_TAG, PRODUCTION, prediction_stream
from mlplatform.evaluation.evaluate import all_gate_names
from mlplatform.fingerprint import content_hash, fingerprint
from mlplatform.gate_specs import ChampionGate, Gate
from mlplatform.local.demo import Demo
from mlplatform.local.demo_release import Release
from mlplatform.local.profile import LocalPlatform
from mlplatform.local.report import Report
from mlplatform.local.service_state import Service
from mlplatform.orchestration import resources
from mlplatform.orchestration.assets.training import open_training_set
from mlplatform.orchestration.joins import with_features
from mlplatform.orchestration.rebuild import Outcome, RebuildError, rebuild
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.records import DayRange, SkewSummary
from mlplatform.settings import load_settings
from mlplatform.specs import Catalog, Split, TuningSpec
from mlplatform.training.scoring import load

# A Friday morning in New York; drift is measured from 200 predictions on.
START = datetime(2013, 2, 1, 11, tzinfo=UTC)
END = START + timedelta(hours=4)
AFTERMATH = timedelta(hours=4)
SPLIT = Split(train_start=date(2013, 1, 1), validate_start=date(2013, 1, 20), test_start=date(2013, 1, 25), end=date(2013, 2, 1))

pytestmark = pytest.mark.timeout(400)


def shortened(catalog: Catalog) -> Catalog:
    """The catalog with one month to learn from, and gates that three weeks of training can pass."""
    changes = {
        "split": SPLIT,
        "tuning": TuningSpec(trials=1, folds=1, max_rows=5_000),
        "gates": (Gate(metric="auc", minimum=0.55, reason="better than guessing"), Gate(metric="auc", maximum=0.9, reason="no leak")),
        "slice_gates": (),
        "champion_gate": ChampionGate(tolerance=0.5),
    }
    return catalog.model_copy(update={"models": tuple(m.model_copy(update=changes) for m in catalog.models)})


def _forget_feature_modules() -> None:
    """Feast's sources take the lake's place when their module is loaded: a process has one lake, a test session several."""
    for module in ("entities", "sources", "views", "on_demand", "services"):
        sys.modules.pop(f"feature_definitions.flights.{module}", None)


@dataclass
class Story:
    """What one run of the loop left behind, its services still up."""

    demo: Demo
    report: Report
    services: tuple[Service, ...]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def platform(home: Path) -> Iterator[LocalPlatform]:
    """A running local platform. It sets this process's variables, which are put back afterwards."""
    before = dict(os.environ)
    _forget_feature_modules()
    try:
        with LocalPlatform(home=home, start=START) as running:
            yield running
        # In here, so that it is not skipped: whatever the tests did, nothing is left.
        assert not running.supervisor.services
    finally:
        _forget_feature_modules()
        os.environ.clear()
        os.environ.update(before)
        load_settings.cache_clear()
        resources._CACHE.clear()


@pytest.fixture(scope="module")
def story(feast_imported: None, platform: LocalPlatform, home: Path) -> Story:
    report = Report(home, "the loop")
    demo = Demo.open(platform, report, None, shortened(catalogs()[0]))
    demo.build()
    demo.replay(START, END, AFTERMATH)
    demo.finish()
    return Story(demo, report, tuple(platform.supervisor.services))


def test_every_stage_did_its_work(story: Story):
    assert {row.stage: row.fault for row in story.report.rows if row.fault} == {}
    assert story.report.status == 0


def test_every_request_was_answered_and_every_answer_is_in_the_table(story: Story):
    tally = story.demo.tally
    assert tally.asked > 200
    assert tally.answered == tally.asked
    rows = story.demo.clients.lake.read(("predictions", "flight_disruption"))
    assert rows.height == tally.answered
    assert rows["prediction"].mean() == pytest.approx(tally.mean_prediction)
    assert rows.select("request_id", "input_index").is_duplicated().sum() == 0


def test_every_gate_was_judged_and_its_result_stands_on_the_version(story: Story):
    version = story.demo.clients.registry.by_alias("flight_disruption", PRODUCTION)
    results = json.loads(version.tags[GATE_RESULTS_TAG])
    assert tuple(result["name"] for result in results) == all_gate_names(story.demo.model)
    assert {result["name"] for result in results if not result["passed"]} == set()
    assert results[-1]["reason"] == "never measured: nothing served yet"


def test_outcomes_became_known_and_are_the_flights_own(story: Story):
    clients, model = story.demo.clients, story.demo.model
    known = clients.lake.read(("outcomes", model.name)).filter(pl.col("state") == "known")
    assert known.height > 20
    arrivals = clients.lake.read(("validated", "arrivals")).with_columns(
        ((pl.col("status") != "arrived") | (pl.col("arrival_delay_min") >= 15)).cast(pl.Float64).alias("expected")
    )
    both = known.join(arrivals, on=["carrier", "flight", "scheduled_departure"], how="left")
    assert both["label"].to_list() == both["expected"].to_list()


def test_the_training_set_names_the_exact_content_of_every_feature_table(story: Story):
    lake, model = story.demo.clients.lake, story.demo.model
    _, manifest, _ = open_training_set(story.demo.clients, model)
    views = {table: version for table, (_, version) in manifest.delta_versions.items() if table.startswith("offline/")}
    read_whole = {table: content_hash(lake.read(tuple(table.split("/")), version=version)) for table, version in views.items()}
    assert len(read_whole) == 8
    assert dict(manifest.feature_fingerprints) == read_whole
    tags = story.demo.clients.registry.by_alias(model.name, PRODUCTION).tags
    assert json.loads(tags["feature_fingerprints"]) == read_whole
    for table in views:  # and it goes on through the days that were replayed
        key = tuple(table.split("/"))
        assert recorded(lake, key) == fingerprint(lake.read(key))


def test_what_was_served_is_what_history_says_it_should_have_been(story: Story, tmp_path: Path):
    """No skew: the vector of each logged prediction equals the point-in-time join for its keys and its second."""
    clients, model = story.demo.clients, story.demo.model
    logged = clients.lake.read(("predictions", model.name)).sort("requested_at", "request_id")
    inputs = [json.loads(text) for text in logged["inputs"]]
    times = ("scheduled_departure", "scheduled_arrival")
    fields = {
        f.name: [f.constant if f.constant is not None else row[f.name] for row in inputs]
        for f in model.request_fields
        if f.name not in times
    }
    moments = {name: pl.Series([row[name] for row in inputs]).str.to_datetime(time_unit="us", time_zone="UTC") for name in times}
    rows = pl.DataFrame({"event_timestamp": logged["requested_at"], **fields, **moments})
    joined = with_features(clients, model, rows)
    version = clients.registry.by_alias(model.name, PRODUCTION)
    assert version is not None
    contract = clients.registry.contract_of(version)
    scorer = load(clients.registry.download(version, tmp_path), contract)
    expected = scorer.inputs(joined)
    served = np.array([[np.nan if v is None else v for v in row] for row in logged["features"].to_list()])
    assert served.shape == expected.shape
    names = [f.name for f in contract.features]
    differing = {
        n: int(c) for n, c in zip(names, (~((served == expected) | (np.isnan(served) & np.isnan(expected)))).sum(axis=0), strict=True) if c
    }
    assert differing == {}
    assert np.isfinite(served).mean() > 0.8  # vectors of nothing would agree too
    assert scorer.predict(joined) == pytest.approx(logged["prediction"].to_numpy(), abs=1e-6)
    # The platform's own proof, by another way, says the same.
    proof = newest_summary(clients, "skew", model.name, SkewSummary)
    assert proof is not None
    assert (proof.compared, proof.mismatched, proof.unresolved) == (logged.height, 0, ())


def test_a_version_is_built_again_from_the_tables_as_they_were_though_days_were_written_since(story: Story):
    demo = story.demo
    table = ("offline", "origin_congestion")
    manifest = demo.clients.registry.manifest_of(demo.clients.registry.version(demo.model.name, 1))
    assert demo.clients.lake.identity(table)[1] > manifest["delta_versions"]["/".join(table)][1]
    told = rebuild(demo.clients, demo.catalog, demo.model, demo.plans, 1)
    assert told.outcome == Outcome(identical=True, difference=0.0, tolerance=0.0)
    # A commit made meanwhile is a circumstance, and none of the test's.
    assert [i.name for i in told.changed if not i.circumstance] == []


def test_what_does_not_come_out_again_is_told_with_what_changed(story: Story):
    demo = story.demo
    other = demo.model.model_copy(update={"seed": demo.model.seed + 1})
    told = rebuild(demo.clients, demo.catalog, other, demo.plans, 1)
    assert told.outcome is not None
    assert not told.outcome.same
    assert [(i.name, i.now) for i in told.changed if not i.circumstance] == [("seed", str(other.seed))]


def test_a_version_of_which_nothing_is_recorded_is_not_guessed(story: Story, monkeypatch: pytest.MonkeyPatch):
    demo = story.demo
    version = demo.clients.registry.version(demo.model.name, 1)
    monkeypatch.setattr(demo.clients.registry, "version", lambda *_: replace(version, tags={}))
    with pytest.raises(RebuildError, match="registered without a record of its ingredients"):
        rebuild(demo.clients, demo.catalog, demo.model, demo.plans, 1)


def test_what_is_stored_has_left_the_prediction_log(story: Story, platform: LocalPlatform):
    with Redis.from_url(story.demo.clients.settings.redis_url.get_secret_value()) as redis:
        assert redis.xlen(prediction_stream("flight_disruption")) == 1


def test_a_second_version_is_on_trial_then_served_and_a_rollback_takes_it_back(story: Story):
    demo, name = story.demo, story.demo.model.name
    for stages in (("model",), ("evaluation",), ("deployment",)):
        demo.runner.run(demo.runner.keys(*stages, names=[name]))
    with PredictionClient(demo.clients.settings.serving_url) as client:
        assert _within(15, lambda: _shares(client, name) == {1: 75, 2: 25})
        assert client.model(name)["version"] == 1
        promote(demo.clients, name, 2, "test", by_hand=True)
        assert _served(client, name, 2)
        assert _within(15, lambda: _shares(client, name) == {2: 100})
        decision = roll_back(demo.clients, name, "the test says so", "test")
        assert (decision.action, decision.version) == ("rollback", 1)
        assert _served(client, name, 1)
    actions = [(e.action, e.version) for e in demo.clients.ledger.entries(name)]
    trial = [("canary", 2), ("traffic", 2)]
    over = [("traffic", 2), ("canary", None)]
    assert actions == [("pass", 1), ("promote", 1), ("pass", 2), *trial, ("promote", 2), *over, ("rollback", 1)]
    assert demo.clients.ledger.verify(name).holds


def _shares(client: PredictionClient, name: str) -> dict[int, float]:
    return {v["version"]: v["percent"] for v in client.model(name)["traffic"]["variants"]}


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.1)
    return False


def _served(client: PredictionClient, name: str, version: int) -> bool:
    """Whether the service comes to serve the version within seconds, ready all the while."""

    def holds() -> bool:
        assert client.ready()
        return bool(client.model(name)["version"] == version)

    return _within(15, holds)


def test_building_again_changes_no_table(story: Story):
    """Every write is idempotent: the same day's run once more leaves the same rows."""
    demo = story.demo
    today = demo.clients.clock.now().date()
    tables = [("validated", "departures"), ("offline", "origin_congestion"), ("predictions", demo.model.name)]
    before = {key: demo.clients.lake.row_count(key) for key in tables}
    sources = ["departures", "arrivals", "schedules"]
    demo.runner.run(
        [*demo.runner.keys("raw", "validated", "quarantine", names=sources), *demo.runner.keys("offline", names=["origin_congestion"])],
        DayRange(today, today),
    )
    demo.runner.run(demo.runner.keys("predictions"))
    assert {key: demo.clients.lake.row_count(key) for key in tables} == before


def test_a_slow_version_is_found_among_callers_and_rejected_by_the_judge(story: Story):
    demo, name = story.demo, story.demo.model.name
    release = Release.begin(demo, demo.clients.clock.now().replace(minute=0, second=0, microsecond=0) + timedelta(hours=1))
    with release.client:
        release.chapter("slow", "rejected", release.register_slow, release.spoilt_graph())
        [chapter] = release.chapters
        assert chapter.fault == ""
        assert chapter.reason.startswith("slow: +")
        assert _within(15, lambda: _shares(release.client, name) == {1: 100})
    last = demo.clients.ledger.entries(name)[-1]
    assert (last.action, last.version, last.actor) == ("reject", chapter.version, "judge")


def test_the_end_leaves_nothing_running(story: Story, platform: LocalPlatform):
    assert {s.name for s in story.services} >= {"valkey", "sources", "mlflow", "serving"}
    platform.supervisor.stop_all()
    for service in story.services:
        with pytest.raises(ProcessLookupError):
            os.killpg(service.pgid, 0)
