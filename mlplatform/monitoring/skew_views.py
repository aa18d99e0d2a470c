"""Served values of one stored view against the rows of its table, as they were available at the request.

Belongs here: which row was served, which may have been, and the name of what went wrong. Does not belong here:
request-time features (`skew_requests`), reading tables.

A row (event time e, created c) is available from max(e, c). At T the newest available row should be served, newest by
(e, c). A value takes up to the propagation budget from the table to the online store, so any row may be served that is
not older than the newest one available at T - budget, and no row that was not available at T.

Where the record says that the online store could not be reached (`__away`), one thing is excused: that a newer row was not
served. Everything else is judged as ever: what was served is a row's values and of its time, or the defaults and said so.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mlplatform.contracts import ContractView
from mlplatform.feature_store.join import latest_known
from mlplatform.monitoring.skew_faults import NEVER, OK, Flags, Floats, Judged, Micros, bits, differs, faults_of

AT, AGE, IMPUTED, AWAY = "__at", "__age_us", "__imputed", "__away"
EVENT, CREATED = "event_timestamp", "created"

Positions = npt.NDArray[np.int64]

# A newer value was there, and was not served.
_BEHIND = ("value_not_used", "newer_value_lost", "late_value", "correction_lost")
_MICROSECOND = timedelta(microseconds=1)
_PART = 5_000
_QUARTER_US = timedelta(minutes=15) // _MICROSECOND
# Zones lie between UTC-12 and UTC+14, in quarters of an hour.
LARGEST_SHIFT = timedelta(hours=14)


def judge_view(
    view: ContractView,
    features: Sequence[str],
    asked: pl.DataFrame,
    served: Floats,
    rows: pl.DataFrame,
    propagation: timedelta,
    also: Sequence[str] = (),
) -> Judged:
    """Compares n served rows of a view.

    `features`: the view's features that the model takes, the columns of `served` (n, features). `asked` has n rows: the
    join keys, `__at` (T), `__age_us` (Int64, null where no value was found), `__imputed` and `__away`. `rows` has join keys,
    `event_timestamp`, `created` and the features, of every event time from which a value may have been served or should
    have been; nulls stand for the view's default where it declares one. `also`: further features of the view whose rebuilt
    values are wanted.
    """
    return _Comparison(view, features, asked, served, rows, propagation).judged(also)


class _Comparison:
    """Row positions are those in `rows` sorted by (event, created): of one entity, the greater is the newer. -1 is none."""

    def __init__(
        self, view: ContractView, features: Sequence[str], asked: pl.DataFrame, served: Floats, rows: pl.DataFrame, propagation: timedelta
    ) -> None:
        rows = rows.sort(EVENT, CREATED, maintain_order=True)
        self.view, self.features, self.asked, self.served, self.rows = view, tuple(features), asked, served, rows
        self.n = asked.height
        self.at = _micros(asked[AT])
        self.age = asked[AGE].fill_null(NEVER).to_numpy()
        self.imputed: Flags = asked[IMPUTED].to_numpy()
        self.away: Flags = asked[AWAY].to_numpy()
        self.found: Flags = self.age != NEVER
        self.event, self.created = _micros(rows[EVENT]), _micros(rows[CREATED])
        self.usable = np.maximum(self.event, self.created)
        self.default = self._defaults(self.features)
        self.values = self._stored(self.features)
        self.ttl_us = round(view.ttl_s * 1e6) or np.iinfo(np.int64).max  # 0: never expires, as in Feast
        self.newest = self._latest(timedelta(0))
        # Longer than the budget: a value that was available for just that long may still be on its way.
        self.settled = self._latest(propagation + _MICROSECOND)

    def judged(self, also: Sequence[str]) -> Judged:
        self.matched, self.same_event, self.unborn = self._served_rows()
        fault = faults_of(self.n)
        for rows, judge in (
            (~self.found & ~self.imputed, self._judge_untold),
            (self.imputed, self._judge_imputed),
            (self.found & ~self.imputed, self._judge_found),
        ):
            judge(np.flatnonzero(rows), fault)
        fault[self._excused(fault)] = OK
        target = np.where(self._fresh(self.settled), self.settled, np.where(self._fresh(self.newest), self.newest, -1))
        # Where the row of the served time is there with other values, it is the one to hold against them.
        target = np.where(np.isin(fault, ("value_differs", "default_filled_silently")) & (self.same_event >= 0), self.same_event, target)
        target = np.where(fault == OK, self.matched, target)
        # What a function was given is what was served, right or wrong, so that one fault is not told as two.
        read = np.where(self.imputed, -1, np.where(self.matched >= 0, self.matched, target))
        return Judged(
            self.view.name,
            self.features,
            fault,
            self.served,
            self._at(target, self.values, self.default),
            self.view.join_keys,
            self._lag(),
            {
                "served_event": np.where(self.found, self.at - self.age, NEVER),
                "expected_event": self._take(self.event, target, NEVER),
                "expected_created": self._take(self.created, target, NEVER),
            },
            dict(zip(also, self._at(read, self._stored(also), self._defaults(also)).T, strict=True)),
            self.away,
        )

    def _excused(self, fault: npt.NDArray[np.object_]) -> Flags:
        """Where a store that was away explains the fault. A value that was at hand and good is not replaced for that."""
        at_hand = self.imputed & self.found & (self.age <= self.ttl_us)
        return np.asarray(self.away & ~at_hand & np.isin(fault, _BEHIND))

    # --- the three ways a view can have been served ---

    def _judge_untold(self, rows: Positions, fault: npt.NDArray[np.object_]) -> None:
        """No value was found, yet nothing says that it was replaced."""
        filled = ~differs(self.served[rows], self.default[None, :]).any(axis=1)
        fault[rows] = np.where(filled, "default_filled_silently", "unknown_row")

    def _judge_imputed(self, rows: Positions, fault: npt.NDArray[np.object_]) -> None:
        """The defaults, said so: right where no value within the ttl had been there for long enough."""
        wrong = differs(self.served[rows], self.default[None, :]).any(axis=1)
        found, fresh = self.found[rows], self._fresh(self.settled)[rows]
        unused = np.where(found, self.age[rows] <= self.ttl_us, fresh)
        old = self.same_event[rows]
        overtaken = np.where((old >= 0) & (self._made(old) > self._made(self.settled[rows])), "late_value", "newer_value_lost")
        fault[rows] = np.select([wrong, unused, found & fresh], ["wrong_default", "value_not_used", overtaken], OK)

    def _judge_found(self, rows: Positions, fault: npt.NDArray[np.object_]) -> None:
        matched, settled = self.matched[rows], self.settled[rows]
        expired = self.age[rows] > self.ttl_us
        # A row that was too old to be written when it became available is not missed.
        lost = (matched < settled) & self._fresh(self.settled)[rows]
        same = self._take(self.event, matched, NEVER) == self._take(self.event, settled, NEVER)
        late = self._made(matched) > self._made(settled)
        fault[rows] = np.select(
            [matched < 0, expired & (self.view.on_stale != "serve"), lost & same, lost & late, lost],
            [self._unmatched(rows, matched < 0), "ttl_ignored", "correction_lost", "late_value", "newer_value_lost"],
            OK,
        )

    def _unmatched(self, rows: Positions, which: Flags) -> npt.NDArray[np.object_]:
        """Names for values that are those of no row with their time."""
        names = faults_of(len(rows))
        if not which.any():
            return names
        beside = self.same_event[rows]
        expected = self._take(self.values, beside, np.nan)
        filled = (beside >= 0) & (~differs(self.served[rows], expected) | ~differs(self.served[rows], self.default[None, :])).all(axis=1)
        shifted = np.zeros(len(rows), dtype=np.bool_)
        candidates = np.flatnonzero(which)
        # In parts: values that seldom change pair with every row of their entity.
        for start in range(0, len(candidates), _PART):
            part = candidates[start : start + _PART]
            shifted[part] = self._shifted(rows[part])
        future = self.unborn[rows] | (self.age[rows] < 0)
        names[:] = np.select(
            [filled, shifted, future, beside >= 0],
            ["default_filled_silently", "time_shift", "from_the_future", "value_differs"],
            "unknown_row",
        )
        return names

    # --- rows ---

    def _defaults(self, features: Sequence[str]) -> Floats:
        declared = [self.view.defaults.get(name) for name in features]
        return np.array([np.nan if d is None else d for d in declared], dtype=np.float64)

    def _stored(self, features: Sequence[str]) -> Floats:
        """The rows' values, shape (rows, features), a default where there is none."""
        if not features:
            return np.empty((self.rows.height, 0))
        values = self.rows.select(pl.col(name).cast(pl.Float64).fill_null(np.nan) for name in features).to_numpy()
        return np.where(np.isnan(values), self._defaults(features), values)

    def _at(self, positions: Positions, values: Floats, defaults: Floats) -> Floats:
        """The values of a row per prediction, the defaults where it has none."""
        return np.where((positions >= 0)[:, None], self._take(values, positions, np.nan), defaults)

    def _latest(self, before: timedelta) -> Positions:
        """The newest row that was available `before` T."""
        questions = self.asked.with_columns(pl.col(AT) - before)
        on = {key: key for key in self.view.join_keys}
        found = latest_known(questions, self.rows, on=on, at=AT, event=EVENT, created=CREATED)
        return np.asarray(found.cast(pl.Int64).fill_null(-1).to_numpy())

    def _served_rows(self) -> tuple[Positions, Positions, Flags]:
        """Per prediction: the newest available row of the served time with the served values; the newest of that time with
        any values; whether a row of that time with these values came only after the request."""
        matched, same_event = (np.full(self.n, -1, dtype=np.int64) for _ in range(2))
        unborn = np.zeros(self.n, dtype=np.bool_)
        asked = self._keys(self.asked).with_columns(pl.Series("__event", np.where(self.found, self.at - self.age, NEVER)))
        i, position = _pairs(asked, self.found, self._keys(self.rows).with_columns(pl.Series("__event", self.event)))
        there = self.usable[position] <= self.at[i]
        equal = ~differs(self.served[i], self.values[position]).any(axis=1)
        # The last assignment stands: the greatest position.
        same_event[i[there]] = position[there]
        matched[i[there & equal]] = position[there & equal]
        unborn[i[~there & equal]] = True
        return matched, same_event, unborn

    def _shifted(self, rows: Positions) -> Flags:
        """Whether the served values are those of another time of the entity, a time zone's distance away."""
        told = np.asarray(np.isfinite(self.served[rows]).any(axis=1))  # a vector of nothing is everywhere
        asked = self._keys(self.asked)[rows].with_columns(_bit_columns(self.served[rows]))
        i, position = _pairs(asked, told, self._keys(self.rows).with_columns(_bit_columns(self.values)))
        shift = (self.at - self.age)[rows[i]] - self.event[position]
        zone = (shift % _QUARTER_US == 0) & (np.abs(shift) <= LARGEST_SHIFT // _MICROSECOND) & (shift != 0)
        found = np.zeros(len(rows), dtype=np.bool_)
        found[i[zone & (self.usable[position] <= self.at[rows[i]])]] = True
        return found

    def _keys(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The join keys alone, in the table's types. The constant keeps a view without entities from having no rows."""
        keys = (pl.col(key).cast(self.rows.schema[key]).alias(f"__k{number}") for number, key in enumerate(self.view.join_keys))
        return frame.select(pl.repeat(0, pl.len(), dtype=pl.Int8).alias("__one"), *keys)

    def _fresh(self, positions: Positions) -> Flags:
        """Whether there is a row, within its ttl at T."""
        return np.asarray((positions >= 0) & (self.at - self._take(self.event, positions, 0) <= self.ttl_us))

    def _made(self, positions: Positions) -> Micros:
        return self._take(self.created, positions, NEVER)

    def _take(self, values: npt.NDArray[Any], positions: Positions, otherwise: float) -> npt.NDArray[Any]:
        if not len(values):
            return np.full((len(positions), *values.shape[1:]), otherwise, dtype=values.dtype)
        taken = values[np.maximum(positions, 0)]
        there = (positions >= 0).reshape(-1, *[1] * (values.ndim - 1))
        return np.where(there, taken, np.asarray(otherwise, dtype=values.dtype))

    def _lag(self) -> Micros:
        """How long the newest row within its ttl had been available where an older one, or none, was served by a store that answered."""
        served = np.where(self.matched >= 0, self.matched, self.same_event)
        behind = (served < self.newest) & self._fresh(self.newest)
        return np.where(behind & ~self.away, self.at - self._take(self.usable, self.newest, 0), -1)


def _micros(times: pl.Series) -> Micros:
    return np.asarray(times.dt.cast_time_unit("us").to_physical().to_numpy())


def _bit_columns(values: Floats) -> list[pl.Series]:
    return [pl.Series(f"__b{number}", column) for number, column in enumerate(bits(values).T)]


def _pairs(asked: pl.DataFrame, which: Flags, stored: pl.DataFrame) -> tuple[Positions, Positions]:
    """The row numbers of `asked` (those of `which`) and `stored` that agree in every column of `asked`, by those of `stored`."""
    found = asked.with_row_index("__i").filter(which).join(stored.with_row_index("__pos"), on=asked.columns).sort("__pos")
    i, position = (found[name].cast(pl.Int64).to_numpy() for name in ("__i", "__pos"))
    return i, position
