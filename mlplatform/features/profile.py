"""How a view's values are distributed: nulls, quantiles and a histogram of each feature.

Belongs here: the numbers, over rows or a sample of them. Does not belong here: drawing them (`plots`), choosing the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from mlplatform.features.plan import TIME
from mlplatform.records import DayRange

CREATED = "created"
RECENT = timedelta(days=7)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 24
# More rows change a drawn line by less than its width, and the time to sort them is felt.
SAMPLE_ROWS = 50_000
_TAIL = 0.01


@dataclass(frozen=True)
class FeatureProfile:
    """One feature over `rows` rows, of which `nulls` have no value.

    `quantiles` are at QUANTILES, `counts` of BINS bins of equal width over `edges`; both are empty where no row has a
    value. The edges are the 1st and the 99th percentile, so that one outlier does not squeeze the rest into one bin; what
    lies beyond them is counted in the first and the last bin.
    """

    feature: str
    rows: int
    nulls: int
    quantiles: tuple[float, ...] = ()
    edges: tuple[float, float] = (0.0, 0.0)
    counts: tuple[int, ...] = ()

    @property
    def null_share(self) -> float | None:
        return self.nulls / self.rows if self.rows else None


def profile(rows: pl.DataFrame, features: Sequence[str]) -> tuple[FeatureProfile, ...]:
    """A profile of each feature (Float64, null = missing): nulls of all rows, the rest of a sample where there are many."""
    return tuple(_profile(rows[name], sample(rows)[name]) for name in features)


def sample(rows: pl.DataFrame) -> pl.DataFrame:
    """At most SAMPLE_ROWS rows at equal distances: the same rows every time."""
    return rows.gather_every(-(-rows.height // SAMPLE_ROWS)) if rows.height > SAMPLE_ROWS else rows


def recent_days(now: datetime) -> DayRange:
    """The days whose rows say how a view is doing now."""
    return DayRange((now - RECENT).date(), now.date())


def newest_versions(rows: pl.DataFrame, join_keys: Sequence[str], features: Sequence[str], now: datetime) -> pl.DataFrame:
    """Of each entity and time up to `now` the row created last, without those that withdraw a value (every feature null).

    `rows` has the columns of an offline table.
    """
    known = rows.filter(pl.max_horizontal(TIME, CREATED) <= pl.lit(now))
    kept = known.sort(CREATED).unique([*join_keys, TIME], keep="last", maintain_order=True)
    return kept.filter(pl.any_horizontal(pl.col(f).is_not_null() for f in features)).sort(TIME, *join_keys)


def _profile(column: pl.Series, seen: pl.Series) -> FeatureProfile:
    rows, nulls = len(column), column.null_count()
    values = seen.drop_nulls().to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        return FeatureProfile(column.name, rows, nulls)
    low, high = (float(q) for q in np.quantile(values, (_TAIL, 1 - _TAIL)))
    # Of a constant every bin has the width zero: it fills one.
    counts, _ = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high if high > low else low + 1))
    quantiles = tuple(float(q) for q in np.quantile(values, QUANTILES))
    return FeatureProfile(column.name, rows, nulls, quantiles, (low, high), tuple(int(n) for n in counts))
