"""The result of an A/B experiment, readable at any time; pure, over frames.

Belongs here: whether the arms got their shares, and what differs between them. Does not belong here: which entity is in which arm (the
service draws it, `serving_app.traffic`; a record's variant says it), when an experiment ends.

A request is no unit: one entity asks many times and always falls alike. So an entity counts once, with what was said to its first
request. The control is the experiment's first arm.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from mlplatform.contracts import Experiment, TrafficRules
from mlplatform.deployment.confidence import NOTHING, Arm, Sums, differences, dirichlet_log_e, interval
from mlplatform.deployment.evidence import loss, scaled
from mlplatform.deployment.history import Served, changes
from mlplatform.records import LedgerEntry
from mlplatform.specs import ModelSpec
from mlplatform.sticky import key_of

PREDICTION, LABEL, LOSS = METRICS = ("prediction", "label", "loss")
Look = Mapping[str, Mapping[str, Arm]]  # by arm and metric, values in [0, 1]


@dataclass(frozen=True)
class Effect:
    """Mean of arm - control of one metric with the confidence sequence, over `n` pairs. `estimate` is None where n is 0.

    Predictions and labels in the label's unit; the loss is the judge's: squared error, or pinball loss, on the scale from 0 to 1.
    """

    arm: str
    metric: str
    n: int
    estimate: float | None
    low: float
    high: float

    @property
    def differs(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ExperimentResult:
    """`mismatch`: the arms' numbers of entities cannot come from their weights, so no effect is to be believed; `srm_e`: the evidence
    for that (an e-value). `crossed`: entities that more than one arm answered, which the draw excludes. `unit`: how long the label's
    interval is, in its unit."""

    experiment: str
    since: datetime
    entities: Mapping[str, int]
    crossed: int
    srm_e: float
    mismatch: bool
    unit: float
    effects: tuple[Effect, ...]


def running(entries: Sequence[LedgerEntry]) -> tuple[TrafficRules, datetime] | None:
    """The rules with the experiment that runs by the ledger, and since when; None where none runs.

    Another experiment, also of the same name, begins where arms, weights, salt, layer or sticky fields change: entities move then. So
    it does where an arm's version changes, as a promotion changes what `production` names: the arm is another treatment then. And where
    the champion changes at all: its requests may be drawn by other fields.
    """
    states = [now for _, now in changes(entries)]
    if not states or states[-1].rules.experiment is None:
        return None
    newest = states[-1]
    alike = itertools.takewhile(lambda state: _treatment(state) == _treatment(newest), reversed(states))
    *_, first = alike
    assert first.since is not None
    return newest.rules, first.since


def _treatment(state: Served) -> tuple[object, ...]:
    """What must stay for observations to be of one experiment."""
    experiment = state.rules.experiment
    versions = tuple(state.version_of(arm.serves) for arm in experiment.arms) if experiment else ()
    return experiment, state.rules.sticky_on, state.production, versions


def evaluate(
    spec: ModelSpec,
    experiment: Experiment,
    fields: Sequence[str],
    outcomes: pl.DataFrame,
    since: datetime,
    window: timedelta,
    now: datetime,
    alpha: float = 0.01,
) -> ExperimentResult:
    """What is known now.

    `outcomes` as `monitoring.outcomes.join_outcomes` gives them; `fields`: the request fields that are the entity. Observations of one
    window of time are compared with each other, so that drift common to the arms cancels, once the window is over. Alpha covers all arms,
    metrics and both sides together; the check of the shares has an alpha of its own.
    """
    first, crossed = _first_requests(experiment, fields, outcomes, since)
    entities = {arm.name: first.filter(pl.col("_arm") == arm.name).height for arm in experiment.arms}
    srm = _shares_log_e(experiment, entities)
    looks = _looks(spec, experiment, first, since, window, now)
    low, high = spec.label_range or (0.0, 1.0)
    unit = float(high - low)
    return ExperimentResult(
        experiment.name,
        since,
        entities,
        crossed,
        math.exp(min(srm, 700.0)),
        srm >= math.log(1 / alpha),
        unit,
        _effects(experiment, looks, unit, alpha),
    )


def _first_requests(experiment: Experiment, fields: Sequence[str], outcomes: pl.DataFrame, since: datetime) -> tuple[pl.DataFrame, int]:
    """(one row per entity with `_arm` and `_entity`, how many entities more than one arm answered)."""
    prefix = f"{experiment.name}/"
    # A request of many inputs goes where its first input's entity falls: the others were not drawn.
    drawn = pl.col("variant").str.starts_with(prefix) & (pl.col("input_index") == 0)
    rows = outcomes.filter(drawn & (pl.col("requested_at") >= since))
    keys = [key_of(tuple(fields), json.loads(text)) for text in rows["inputs"]]
    told = rows.with_columns(pl.col("variant").str.strip_prefix(prefix).alias("_arm"), pl.Series("_entity", keys, pl.Binary))
    first = told.sort("requested_at", "request_id", "input_index").unique("_entity", keep="first", maintain_order=True)
    arms = told.group_by("_entity").agg(pl.col("_arm").n_unique())
    return first, arms.filter(pl.col("_arm") > 1).height


def _looks(spec: ModelSpec, experiment: Experiment, first: pl.DataFrame, since: datetime, window: timedelta, now: datetime) -> list[Look]:
    def answers(rows: pl.DataFrame) -> dict[str, Arm]:
        return {PREDICTION: Arm.of(scaled(spec, rows["prediction"].to_numpy()))}

    def labels(rows: pl.DataFrame) -> dict[str, Arm]:
        label, predicted = scaled(spec, rows["label"].to_numpy()), scaled(spec, rows["prediction"].to_numpy())
        return {LABEL: Arm.of(label), LOSS: Arm.of(loss(spec, rows, label, predicted))}

    def by_window(rows: pl.DataFrame, time: str, of: Callable[[pl.DataFrame], dict[str, Arm]]) -> list[Look]:
        number = (pl.col(time) - pl.lit(since)).dt.total_microseconds() // (window // timedelta(microseconds=1))
        over = (now - since) // window
        groups = rows.with_columns(number.alias("_window")).filter(pl.col("_window") < over).group_by("_window")
        parts = [part for _, part in sorted(groups, key=lambda group: group[0])]  # in order, so that sums are the same to the last bit
        return [{arm.name: of(part.filter(pl.col("_arm") == arm.name)) for arm in experiment.arms} for part in parts]

    known = first.filter(pl.col("state") == "known")
    known = known.with_columns(pl.max_horizontal("requested_at", "label_known_at").alias("_there"))
    return [*by_window(first, "requested_at", answers), *by_window(known, "_there", labels)]


def _effects(experiment: Experiment, looks: Sequence[Look], unit: float, alpha: float) -> tuple[Effect, ...]:
    control, others = experiment.arms[0].name, [arm.name for arm in experiment.arms[1:]]
    each = alpha / (2 * len(METRICS) * len(others))
    found = []
    for arm in others:
        for metric in METRICS:
            sums: Sums = NOTHING
            for look in looks:
                if metric in look[arm]:
                    sums += differences(look[arm][metric], look[control][metric])
            low, high = interval(sums, each, 1.0)
            size = 1.0 if metric == LOSS else unit
            estimate = float(sums.mean) * size if sums.n > 0 else None
            found.append(Effect(arm, metric, int(sums.n), estimate, low * size, high * size))
    return tuple(found)


def _shares_log_e(experiment: Experiment, entities: Mapping[str, int]) -> float:
    """Log e-value against "every entity fell to an arm with the arm's weight"; infinite where an arm without weight has one."""
    taking = [(entities[arm.name], arm.weight / 100) for arm in experiment.arms if arm.weight > 0]
    if any(entities[arm.name] for arm in experiment.arms if arm.weight == 0):
        return math.inf
    return dirichlet_log_e([n for n, _ in taking], [share for _, share in taking])


def overlaps(experiments: Sequence[tuple[str, Experiment]]) -> tuple[str, ...]:
    """Experiments, each with its model, that could hold one entity in one layer: a text per pair; empty where none could."""
    found = []
    for i, (model, one) in enumerate(experiments):
        for other_model, other in experiments[i + 1 :]:
            a, b = one.layer, other.layer
            if a is None or b is None or a.name != b.name:
                continue
            if a.start < b.end and b.start < a.end:
                told = f"{model}/{one.name} [{a.start:g}, {a.end:g}) and {other_model}/{other.name} [{b.start:g}, {b.end:g})"
                found.append(f"layer {a.name}: {told} overlap")
    return tuple(found)
