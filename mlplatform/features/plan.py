"""What the feature engine needs to know of a view: plain values, free of Feast; and the definition its values obey.

Belongs here: `ViewPlan`, `WindowPlan` and the arithmetic of their times and lookbacks. Does not belong here: reading
declarations (`declared`), computing values (`engine`).

The definition, for the batch engine and the streaming worker alike. An *event* is a row of the recipe's `events` with all
its join keys; a null or NaN in a column says nothing about that column.

- *Rows*, by the recipe's `trigger`. "cadence": at each tick T (a multiple of the cadence since 1970), for each entity with
  an event in the view's longest window. "event": at each distinct time T of an entity's events.
- *Windows.* At T the window w holds the entity's events of `(floor(T - w), T]`, where floor rounds down to a multiple of
  the hop since 1970: `window_start`. Ticks and windows are multiples of the hop, so at a tick this is `(T - w, T]`. Between
  ticks the head is exact and the tail moves a hop at a time, which is what lets the stream keep whole tiles only (Chronon's
  "sawtooth" windows, https://chronon.ai/Tiled_Architecture.html). `window=None` is everything up to T: a running sum.
- *Values.* A sum is the float64 nearest to the mathematically exact sum of the float64 inputs (`exact`), so it depends on
  no order, no grouping and no start of the read, and what leaves a window may be subtracted. A mean is that rounded sum
  divided by the count, in float64. Over no values a sum and a count are 0, a mean, minimum and maximum are null. -0.0 is
  taken for 0.0, and an infinite input is an error.
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
    """One declared aggregation: `function` of `column` over the window that ends at T; `window=None` is a running sum up to T."""

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
    def event_triggered(self) -> bool:
        return self.recipe.trigger == "event"

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


def window_start(plan: ViewPlan, moment: datetime, window: timedelta) -> datetime:
    """The time after which an event lies in the window that ends at `moment`, rounded down to the hop. Raises ValueError
    for a view without windows."""
    if plan.hop is None:
        raise ValueError(f"view {plan.name} has no windows")
    return EPOCH + (moment - window - EPOCH) // plan.hop * plan.hop


def tick_range(plan: ViewPlan, days: DayRange, now: datetime | None = None) -> tuple[datetime, datetime] | None:
    """First and last time that rows of the days can have (00:00 included, the next day's 00:00 not), none after `now`.

    Ticks, or for an event-triggered view any microsecond. None where the days hold no such time yet.
    """
    step = 1 if plan.event_triggered else microseconds(plan.cadence)
    first = -(-since_epoch(_midnight(days, 0)) // step)
    last = (since_epoch(_midnight(days, 1)) - 1) // step
    if now is not None:
        last = min(last, since_epoch(now) // step)
    if last < first:
        return None
    return EPOCH + first * step * _MICROSECOND, EPOCH + last * step * _MICROSECOND


def required_days(plan: ViewPlan, days: DayRange) -> dict[str, DayRange]:
    """For each validated source, the days whose rows the view's values on `days` are made from."""
    start = _midnight(days, 0)
    begins = {
        name: start - lookback if plan.hop is None else window_start(plan, start, lookback) for name, lookback in plan.recipe.inputs.items()
    }
    return {source: DayRange(begin.date(), days.last) for source, begin in begins.items()}


def _midnight(days: DayRange, after: int) -> datetime:
    """00:00 UTC of the first day (`after=0`), or of the day after the last (`after=1`)."""
    day = days.last + timedelta(days=1) if after else days.first
    return datetime.combine(day, time.min, UTC)
