"""What of a fresh computation must be written, and with which `created`: nothing twice, nothing lost, history kept.

Belongs here: comparing computed rows with the ones a table holds. Does not belong here: reading or writing tables.

`created` says when the platform made a value available (DESIGN, Time):
- a row of the live time (`live_since` on) becomes available when it is computed: `now`;
- a row of the time before is history, written as it would have been had the feature existed: its own time;
- a value that differs from what the table says is a correction, whenever its row's time was: `now`. So is a row that is new
  on a day the table has rows of: a late event brought it, and nobody could have read it before.
"""

from collections.abc import Sequence
from datetime import datetime

import polars as pl

TIME = "event_timestamp"
CREATED = "created"
_TIMESTAMP = pl.Datetime("us", "UTC")


def rows_to_append(
    computed: pl.DataFrame,
    existing: pl.DataFrame,
    join_keys: Sequence[str],
    features: Sequence[str],
    *,
    now: datetime,
    live_since: datetime | None,
) -> pl.DataFrame:
    """The rows to append so that the newest row of each (entity, `event_timestamp`) is the computed one.

    `computed` has join keys, `event_timestamp` and features; `existing` the same and `created`, for the same times. An
    (entity, time) the computation no longer gives gets a row of nulls: the old value is withdrawn, not left standing. A
    feature that `existing` lacks was added to the view since: its old values are null.
    Returns `computed`'s columns with `created` before the features; empty where nothing changed, so a replay is a no-op.
    """
    identity = [*join_keys, TIME]
    if existing.is_empty():
        return _stamp(computed, pl.lit(False), join_keys, features, now, live_since)
    existing = with_features(existing, features)
    newest = existing.sort(CREATED).unique(identity, keep="last").select(*identity, *features)
    both = computed.select(*identity, *features).join(newest, on=identity, how="full", suffix="_old", coalesce=True, nulls_equal=True)
    known = newest.select(*identity, pl.lit(True).alias("_known"))
    both = both.join(known, on=identity, how="left", nulls_equal=True).with_columns(pl.col("_known").fill_null(False))
    differs = pl.any_horizontal([~pl.col(f).eq_missing(pl.col(f"{f}_old")) for f in features])
    written_days = existing.select(pl.col(TIME).dt.date().unique()).get_column(TIME)
    restated = pl.col("_known") | pl.col(TIME).dt.date().is_in(written_days.implode())
    return _stamp(both.filter(~pl.col("_known") | differs), restated, join_keys, features, now, live_since)


def with_features(rows: pl.DataFrame, features: Sequence[str]) -> pl.DataFrame:
    """Stored rows with a column of nulls for each feature they were written without."""
    return rows.with_columns(pl.lit(None, pl.Float64).alias(name) for name in features if name not in rows.columns)


def _stamp(
    rows: pl.DataFrame, correction: pl.Expr, join_keys: Sequence[str], features: Sequence[str], now: datetime, live_since: datetime | None
) -> pl.DataFrame:
    moment = pl.lit(now).cast(_TIMESTAMP)
    live = pl.lit(False) if live_since is None else pl.col(TIME) >= pl.lit(live_since).cast(_TIMESTAMP)
    created = pl.when(correction | live).then(moment).otherwise(pl.col(TIME))
    return rows.with_columns(created.alias(CREATED)).select(*join_keys, TIME, CREATED, *features)
