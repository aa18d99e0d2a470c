"""A canary of the past: two versions share the requests of some weeks as they came, and the judge leads it as it would have.

Belongs here: who would have answered what, and the evidence as the platform makes it. Does not belong here: the judgement
(`deployment.judge`), the versions (`walk`).

Requests and labels are real, each known when it was. Both arms answer without a failure and equally fast: errors and latency
are the service's, and nothing of 2013 tells them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from mlplatform.contracts import CANARY_VARIANT, CHAMPION_VARIANT
from mlplatform.deployment.evidence import COUNTERS, Trial, looks
from mlplatform.deployment.judge import Progress, Verdict, judge, next_step
from mlplatform.specs import ModelSpec
from mlplatform.sticky import key_of
from mlplatform.training.trainers.base import Floats

_CANARY, _CHAMPION = 2, 1
_DRAWS = 2**64


@dataclass(frozen=True)
class Course:
    """How a canary went. `action`: promote, reject or end; hold where it was still on trial at the end. `served` (n,): what callers got,
    `trial` (n,): whether the canary gave it while on trial."""

    word: str
    action: str
    at: datetime
    reason: str
    verdict: Verdict
    served: Floats
    trial: npt.NDArray[np.bool_]


def course(
    spec: ModelSpec,
    rows: pl.DataFrame,
    canary: Floats,
    champion: Floats,
    began: datetime,
    until: datetime,
    entity: Sequence[str],
    salt: str = "canary",
    every: timedelta = timedelta(days=1),
) -> Course:
    """A canary from `began` on, judged `every` so often.

    `rows`: n labelled rows within [began, until) in order of `event_timestamp`, with `label`, `label_known_at` and the columns of `entity`,
    by which requests are drawn; `canary` and `champion`: their answers (n,), probabilities.
    """
    policy = spec.canary
    asked, drawn = rows["event_timestamp"].to_numpy(), draws(rows, entity, salt)
    by_canary = np.zeros(rows.height, dtype=bool)
    frame = rows.select(
        pl.int_range(pl.len()).cast(pl.String).alias("request_id"),
        pl.col("event_timestamp").alias("requested_at"),
        "label",
        "label_known_at",
        latency_ms=pl.lit(1.0),
    )
    trial = Trial(_CANARY, _CHAMPION, began, policy.window)
    progress = Progress(policy.steps[0], began, 0, began)
    counted = [_counters(began, 0, 0)]
    now, seen = began, 0
    while now < until:
        now = min(now + every, until)
        place = int(np.searchsorted(asked, np.datetime64(now.replace(tzinfo=None))))
        by_canary[seen:place] = drawn[seen:place] < progress.percent
        asked_canary = int(by_canary[:place].sum())
        counted.append(_counters(now, place - asked_canary, asked_canary))
        outcomes = _outcomes(frame.head(place), by_canary[:place], canary[:place], champion[:place], now)
        verdict = judge(policy, looks(spec, trial, outcomes, pl.concat(counted), now))
        progress = replace(progress, requests=progress.requests + int(by_canary[seen:place].sum()))
        step = next_step(policy, progress, verdict, now)
        seen = place
        if step.action == "advance":
            progress = replace(progress, percent=step.percent, since=now, requests=0)
        elif step.action != "hold":
            break
    served = np.where(by_canary, canary, champion)
    if step.action == "promote":
        served[seen:] = canary[seen:]
    return Course(verdict.word, step.action, now, step.reason, verdict, served, by_canary)


def draws(rows: pl.DataFrame, entity: Sequence[str], salt: str) -> Floats:
    """A percentage for each row, the same for the same entity."""
    fields = tuple(entity)
    found = {}
    for row in rows.select(fields).unique().iter_rows(named=True):
        digest = hashlib.blake2b(key_of(fields, row), digest_size=8, key=salt.encode()).digest()
        found[tuple(row.values())] = 100 * int.from_bytes(digest, "big") / _DRAWS
    return np.array([found[row] for row in rows.select(fields).iter_rows()])


def _outcomes(frame: pl.DataFrame, by_canary: npt.NDArray[np.bool_], canary: Floats, champion: Floats, now: datetime) -> pl.DataFrame:
    there = pl.col("label_known_at") <= now
    return frame.with_columns(
        pl.Series("variant", np.where(by_canary, CANARY_VARIANT, CHAMPION_VARIANT)),
        pl.Series("version", np.where(by_canary, _CANARY, _CHAMPION)),
        pl.Series("prediction", np.where(by_canary, canary, champion)),
        state=pl.when(there).then(pl.lit("known")).otherwise(pl.lit("pending")),
        label=pl.when(there).then(pl.col("label").cast(pl.Float64)),
    )


def _counters(at: datetime, champion: int, canary: int) -> pl.DataFrame:
    arms = ((CHAMPION_VARIANT, _CHAMPION, champion), (CANARY_VARIANT, _CANARY, canary))
    rows = [{"at": at, "process": 1.0, "variant": v, "version": n, "requests": asked, "errors": 0} for v, n, asked in arms]
    return pl.DataFrame(rows, schema=COUNTERS)
