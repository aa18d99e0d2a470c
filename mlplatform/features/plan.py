"""What the feature engine needs to know of a view: plain values, free of Feast.

Belongs here: `ViewPlan`, `WindowPlan` and the arithmetic of their ticks and lookbacks. Does not belong here: reading
declarations (`declared`), computing values (`engine`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta

import polars as pl

from mlplatform.records import DayRange
from mlplatform.specs import FeatureRecipe

TIME = "event_timestamp"
TIMESTAMP = pl.Datetime("us", "UTC")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class FeatureError(ValueError):
    """A recipe gave something its view does not declare; names the view and what to mend."""


@dataclass(frozen=True)
class WindowPlan:
    """One declared aggregation: `function` of `column` over `(T - window, T]`; `window=None` is a running sum up to T."""

    column: str
    function: str
    window: timedelta | None
    name: str


@dataclass(frozen=True)
class ViewPlan:
    """One stored feature view, as declared in Feast, with the recipe of its rows.

    `join_keys` are in sorted order, `features` in the view's schema order.
    `aggregations` and `hop` are set for windowed views, empty and None for computed ones.
    """

    name: str
    join_keys: tuple[str, ...]
    features: tuple[str, ...]
    ttl: timedelta
    description: str
    owner: str
    recipe: FeatureRecipe
    aggregations: tuple[WindowPlan, ...] = ()
    hop: timedelta | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    feature_descriptions: Mapping[str, str] = field(default_factory=dict)
    feature_units: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""  # SHA-256 of the declaration and the source of its recipe's module

    @property
    def cadence(self) -> timedelta:
        return self.recipe.cadence

    @property
    def windowed(self) -> bool:
        return bool(self.aggregations)

    @property
    def longest_window(self) -> timedelta:
        """How long an entity stays alive after its last event. Raises ValueError for a view without windows."""
        return max(a.window for a in self.aggregations if a.window is not None)


def microseconds(span: timedelta) -> int:
    return span // _MICROSECOND


def since_epoch(moment: datetime) -> int:
    """Microseconds from 1970-01-01 UTC. Raises ValueError for a time without a zone."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no zone: ticks are UTC")
    return (moment - EPOCH) // _MICROSECOND


def tick_range(plan: ViewPlan, days: DayRange, now: datetime | None = None) -> tuple[datetime, datetime] | None:
    """First and last tick on the days (00:00 included, the next day's 00:00 not), none of them after `now`.

    None where the days hold no tick yet.
    """
    cadence = microseconds(plan.cadence)
    first = -(-since_epoch(_midnight(days, 0)) // cadence)
    last = (since_epoch(_midnight(days, 1)) - 1) // cadence
    if now is not None:
        last = min(last, since_epoch(now) // cadence)
    if last < first:
        return None
    return EPOCH + first * plan.cadence, EPOCH + last * plan.cadence


def required_days(plan: ViewPlan, days: DayRange) -> dict[str, DayRange]:
    """For each validated source, the days whose rows the view's values on `days` are made from."""
    start = _midnight(days, 0)
    return {source: DayRange((start - lookback).date(), days.last) for source, lookback in plan.recipe.inputs.items()}


def _midnight(days: DayRange, after: int) -> datetime:
    """00:00 UTC of the first day (`after=0`), or of the day after the last (`after=1`)."""
    day = days.last + timedelta(days=1) if after else days.first
    return datetime.combine(day, time.min, UTC)
