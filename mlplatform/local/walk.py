"""The year month by month: a retrain at the start of each, through the gates, then as a canary of what serves.

Belongs here: what each month's retrain is, who is compared with whom, what callers would have got. Does not belong here: the gates and
the judge themselves (rooms `evaluation` and `deployment`), how one canary runs (`walk_canary`), tables on a screen (`bench_walk`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import polars as pl

from mlplatform.evaluation.budget import BATCH, judge_budget, measure_cost
from mlplatform.evaluation.evaluate import Champion, evaluate
from mlplatform.evaluation.gates import judge_skew
from mlplatform.evaluation.metrics import score
from mlplatform.local.walk_canary import course
from mlplatform.orchestration.automation.jobs import labels_complete
from mlplatform.records import Evaluation, PredictionCost
from mlplatform.specs import ModelSpec
from mlplatform.training import fitting
from mlplatform.training.dataset import DAY, LABEL, TIME, Dataset, split_by_time, to_matrix
from mlplatform.training.scoring import predictor
from mlplatform.training.trainers import base
from mlplatform.training.trainers.base import Floats

FIRST, LAST = 4, 12  # April: before there is a training, a validation and a test part


@dataclass(frozen=True)
class Retrain:
    """The version that is made when `month` begins. `answers` (n,): for all rows of the year, NaN before its test part."""

    month: date
    spec: ModelSpec
    answers: Floats
    cost: PredictionCost

    @property
    def name(self) -> str:
        return f"{self.month:%b}"


@dataclass(frozen=True)
class Month:
    """What became of a retrain. `canary`: the judge's word and what followed, empty where the gates refused or nothing served
    before; `days`: from its begin to that. `serves`: whose version answers when the month ends. Metrics are of the month itself."""

    month: str
    gates: str
    passed: bool
    canary: str
    days: float | None
    reason: str
    serves: str
    challenger: Mapping[str, float]
    champion: Mapping[str, float]

    @property
    def good(self) -> bool:
        """In hindsight: no worse, in its month, than what it was to replace."""
        return self.challenger["log_loss"] <= self.champion["log_loss"]

    @property
    def stopped(self) -> bool:
        return not self.passed or self.canary.endswith(("reject", "end"))


def begins(month: date) -> datetime:
    return datetime(month.year, month.month, month.day, tzinfo=UTC)


def after(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def retrain(spec: ModelSpec, year: Dataset, month: date, hold_out: bool = True) -> Retrain:
    """As the platform retrains: the declared split moved to where labels are complete, the default parameters (a study's first trial).

    `year`: every labelled row. Without `hold_out` the last fit takes the test part too, which the platform never does: what it learns of
    the newest month nobody can check.
    """
    moved = spec.model_copy(update={"split": spec.split.moved_to(labels_complete(spec, begins(month)))})
    data = Dataset(year.model, split_by_time(moved, year.frame), year.numeric, year.categorical, {})
    trainer = base.get(spec.trainer)
    trained = fitting.fit(moved, data, trainer, trainer.default_params)
    fitted, known = trained.fitted, trained.categories
    if not hold_out:
        known = data.categories("train", "validate", "test")
        rows = to_matrix(data.frame, data.numeric, known)
        fitted = trainer.fit(trainer.default_params, rows, None, rounds=fitted.rounds, seed=spec.seed, target=fitting.target_of(spec))
    later = year.frame.filter(pl.col(DAY) >= moved.split.test_start)
    values = to_matrix(later, data.numeric, known).values
    answers = np.full(year.frame.height, np.nan)
    answers[year.frame.height - later.height :] = fitted.predict(values)
    with tempfile.TemporaryDirectory() as folder:
        content = (Path(folder) / fitting.save(fitted, Path(folder)).name).read_bytes()
    cost = measure_cost(predictor(trainer.framework, content, threads=1), values[:BATCH], len(content))
    return Retrain(month, moved, answers, cost)


def gates_of(year: Dataset, challenger: Retrain, champion: Retrain | None) -> Evaluation:
    """The evaluation of a retrain on its test part, beside what serves when it is made; no skew was ever measured."""
    split = challenger.spec.split
    test = _days(year, split.test_start, split.end)
    frame = year.frame.filter(pl.Series(test))
    version, serves = challenger.month.month, champion.month.month if champion else None
    return evaluate(
        challenger.spec,
        version,
        frame[LABEL].to_numpy(),
        challenger.answers[test],
        frame,
        champion=Champion(champion.month.month, champion.answers[test]) if champion else None,
        beside=(*judge_budget(challenger.spec.budget, challenger.cost), judge_skew(None, version, serves)),
    )


def step(year: Dataset, challenger: Retrain, champion: Retrain, entity: Sequence[str], canary_anyway: bool = False) -> tuple[Month, Floats]:
    """One month of a walk, and what callers got in it, (rows of the month,). `canary_anyway`: also where the gates refused it."""
    month = challenger.month
    inside = _days(year, month, after(month))
    rows = year.frame.filter(pl.Series(inside))
    ours, theirs = challenger.answers[inside], champion.answers[inside]
    evaluation = gates_of(year, challenger, champion)
    refused = "; ".join(f"{g.name}: {g.reason}" for g in evaluation.gates if g.blocking and not g.passed)
    told = {"challenger": _metrics(rows, ours, challenger.spec), "champion": _metrics(rows, theirs, challenger.spec)}
    if refused and not canary_anyway:
        return Month(challenger.name, refused, False, "", None, refused, champion.name, **told), theirs
    found = course(challenger.spec, rows, ours, theirs, begins(month), begins(after(month)), entity)
    days = (found.at - begins(month)).total_seconds() / 86_400
    serves = challenger.name if found.action == "promote" else champion.name
    canary = f"{found.word}: {found.action}"
    return Month(challenger.name, refused or "passed", not refused, canary, days, found.reason, serves, **told), found.served


@dataclass(frozen=True)
class Walk:
    """`months` from May on: in April the first version begins, for want of another. `pooled`: metrics over April to December of what
    served, of the first version all along, and of each month's retrain at once, asked of nobody."""

    first: Evaluation
    months: tuple[Month, ...]
    no_hold_out: Month
    pooled: Mapping[str, Mapping[str, float]]

    @property
    def held(self) -> bool:
        """No retrain that was good in hindsight was stopped, the fit that held nothing out was, and walking was worth it."""
        fine = not any(m.good and m.stopped for m in self.months) and self.first.passed
        return fine and self.no_hold_out.stopped and self.pooled["served"]["log_loss"] <= self.pooled["frozen"]["log_loss"]


def walk(year: Dataset, retrains: Sequence[Retrain], no_hold_out: Retrain, entity: Sequence[str]) -> Walk:
    """Over all months, in order. `no_hold_out`: another fit of one of the months, that stands beside it and never serves;
    it is tried as a canary whatever the gates say."""
    first = retrains[0]
    champion, months, beside = first, [], None
    got: dict[str, list[Floats]] = {"served": [], "frozen": [], "always the newest": []}
    for challenger in retrains:
        inside = _days(year, challenger.month, after(challenger.month))
        served = challenger.answers[inside]
        if challenger is not first:
            if challenger.month == no_hold_out.month:
                beside, _ = step(year, no_hold_out, champion, entity, canary_anyway=True)
            month, served = step(year, challenger, champion, entity)
            months.append(month)
            champion = challenger if month.serves == challenger.name else champion
        for name, answers in zip(got, (served, first.answers[inside], challenger.answers[inside]), strict=True):
            got[name].append(answers)
    if beside is None:
        raise ValueError(f"no month of the walk is {no_hold_out.month}")
    rows = year.frame.filter(pl.Series(_days(year, first.month, after(retrains[-1].month))))
    pooled = {name: _metrics(rows, np.concatenate(answers), first.spec) for name, answers in got.items()}
    return Walk(gates_of(year, first, None), tuple(months), beside, pooled)


def _days(year: Dataset, start: date, end: date) -> np.ndarray:
    inside: np.ndarray = year.frame.select((pl.col(DAY) >= start) & (pl.col(DAY) < end)).to_series().to_numpy()
    return inside


def _metrics(rows: pl.DataFrame, answers: Floats, spec: ModelSpec) -> dict[str, float]:
    return score(rows[LABEL].to_numpy(), answers, spec.cost)


def in_order(spec: ModelSpec, year: Dataset) -> Dataset:
    """The rows in the order in which answers are kept."""
    return Dataset(year.model, year.frame.sort(TIME, *spec.row_key), year.numeric, year.categorical, year.counts)
