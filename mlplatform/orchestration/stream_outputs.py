"""What the streaming worker writes: a view's rows to its Delta table, then the newest to Redis.

Belongs here: the order of the two, comparing where others write too, `created`. Does not belong here: which rows are due.

Delta first: a value that can be read online is in the table, so a crash between the two is mended by writing the
table's newest rows online once more (compare-and-set makes that harmless).
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import cast

import polars as pl

from mlplatform.clients.fingerprints import mark_append
from mlplatform.clients.lake import Lake, TableMovedError, with_day
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.commands import Client
from mlplatform.feature_store.writer import write_frame
from mlplatform.features.plan import TIME, TIMESTAMP, ViewPlan
from mlplatform.features.restate import CREATED
from mlplatform.orchestration.feature_tables import append_changes, newest_within_ttl, recorded_live_since, with_live_since
from mlplatform.records import DayRange

# Commits after which small files are merged: a reader opens every file of a day.
COMPACT_EVERY = 200

_MICROSECOND = timedelta(microseconds=1)


class ViewOutput:
    """Where one view's rows go. `online_behind`: rows are in the table that may not be in Redis."""

    def __init__(self, lake: Lake, online: Client, plan: ViewPlan) -> None:
        self.plan = plan
        self.newest: datetime | None = None  # the newest row's time
        self.online_behind = False
        self._lake, self._online = lake, online
        self._key = ("offline", plan.name)
        self._version = -1  # of the table as this worker left it
        self._commits = 0
        self._live_since: datetime | None = None
        self._created: datetime | None = None
        self._pending: pl.DataFrame | None = None

    def open(self, now: datetime) -> datetime | None:
        """Looks at the table as it stands. Returns the newest row's time, None for no rows."""
        self._live_since = recorded_live_since(self._lake, self.plan) or now
        there = self._lake.exists(self._key)
        self.newest = self._lake.maximum(self._key, TIME) if there else None
        self._created = self._lake.maximum(self._key, CREATED) if there else None
        return self.newest

    def settle(self, rows: pl.DataFrame, since: datetime, now: datetime, metadata: Mapping[str, str]) -> int:
        """After a start: `rows` are all the view's rows of [since, now]; appends what the table lacks or has otherwise."""
        first, last = pl.lit(since), pl.lit(now)
        appended = append_changes(
            self._lake,
            self.plan,
            rows,
            DayRange(since.date(), now.date()),
            now=self._next_created(now),
            live_since=self._live_since,
            metadata=metadata,
            scope=lambda existing: existing.filter(pl.col(TIME).is_between(first, last)),
        )
        self._wrote(rows)
        self.online_behind = True
        return int(appended.height)

    def write(self, rows: pl.DataFrame, now: datetime, metadata: Mapping[str, str]) -> int:
        """Appends rows that became due or changed. Returns how many the table had not."""
        appended = self._append(rows, self._next_created(now), metadata)
        # What others wrote in the meantime, only the table knows.
        self._pending = appended if appended.height == rows.height and not self.online_behind else None
        self.online_behind = True
        self._wrote(rows)
        self._commits += 1
        if self._commits % COMPACT_EVERY == 0:
            self._lake.compact(self._key, with_live_since(metadata, self._live_since))
            self._version = self._lake.version(self._key)
        return int(appended.height)

    def publish(self, now: datetime) -> None:
        """Brings Redis up to the table: the rows just written, or after a fault each entity's newest. Raises RedisError."""
        if not self.online_behind:
            return
        rows, self._pending = self._pending, None
        if rows is None:
            rows = newest_within_ttl(self._lake, self.plan, max(now, self._created or now))
        write_frame(self._online, ONLINE_PROJECT, self.plan.name, self.plan.join_keys, self.plan.features, rows)
        self.online_behind = False

    def _append(self, rows: pl.DataFrame, created: datetime, metadata: Mapping[str, str]) -> pl.DataFrame:
        first, last = cast(datetime, rows[TIME].min()), cast(datetime, rows[TIME].max())
        if self._live_since is not None and first >= self._live_since:
            # Nobody else wrote since: the table has what this worker gave, and every row is new or changed.
            order = (*self.plan.join_keys, TIME, CREATED, *self.plan.features)
            stamped = rows.with_columns(pl.lit(created).cast(TIMESTAMP).alias(CREATED)).select(order)
            try:
                stored = with_day(stamped, TIME)
                told = with_live_since(metadata, self._live_since) | mark_append(self._lake, self._key, stored).metadata()
                self._lake.append(self._key, stored, metadata=told, read_at=self._version)
            except TableMovedError:
                pass
            else:
                return stamped
        identity = rows.select(*self.plan.join_keys, TIME)
        return append_changes(
            self._lake,
            self.plan,
            rows,
            DayRange(first.date(), last.date()),
            now=created,
            live_since=self._live_since,
            metadata=metadata,
            scope=lambda existing: existing.join(identity, on=identity.columns, how="semi"),
        )

    def _wrote(self, rows: pl.DataFrame) -> None:
        self._version = self._lake.version(self._key)
        last = rows[TIME].max()
        if isinstance(last, datetime):
            self.newest = last if self.newest is None else max(self.newest, last)

    def _next_created(self, now: datetime) -> datetime:
        """The time, but always later than before: of two values of one row the later created wins, also while a clock stands."""
        self._created = now if self._created is None or now > self._created else self._created + _MICROSECOND
        return self._created
