"""Fingerprints of the lake's tables: recorded with each append, read from the commits, or computed from the rows.

Belongs here: what a commit says about the content, and what follows from a table's commits. Does not belong here: the
definition of a fingerprint (`mlplatform.fingerprint`), writing rows (`clients.lake`).

An appending commit records two fingerprints (`fingerprint.Mark`): of its own rows, and of the whole table after it, with the version
that the whole is counted from. Appends may race: Delta lets both through, and the later commit then counts from a version before
the earlier one. `recorded` sees that, and adds the rows of the commits in between, so the sum is right whatever the order was. A
writer that knows nothing of the whole, as Feast's, records its own rows only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import polars as pl
from deltalake import DeltaTable

from mlplatform.clients.lake import DAY, Key, Lake
from mlplatform.fingerprint import COMMIT_KEY, Fingerprint, Mark, fingerprint, total

_BEFORE_THE_FIRST: Final = -1
_ROWS_AT_ONCE: Final = 1_000_000
# Commits that move or describe rows and change none of them.
_SAME_ROWS: Final = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "ADD CONSTRAINT", "SET TBLPROPERTIES", "UPDATE FIELD METADATA"})


def mark_append(lake: Lake, key: Key, rows: pl.DataFrame) -> Mark:
    """The mark of an append of `rows`, as they will be stored, to the table. Computed over `rows` alone.

    Where the table's past is not recorded without a gap (a writer that records nothing, an older definition), its rows are
    read once; from this append on the sum goes on by itself.
    """
    own = fingerprint(rows)
    if not lake.exists(key):
        return Mark(own, own, _BEFORE_THE_FIRST)
    version = lake.version(key)
    return Mark(own, of_table(lake, key, version) + own, version)


def of_table(lake: Lake, key: Key, version: int | None = None) -> Fingerprint:
    """The fingerprint of the table at `version` (the newest unless said): as recorded, or else computed."""
    known = recorded(lake, key, version)
    return computed(lake, key, version) if known is None else known


def recorded(lake: Lake, key: Key, version: int | None = None) -> Fingerprint | None:
    """What the commits say of the table at `version`, without reading a row; None where they do not say it all.

    Raises MissingTableError.
    """
    # Most often the newest commit says it all; the whole history is long.
    for limit in (1, None):
        found = _sum([c for c in lake.commits(key, limit) if version is None or c["version"] <= version])
        if found is not None:
            return found
    return None


def computed(lake: Lake, key: Key, version: int | None = None) -> Fingerprint:
    """The fingerprint of the table's rows. Of a table with daily partitions about `_ROWS_AT_ONCE` rows are in memory at a
    time (a day's at least), of any other all. Raises MissingTableError."""
    table = lake.table(key, version)
    frame = lake.scan(key, version=version)
    nothing = fingerprint(pl.DataFrame(schema=frame.collect_schema()))
    if DAY not in table.metadata().partition_columns:
        return nothing + fingerprint(frame.collect())
    return nothing + total(fingerprint(frame.filter(part).collect()) for part in _parts(table))


def _parts(table: DeltaTable) -> list[pl.Expr]:
    """Conditions that each take some days, and together all rows."""
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    days = actions.group_by(pl.col(f"partition.{DAY}").alias(DAY)).agg(pl.col("num_records").sum()).drop_nulls(DAY).sort(DAY)
    part = pl.col("num_records").cum_sum() // _ROWS_AT_ONCE
    ranges = days.group_by(part.alias("part")).agg(pl.col(DAY).min().alias("first"), pl.col(DAY).max().alias("last"))
    return [pl.col(DAY).is_null(), *(pl.col(DAY).is_between(first, last) for first, last in ranges.select("first", "last").iter_rows())]


def _sum(commits: Sequence[Mapping[str, Any]]) -> Fingerprint | None:
    """The table's fingerprint from its newest commits, newest first; None where they are not enough to tell."""
    writes = [commit for commit in commits if commit.get("operation") not in _SAME_ROWS]
    later: list[Fingerprint] = []
    for position, commit in enumerate(writes):
        mark = Mark.parse(commit[COMMIT_KEY]) if COMMIT_KEY in commit else None
        if mark is None:
            return None
        # Nothing came between the counting and the commit: the version counted from is the one before this, or only moved since.
        before = int(writes[position + 1]["version"]) if position + 1 < len(writes) else int(commit["version"]) - 1
        if mark.table is not None and mark.after >= before:
            return total([*later, mark.table])
        later.append(mark.rows)
        if commit["version"] == 0:
            return total(later)
    return None
