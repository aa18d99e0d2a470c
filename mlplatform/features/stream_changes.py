"""From new rows to changed events: the rows of recent groups, and the difference that new ones make.

Belongs here: which rows belong together (`FeatureRecipe.independent_by`), and events added and taken away. Does not belong
here: judging rows (`mlplatform.validation`), windows (`stream_view`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import polars as pl

from mlplatform.features.plan import TIME, TIMESTAMP, FeatureError, ViewPlan
from mlplatform.features.stream_view import COPIES

CHUNK = 4096  # rows looked through together when one of their groups is asked for


@dataclass
class _Chunk:
    rows: pl.DataFrame
    newest: datetime | None


@dataclass
class GroupRows:
    """Rows of one source in the order they came, found by the column `group`, forgotten by `time_column`."""

    group: str
    time_column: str
    _chunks: dict[int, _Chunk] = field(default_factory=dict)
    _where: dict[object, tuple[int, ...]] = field(default_factory=dict)  # group → chunks with rows of it
    _last: int = -1

    def add(self, rows: pl.DataFrame) -> None:
        if rows.is_empty():
            return
        last = self._chunks.get(self._last)
        if last is None or last.rows.height >= CHUNK:
            self._last += 1
            self._chunks[self._last] = _Chunk(rows.clone(), _newest(rows, self.time_column))
        else:
            moments = [m for m in (last.newest, _newest(rows, self.time_column)) if m is not None]
            last.rows, last.newest = last.rows.vstack(rows), max(moments, default=None)
            if last.rows.n_chunks() > 64:
                last.rows = last.rows.rechunk()
        for group in rows[self.group].unique().to_list():
            known = self._where.get(group, ())
            if self._last not in known:
                self._where[group] = (*known, self._last)

    def of(self, groups: Sequence[object]) -> pl.DataFrame | None:
        """The rows of some groups, in the order they came; None where there are none."""
        wanted: dict[int, list[object]] = {}
        for group in groups:
            for number in self._where.get(group, ()):
                wanted.setdefault(number, []).append(group)
        if not wanted:
            return None
        column = pl.col(self.group)
        return pl.concat(self._chunks[number].rows.filter(column.is_in(wanted[number])) for number in sorted(wanted))

    def forget(self, before: datetime) -> None:
        """Drops rows whose chunk holds nothing from `before` on."""
        for number in [n for n, chunk in self._chunks.items() if chunk.newest is None or chunk.newest < before]:
            for group in self._chunks.pop(number).rows[self.group].unique().to_list():
                left = tuple(n for n in self._where[group] if n != number)
                if left:
                    self._where[group] = left
                else:
                    del self._where[group]

    @property
    def height(self) -> int:
        return sum(chunk.rows.height for chunk in self._chunks.values())


def _newest(rows: pl.DataFrame, column: str) -> datetime | None:
    moment = rows[column].max()
    return moment if isinstance(moment, datetime) else None


Tables = Mapping[str, pl.DataFrame]


def changed_events(plans: Sequence[ViewPlan], before: Tables, after: Tables) -> dict[str, pl.DataFrame]:
    """Per view the events that `after` has and `before` had not (`__copies` > 0), and the other way round (< 0).

    `plans` share one `events` function; the tables hold all rows of the groups that changed, before and after the change.
    """
    recipe = plans[0].recipe
    assert recipe.events is not None  # windowed views only
    columns = list(dict.fromkeys(c for plan in plans for c in _columns(plan)))
    fresh = _events(plans, recipe.events(after), columns).with_columns(pl.lit(1, pl.Int64).alias(COPIES))
    if any(not rows.is_empty() for rows in before.values()):
        stale = _events(plans, recipe.events(before), columns).with_columns(pl.lit(-1, pl.Int64).alias(COPIES))
        fresh = pl.concat([fresh, stale], how="vertical_relaxed").group_by(columns).agg(pl.col(COPIES).sum()).filter(pl.col(COPIES) != 0)
    return {plan.name: _of_view(plan, fresh) for plan in plans}


def _columns(plan: ViewPlan) -> tuple[str, ...]:
    return (*plan.join_keys, TIME, *dict.fromkeys(a.column for a in plan.aggregations))


def _events(plans: Sequence[ViewPlan], events: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    if missing := [c for c in columns if c not in events.columns]:
        raise FeatureError(f"views {', '.join(p.name for p in plans)}: events() gave no column {missing}")
    if events.schema[TIME] != TIMESTAMP:
        raise FeatureError(f"view {plans[0].name}: event_timestamp is {events.schema[TIME]}, it must be Datetime('us', 'UTC')")
    numbers = {a.column for plan in plans for a in plan.aggregations}
    # NaN and null both mean that the event says nothing about the column.
    return events.select(pl.col(c).cast(pl.Float64).fill_nan(None) if c in numbers else pl.col(c) for c in columns)


def _of_view(plan: ViewPlan, events: pl.DataFrame) -> pl.DataFrame:
    """An event without a join key belongs to no entity and is left out."""
    return events.select(*_columns(plan), COPIES).filter(pl.all_horizontal(pl.col(plan.join_keys).is_not_null()))
