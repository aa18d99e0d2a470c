"""When each event of the demo's world is delivered: mostly at once, sometimes late, sometimes twice.

Belongs here: the seeded delivery model and reading it up to a time. Does not belong here: transport (`sources`).
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

from mlplatform.local.nycflights import UTC_US, World

# Event source → the column with the time the event is about; the stream is named `flights.<source>`.
EVENT_TIME = {"schedules": "published_at", "departures": "departed_at", "arrivals": "known_at"}
DELIVERED_AT = "delivered_at"
_US_PER_MINUTE = 60_000_000


@dataclass(frozen=True)
class DeliveryModel:
    """Shares and delays of a stream that behaves like a real one. The same seed gives the same deliveries.

    `late_share` of the events arrive 1–45 minutes after their time, hence behind younger ones; `duplicate_share` are
    delivered again, with the same `event_id`, 1–30 minutes after the first time.
    """

    seed: int = 2013
    late_share: float = 0.01
    duplicate_share: float = 0.003
    max_late_min: int = 45
    max_repeat_min: int = 30

    def deliveries(self, events: pl.DataFrame, time_column: str, salt: int) -> pl.DataFrame:
        """One row per delivery: the event's columns and `delivered_at`, in the order of delivery.

        `salt` sets sources apart that share the seed. Delays are whole minutes, as the data's times are.
        """
        random = np.random.default_rng([self.seed, salt])
        n = events.height
        late = np.where(random.random(n) < self.late_share, random.integers(1, self.max_late_min + 1, n), 0)
        repeated = np.flatnonzero(random.random(n) < self.duplicate_share)
        again = random.integers(1, self.max_repeat_min + 1, len(repeated)) + late[repeated]
        first = events.with_columns(_delivered(time_column, late))
        second = events[repeated].with_columns(_delivered(time_column, again))
        return pl.concat([first, second]).sort(DELIVERED_AT, "event_id", maintain_order=True)


def _delivered(time_column: str, delay_min: np.ndarray) -> pl.Expr:
    delay = pl.Series((delay_min * _US_PER_MINUTE).astype(np.int64)).cast(pl.Duration("us"))
    return (pl.col(time_column) + delay).cast(UTC_US).alias(DELIVERED_AT)


def all_deliveries(world: World, model: DeliveryModel) -> dict[str, pl.DataFrame]:
    """The year's deliveries by source (`schedules`, `departures`, `arrivals`), each in the order of delivery."""
    return {
        source: model.deliveries(getattr(world, source), time_column, salt) for salt, (source, time_column) in enumerate(EVENT_TIME.items())
    }


def deliveries_between(deliveries: pl.DataFrame, start: datetime | None, end: datetime | None) -> pl.DataFrame:
    """Deliveries with `start <= delivered_at < end`; None is open."""
    first = 0 if start is None else deliveries[DELIVERED_AT].search_sorted(start, side="left")
    last = deliveries.height if end is None else deliveries[DELIVERED_AT].search_sorted(end, side="left")
    return deliveries[first:last]


def deliveries_until(deliveries: pl.DataFrame, now: datetime) -> pl.DataFrame:
    """Deliveries due at a clock that shows `now`: `delivered_at <= now`."""
    return deliveries[: deliveries[DELIVERED_AT].search_sorted(now, side="right")]


def write_archive(deliveries: pl.DataFrame, time_column: str, before: datetime, folder: Path) -> int:
    """Archives what was delivered before `before` as `<folder>/<YYYY-MM-DD>.parquet`, one file per UTC day of the time column.

    Columns are the event's plus `received_at`; repeats stay in. Days without an event get no file. Gives the row count.
    """
    known = deliveries_between(deliveries, None, before).rename({DELIVERED_AT: "received_at"})
    folder.mkdir(parents=True, exist_ok=True)
    for (day,), rows in known.group_by(pl.col(time_column).dt.date(), maintain_order=True):
        rows.write_parquet(folder / f"{day}.parquet", compression="lz4", statistics=False)
    return int(known.height)
