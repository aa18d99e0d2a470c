"""What the judge looks at, made from what was logged: spans of time with both arms side by side; pure, over frames.

Belongs here: windows, sums, the scale from 0 to 1. Does not belong here: reading tables, judging.

A prediction counts in the window in which it was asked, its label in the window from which on it could be known, so both arms wait for
their labels alike. Only windows that are over are looked at: of one that is not, a later look would be another one, and the judge's
promise is about looks that stay. What is logged after its window (the log's Redis was away) changes it all the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from mlplatform.contracts import CANARY_VARIANT, CHAMPION_VARIANT, SHADOW_VARIANT
from mlplatform.deployment.confidence import Arm, Sketch
from mlplatform.deployment.history import changes
from mlplatform.deployment.judge import ArmLook, Look, Progress
from mlplatform.deployment.shadow import Pairs
from mlplatform.records import LedgerEntry
from mlplatform.specs import ModelSpec

COUNTERS = pl.Schema(
    {
        "at": pl.Datetime("us", "UTC"),
        "process": pl.Float64,
        "variant": pl.String,
        "version": pl.Int64,
        "requests": pl.Int64,
        "errors": pl.Int64,
    }
)


@dataclass(frozen=True)
class Trial:
    """A canary on trial: `canary` and `champion` are versions, `began` when the canary got its first share."""

    canary: int
    champion: int
    began: datetime
    window: timedelta


def looks(spec: ModelSpec, trial: Trial, outcomes: pl.DataFrame, counters: pl.DataFrame, now: datetime) -> list[Look]:
    """What is over by `now`, oldest first.

    `outcomes` as `monitoring.outcomes.join_outcomes` gives them (every prediction, with its label where that is known); `counters`: what
    the services counted, read now and then, with the columns of `COUNTERS`, and a row without a variant for each process that was read.
    """
    found = [*_of_answers(spec, trial, outcomes), *_of_labels(spec, trial, outcomes), *_of_counters(trial, counters)]
    return sorted((look for look in found if look.until <= now), key=lambda look: look.until)


def _arms(trial: Trial, rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    versions = {CANARY_VARIANT: trial.canary, CHAMPION_VARIANT: trial.champion}
    return {variant: rows.filter((pl.col("variant") == variant) & (pl.col("version") == version)) for variant, version in versions.items()}


def _windows(trial: Trial, rows: pl.DataFrame, time: str) -> Iterator[tuple[datetime, dict[str, pl.DataFrame]]]:
    since = (pl.col(time) - pl.lit(trial.began)).dt.total_microseconds()
    placed = rows.filter(since >= 0).with_columns((since // (trial.window // timedelta(microseconds=1))).alias("_window"))
    for (number,), part in sorted(placed.group_by("_window"), key=lambda group: group[0]):
        yield trial.began + (int(number) + 1) * trial.window, _arms(trial, part)  # type: ignore[call-overload]  # a number


def _of_answers(spec: ModelSpec, trial: Trial, outcomes: pl.DataFrame) -> Iterator[Look]:
    def arm(rows: pl.DataFrame) -> ArmLook:
        predictions = Arm.of(scaled(spec, rows["prediction"].to_numpy()))
        # A request of many inputs took its time once.
        latencies = Sketch.of(rows.unique("request_id")["latency_ms"].to_numpy())
        return ArmLook(latencies=latencies, predictions=predictions)

    for until, arms in _windows(trial, outcomes, "requested_at"):
        yield Look(until, arm(arms[CHAMPION_VARIANT]), arm(arms[CANARY_VARIANT]))


def _of_labels(spec: ModelSpec, trial: Trial, outcomes: pl.DataFrame) -> Iterator[Look]:
    def arm(rows: pl.DataFrame) -> ArmLook:
        label, predicted = scaled(spec, rows["label"].to_numpy()), scaled(spec, rows["prediction"].to_numpy())
        return ArmLook(losses=Arm.of(loss(spec, rows, label, predicted)), residuals=Arm.of((1 + label - predicted) / 2))

    known = outcomes.filter(pl.col("state") == "known")
    # Whoever is asked about what is over already has its label at once.
    there = known.with_columns(pl.max_horizontal("requested_at", "label_known_at").alias("_there"))
    for until, arms in _windows(trial, there.filter(pl.col("requested_at") >= trial.began), "_there"):
        yield Look(until, arm(arms[CHAMPION_VARIANT]), arm(arms[CANARY_VARIANT]))


def loss(spec: ModelSpec, rows: pl.DataFrame, label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    if not spec.quantiles:
        return np.asarray((label - predicted) ** 2)
    answers = scaled(spec, np.array(rows["quantiles"].to_list(), dtype=float).reshape(len(label), len(spec.quantiles)))
    levels, error = np.array(spec.quantiles), label[:, None] - answers
    return np.asarray(np.maximum(levels * error, (levels - 1) * error).mean(axis=1))


def scaled(spec: ModelSpec, values: np.ndarray) -> np.ndarray:
    low, high = spec.label_range or (0.0, 1.0)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0))


def _of_counters(trial: Trial, counters: pl.DataFrame) -> Iterator[Look]:
    """What a process counted between one reading of it and the next. The first one only begins: what it counted before may be of days
    before the trial, or of an earlier trial of the same version."""
    seen: dict[tuple[float, str, int], tuple[int, int]] = {}
    known: set[float] = set()
    for (at,), reading in sorted(counters.group_by("at"), key=lambda group: group[0]):
        arms = {}
        for variant, rows in _arms(trial, reading).items():
            requests = errors = 0
            for row in rows.iter_rows(named=True):
                place = (row["process"], variant, row["version"])
                counted = row["requests"], row["errors"]
                # A version that a known process had not counted before has begun with nothing.
                before = seen.get(place, (0, 0) if row["process"] in known else counted)
                requests, errors = requests + row["requests"] - before[0], errors + row["errors"] - before[1]
                seen[place] = counted
            arms[variant] = ArmLook(requests, errors)
        known |= set(reading["process"])
        if at > trial.began:  # type: ignore[operator]  # a datetime; what was counted before is no part of the trial
            yield Look(at, arms[CHAMPION_VARIANT], arms[CANARY_VARIANT])  # type: ignore[arg-type]


def requests_since(trial: Trial, outcomes: pl.DataFrame, since: datetime) -> int:
    """Requests the canary has answered since a moment."""
    rows = _arms(trial, outcomes)[CANARY_VARIANT].filter(pl.col("requested_at") >= since)
    return int(rows["request_id"].n_unique())


def on_trial(entries: Sequence[LedgerEntry], window: timedelta) -> tuple[Trial, Progress] | None:
    """The canary that answers now, by the ledger; its requests are still to be counted. None where nobody is on trial.

    A trial ends, and another begins, where the canary or the champion is another version, or the canary had no share.
    """
    states = [(now.since, now) for _, now in changes(entries) if now.since is not None]
    if not states or not states[-1][1].canary_weight or states[-1][1].production is None:
        return None
    newest = states[-1][1]
    began = since = states[-1][0]
    for at, state in reversed(states):
        if (state.canary, state.production) != (newest.canary, newest.production) or not state.canary_weight:
            break
        if state.canary_weight == newest.canary_weight and since == began:  # no other share in between
            since = at
        began = at
    assert newest.canary is not None
    assert newest.production is not None
    return Trial(newest.canary, newest.production, began, window), Progress(newest.canary_weight, since, 0, began)


def shadow_pairs(spec: ModelSpec, shadow: int, outcomes: pl.DataFrame, slices: Mapping[str, str]) -> Pairs:
    """What the shadow version and whoever answered said to the same inputs. `slices`: the column of each by its name.

    An input that only one of them has a record of is left out: copies beyond the shadow's budget are not asked, which is no failure of its
    own.
    """
    key = ["request_id", "input_index"]
    columns = ["prediction", "latency_ms", *(["quantiles"] if spec.quantiles else [])]
    copies = outcomes.filter((pl.col("variant") == SHADOW_VARIANT) & (pl.col("version") == shadow)).select(*key, *columns)
    answers = outcomes.filter(pl.col("variant") != SHADOW_VARIANT)
    both = answers.join(copies, on=key, suffix="_shadow", validate="1:1", maintain_order="left")
    label = scaled(spec, both["label"].to_numpy())
    ours = both.select(pl.col(f"{name}_shadow").alias(name) for name in columns)
    values = {name: both[column].cast(pl.String).fill_null("").to_list() for name, column in slices.items() if column in both.columns}
    return Pairs(
        scaled(spec, both["prediction_shadow"].to_numpy()),
        scaled(spec, both["prediction"].to_numpy()),
        both["latency_ms_shadow"].to_numpy(),
        both["latency_ms"].to_numpy(),
        loss(spec, ours, label, scaled(spec, ours["prediction"].to_numpy())),
        loss(spec, both, label, scaled(spec, both["prediction"].to_numpy())),
        values,
    )
