"""Results of experiments: effects, shares, layers."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.contracts import Arm, CanaryRule, Experiment, Layer, TrafficRules
from mlplatform.deployment.confidence import dirichlet_log_e
from mlplatform.deployment.experiment import ExperimentResult, evaluate, overlaps, running
from mlplatform.records import LedgerEntry
from mlplatform.specs import ModelSpec, Split

T0, HOUR = datetime(2013, 9, 1, tzinfo=UTC), timedelta(hours=1)
CONTROL, NEW = Arm(name="control", serves="production", weight=50), Arm(name="new", serves="7", weight=50)
EXPERIMENT = Experiment(name="price", salt="x", arms=(CONTROL, NEW))
GIVEN = {"description": "x", "feature_service": "s", "inputs": {}, "rows": lambda _: pl.DataFrame(), "row_key": ("who",)}
DAYS = [date(2013, month, 1) for month in (1, 2, 3, 4)]
SPLIT = Split(train_start=DAYS[0], validate_start=DAYS[1], test_start=DAYS[2], end=DAYS[3])
SPEC = ModelSpec(name="m", request_fields=(), split=SPLIT, **GIVEN)


def outcomes(
    hours: int, new: float = 0.3, share: float = 0.5, level: Callable[[int], float] = lambda _: 0.0, seed: int = 0
) -> pl.DataFrame:
    """Hours of 400 new entities, each asking once; the control books in 30 % of the cases, plus what the hour's level adds to both."""
    rng, frames = np.random.default_rng(seed), []
    for hour in range(hours):
        arms = np.where(rng.random(400) < share, "new", "control")
        p = np.where(arms == "new", new, 0.3) + level(hour)
        at = [T0 + hour * HOUR + timedelta(seconds=9 * i) for i in range(400)]
        frames.append(
            pl.DataFrame(
                {
                    "request_id": [f"{hour}-{i}" for i in range(400)],
                    "input_index": 0,
                    "inputs": [json.dumps({"who": hour * 400 + i}) for i in range(400)],
                    "requested_at": at,
                    "variant": [f"price/{arm}" for arm in arms],
                    "prediction": 0.3 + 0.2 * (arms == "new"),
                    "state": "known",
                    "label": (rng.random(400) < p).astype(float),
                    "label_known_at": at,
                }
            )
        )
    return pl.concat(frames)


def result(
    rows: pl.DataFrame, experiment: Experiment = EXPERIMENT, now: datetime = T0 + 100 * HOUR, spec: ModelSpec = SPEC
) -> ExperimentResult:
    return evaluate(spec, experiment, ["who"], rows, T0, HOUR, now)


def effect(found: ExperimentResult, metric: str = "label"):
    (one,) = (e for e in found.effects if e.metric == metric)
    return one


def test_an_effect_is_found_and_a_drift_of_both_arms_is_none() -> None:
    found = effect(result(outcomes(60, new=0.4)))
    assert found.differs
    assert found.low <= 0.1 <= found.high
    assert not effect(result(outcomes(60, level=lambda hour: 0.4 * (hour % 5 == 0)))).differs


def test_arms_that_do_not_get_their_shares_are_told() -> None:
    assert not result(outcomes(60)).mismatch
    assert result(outcomes(60, share=0.54)).mismatch


def test_an_entity_that_asks_again_and_again_counts_once_with_its_first_request() -> None:
    rows = outcomes(20)
    again = rows.with_columns(pl.col("requested_at") + timedelta(seconds=1), pl.lit(1.0).alias("label"), pl.col("request_id") + "again")
    assert result(pl.concat([rows, *[again.with_columns(pl.col("request_id") + str(i)) for i in range(5)]])) == result(rows)


def test_only_the_first_input_of_a_request_was_drawn() -> None:
    rows = outcomes(20)
    others = rows.with_columns(pl.lit(1, pl.Int64).alias("input_index"), pl.lit('{"who": "another"}').alias("inputs"))
    assert result(pl.concat([rows.cast({"input_index": pl.Int64}), others])) == result(rows)


def test_entities_that_two_arms_answered_are_told_and_others_traffic_is_no_part() -> None:
    rows = outcomes(2)
    strays = rows.head(3).with_columns(pl.col("requested_at") + 50 * HOUR, (pl.col("request_id") + "x"))
    strays = pl.concat([strays.with_columns(pl.lit(f"price/{arm}").alias("variant")) for arm in ("new", "control")])
    others = rows.with_columns(pl.lit("champion").alias("variant"))
    found = result(pl.concat([rows, strays, others]))
    assert found.crossed == 3
    assert sum(found.entities.values()) == 800


def test_windows_that_are_not_over_and_requests_from_before_do_not_count() -> None:
    rows = outcomes(20)
    assert effect(result(rows, now=T0 + 10.5 * HOUR)) == effect(result(outcomes(20).filter(pl.col("requested_at") < T0 + 10 * HOUR)))
    before = rows.with_columns(pl.col("requested_at") - 30 * HOUR)
    assert sum(result(before).entities.values()) == 0


def test_an_effect_is_in_the_labels_unit_and_the_loss_on_the_scale() -> None:
    rows = outcomes(40, new=0.5).with_columns(pl.col("label") * 100 - 20, pl.col("prediction") * 100 - 20)
    scaled = result(rows, spec=SPEC.model_copy(update={"label_range": (-20.0, 80.0)}))
    plain = result(outcomes(40, new=0.5))
    assert effect(scaled).estimate == pytest.approx(100 * effect(plain).estimate)
    assert effect(scaled, "prediction").low == pytest.approx(100 * effect(plain, "prediction").low)
    assert effect(scaled, "loss").estimate == pytest.approx(effect(plain, "loss").estimate)


def test_looked_at_every_hour_arms_that_are_alike_are_rarely_told_apart() -> None:
    """60 experiments, 12 looks each, alpha 10 %: more than 15 would come once in some thousand seeds, were it all spent."""
    alarms = 0
    for seed in range(60):
        rows = outcomes(12, seed=seed).with_columns(pl.lit(0.3).alias("prediction"))
        looked = (evaluate(SPEC, EXPERIMENT, ["who"], rows, T0, HOUR, T0 + h * HOUR, alpha=0.1) for h in range(1, 13))
        alarms += any(e.differs for found in looked for e in found.effects)
    assert alarms <= 15


def test_the_check_of_shares_may_be_looked_at_every_time() -> None:
    """400 right splits, 200 looks each: 1 % is 4, and 13 or more would come once in some 3,000 seeds."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(400):
        got = np.cumsum(rng.binomial(50, 0.5, 200)).tolist()
        alarms += any(dirichlet_log_e((h, 50 * (i + 1) - h), (0.5, 0.5)) >= np.log(100) for i, h in enumerate(got))
    assert alarms < 13


def test_an_arm_without_weight_that_has_entities_is_a_mismatch() -> None:
    arms = (CONTROL.model_copy(update={"weight": 100}), NEW.model_copy(update={"weight": 0}))
    off = Experiment(name="price", salt="x", arms=arms)
    rows = outcomes(1)
    assert result(rows, off).mismatch
    assert not result(rows.filter(pl.col("variant") == "price/control"), off).mismatch


def test_nothing_seen_is_no_effect_of_zero() -> None:
    found = effect(result(outcomes(1).clear(), spec=SPEC.model_copy(update={"label_range": (0.0, 2.0)})))
    assert (found.n, found.estimate, found.low, found.high) == (0, None, -2, 2)


def test_an_experiment_begins_anew_where_entities_move_and_goes_on_where_they_do_not() -> None:
    def entry(hour: int, rules: TrafficRules) -> LedgerEntry:
        made = LedgerEntry(T0 + hour * HOUR, "m", "traffic", "canary", None, None, "ann", "why")
        return replace(made, evidence={"rules": rules.canonical_json()})

    rules = TrafficRules(experiment=EXPERIMENT)
    grown = rules.model_copy(update={"canary": CanaryRule(weight=5, salt="c")})
    assert running([]) is None
    assert running([entry(0, rules), entry(1, TrafficRules())]) is None
    assert running([entry(0, rules), entry(1, grown)]) == (grown, T0)
    salted = rules.model_copy(update={"experiment": EXPERIMENT.model_copy(update={"salt": "y"})})
    assert running([entry(0, rules), entry(1, salted), entry(2, rules), entry(3, grown)]) == (grown, T0 + 2 * HOUR)


def test_a_promotion_begins_an_experiment_anew() -> None:
    rules = TrafficRules(experiment=EXPERIMENT)
    told = LedgerEntry(T0, "m", "traffic", "canary", None, None, "ann", "why", evidence={"rules": rules.canonical_json()})
    promotion = LedgerEntry(T0 + HOUR, "m", "promote", "production", 3, None, "ann", "why")
    shadow = LedgerEntry(T0 + 2 * HOUR, "m", "shadow", "shadow", 9, None, "ann", "why")
    assert running([told, promotion, shadow]) == (rules, T0 + HOUR)


def test_parts_of_one_layer_that_meet_are_told() -> None:
    def of(start: float, end: float, layer: str = "ui") -> Experiment:
        return EXPERIMENT.model_copy(update={"layer": Layer(name=layer, start=start, end=end)})

    assert overlaps([("m", of(0, 50)), ("k", of(50, 100)), ("k", of(0, 100, "price")), ("l", EXPERIMENT)]) == ()
    assert overlaps([("m", of(0, 51)), ("k", of(50, 100))]) == ("layer ui: m/price [0, 51) and k/price [50, 100) overlap",)
