"""The walk through the months: real gates and the real judge over made-up months."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.gate_specs import ChampionGate, Gate
from mlplatform.local import walk as walks
from mlplatform.local.walk import Retrain, begins, gates_of, retrain, step, walk
from mlplatform.local.walk_canary import Course, course, draws
from mlplatform.records import PredictionCost
from mlplatform.release_policy import CanaryPolicy
from mlplatform.specs import ModelSpec, Split
from mlplatform.training.dataset import Dataset
from mlplatform.training.trainers.base import Floats

A_DAY = 160
SPEC = ModelSpec(
    name="rain_tomorrow",
    description="Will it rain tomorrow?",
    feature_service="rain_v1",
    inputs={},
    rows=lambda tables: pl.DataFrame(),
    row_key=("town", "number"),
    request_fields=(),
    split=Split(train_start=date(2013, 1, 1), validate_start=date(2013, 1, 20), test_start=date(2013, 2, 1), end=date(2013, 3, 1)),
    gates=(Gate(metric="ece", maximum=0.08, reason="used as a probability"),),
    champion_gate=ChampionGate(metric="log_loss", tolerance=0.02),
    canary=CanaryPolicy(steps=(20, 50), window=timedelta(hours=6), max_duration=timedelta(days=20)),
    max_label_delay=timedelta(hours=24),
)


@pytest.fixture(scope="module")
def year() -> Dataset:
    """Half a year of rows whose truth is the feature `x`; each label is known a day later."""
    rng = np.random.default_rng(5)
    days = (date(2013, 7, 1) - date(2013, 1, 1)).days
    asked = [datetime(2013, 1, 1, tzinfo=UTC) + timedelta(days=d, minutes=9 * k) for d in range(days) for k in range(A_DAY)]
    x = rng.beta(1.5, 3.5, len(asked))
    frame = pl.DataFrame(
        {
            "event_timestamp": asked,
            "town": rng.choice([f"town {n}" for n in range(300)], len(asked)),
            "number": np.arange(len(asked)),
            "x": x,
            "label": (rng.random(len(asked)) < x).astype(int),
        },
        schema_overrides={"event_timestamp": pl.Datetime("us", "UTC")},
    ).with_columns(pl.col("event_timestamp").dt.date().alias("event_date"), label_known_at=pl.col("event_timestamp") + timedelta(days=1))
    return walks.in_order(SPEC, Dataset(SPEC.name, frame, ("x",), (), {}))


def version(year: Dataset, month: int, answers: Floats) -> Retrain:
    moved = SPEC.model_copy(update={"split": SPEC.split.moved_to(walks.labels_complete(SPEC, begins(date(2013, month, 1))))})
    return Retrain(date(2013, month, 1), moved, answers, PredictionCost(1000, 0.1, 0.1))


def truth(year: Dataset) -> Floats:
    return year.frame["x"].to_numpy()


def blurred(year: Dataset) -> Floats:
    """A forecast that knows less: halfway to the mean."""
    x = truth(year)
    return 0.5 * x + 0.5 * float(x.mean())


def in_june(year: Dataset, canary: Floats, champion: Floats) -> tuple[Course, pl.DataFrame]:
    inside = (year.frame["event_date"] >= date(2013, 6, 1)).to_numpy()
    rows = year.frame.filter(pl.Series(inside))
    ends = datetime(2013, 7, 1, tzinfo=UTC)
    return course(SPEC, rows, canary[inside], champion[inside], datetime(2013, 6, 1, tzinfo=UTC), ends, ("town",)), rows


def test_a_better_canary_is_promoted_and_answers_everybody_from_then_on(year: Dataset) -> None:
    found, rows = in_june(year, truth(year), blurred(year))
    assert (found.action, found.word) in {("promote", "better"), ("promote", "not worse")}
    later = (rows["event_timestamp"] >= found.at).to_numpy()
    x = rows["x"].to_numpy()
    assert (found.served[later] == x[later]).all()
    assert not found.trial[later].any()
    assert (found.served[found.trial] == x[found.trial]).all()
    assert (found.served[~later & ~found.trial] != x[~later & ~found.trial]).all()


def test_a_worse_canary_is_rejected_once_labels_tell_and_the_champion_goes_on(year: Dataset) -> None:
    backwards = 0.6 - 0.6 * truth(year)
    found, rows = in_june(year, backwards, truth(year))
    assert (found.word, found.action) == ("worse", "reject")
    assert found.at > datetime(2013, 6, 2, tzinfo=UTC)
    later = (rows["event_timestamp"] >= found.at).to_numpy()
    assert (found.served[later] == rows["x"].to_numpy()[later]).all()


def test_no_label_is_used_before_it_is_known(year: Dataset) -> None:
    late = Dataset(year.model, year.frame.with_columns(label_known_at=pl.lit(datetime(2014, 1, 1, tzinfo=UTC))), ("x",), (), {})
    found, _ = in_june(late, truth(year), blurred(year))
    assert (found.word, found.action) == ("cannot tell", "end")
    assert {f.measure for f in found.verdict.findings if f.state == "open"} == {"loss", "calibration"}


def test_a_town_stays_with_its_arm_while_the_share_stays(year: Dataset) -> None:
    found, rows = in_june(year, truth(year), blurred(year))
    first = rows.with_columns(pl.Series("trial", found.trial)).filter(pl.col("event_timestamp") < datetime(2013, 6, 2, tzinfo=UTC))
    assert first.group_by("town").agg(pl.col("trial").n_unique())["trial"].max() == 1
    shares = [float(rows.filter(pl.Series(draws(rows, ("town",), "canary") < percent)).height / rows.height) for percent in (20, 50)]
    assert shares == pytest.approx([0.2, 0.5], abs=0.08)


def test_what_the_gates_refuse_never_serves_and_the_champion_is_what_served_before(year: Dataset) -> None:
    x = truth(year)
    first, second = version(year, 4, blurred(year)), version(year, 5, np.clip(x + 0.2, 0, 1))
    third, beside = version(year, 6, x), version(year, 6, np.clip(x + 0.3, 0, 1))
    found = walk(year, [first, second, third], beside, ("town",))
    may, june = found.months
    assert (may.passed, may.serves, may.canary) == (False, "Apr", "")
    assert "ece" in may.gates
    assert june.champion["log_loss"] == pytest.approx(
        float(step(year, third, first, ("town",))[0].champion["log_loss"])  # of April's, not of what was refused
    )
    assert (june.passed, june.serves, june.good) == (True, "Jun", True)
    assert found.no_hold_out.stopped
    assert found.pooled["always the newest"]["log_loss"] > found.pooled["frozen"]["log_loss"] > found.pooled["served"]["log_loss"]
    assert found.no_hold_out.gates.startswith("ece_maximum")
    assert found.no_hold_out.canary == "worse: reject"  # as it would have gone, had the gates let it through
    assert not may.good
    with pytest.raises(ValueError, match="no month of the walk"):
        walk(year, [first, second], beside, ("town",))


def test_a_walk_that_stops_a_good_retrain_does_not_hold(year: Dataset) -> None:
    x = truth(year)
    good_but_off = np.clip(x + 0.085, 0, 1)  # above the gate's ECE, and closer to the truth than the champion
    third, beside = version(year, 5, good_but_off), version(year, 5, np.clip(x + 0.3, 0, 1))
    first = version(year, 4, np.clip(blurred(year) + 0.3, 0, 1))
    found = walk(year, [first, third], beside, ("town",))
    assert found.months[0].good
    assert found.months[0].stopped
    assert not found.held


def test_a_retrain_learns_nothing_of_its_test_part_unless_nothing_is_held_out(year: Dataset) -> None:
    month = date(2013, 5, 1)
    made = retrain(SPEC, year, month)
    end = date(2013, 4, 29)  # where labels are complete: a day of delay, and the day that is not over
    assert made.spec.split.end == end
    test = ((year.frame["event_date"] >= made.spec.split.test_start) & (year.frame["event_date"] < end)).to_numpy()
    assert np.isnan(made.answers[: int(np.argmax(test))]).all()
    assert np.isfinite(made.answers[test]).all()
    # Labels turned over in the test part change what learned from it, and nothing else.
    turned = year.frame.with_columns(label=pl.when(pl.Series(test)).then(1 - pl.col("label")).otherwise(pl.col("label")))
    other = Dataset(year.model, turned, year.numeric, (), {})
    assert np.array_equal(retrain(SPEC, other, month).answers, made.answers, equal_nan=True)
    through = [retrain(SPEC, data, month, hold_out=False).answers[test] for data in (year, other)]
    assert not np.array_equal(*through)
    names = [g.name for g in gates_of(year, made, None).gates]
    assert names == ["ece_maximum", "champion", "model_bytes", "cpu_ms", "cpu_ms_100", "skew"]
