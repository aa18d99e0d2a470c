"""What the streaming worker reads: raw tables and what the streams hold beyond them, judged, as changes of each view's events.

Belongs here: positions, judging by group, restoring. Does not belong here: state and rows (`streaming`, room `features`).

Every entry is counted once: the raw table of a source holds the entries up to the id of its Delta transaction, the stream
is read from there on. The worker has its own position and no part in the consumer group of ingestion.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import cast

import polars as pl
from polars.exceptions import PanicException

from mlplatform.clients.lake import DAY, Lake, MissingTableError
from mlplatform.clients.stream import StreamClient, StreamError
from mlplatform.features.plan import ViewPlan
from mlplatform.features.stream_changes import GroupRows, changed_events
from mlplatform.ingestion.arrival import stamp, stream_id_of, stream_order, transaction_number
from mlplatform.ingestion.stream import parse
from mlplatform.orchestration.stream_contract import ContractWatch, Days, by_day
from mlplatform.records import DayRange
from mlplatform.settings import Settings
from mlplatform.specs import SourceSpec, StreamReader
from mlplatform.validation.split import split

START = "0-0"  # below every entry


@dataclass
class Counts:
    """Entries since the worker started: what became of each."""

    read: int = 0
    malformed: int = 0
    quarantined: int = 0
    repeated: int = 0
    too_late: int = 0


@dataclass
class Changes:
    """Changed events by view, and what kept a view from having them: its recipe is its team's own code."""

    events: dict[str, pl.DataFrame] = field(default_factory=dict)
    faults: dict[str, BaseException] = field(default_factory=dict)

    def compute(self, plans: Sequence[ViewPlan], before: Mapping[str, pl.DataFrame], after: Mapping[str, pl.DataFrame]) -> None:
        """`plans` share one function; where it, or what one of them asks of it, is at fault, each is computed by itself."""
        try:
            self.events |= changed_events(plans, before, after)
        except (Exception, PanicException) as fault:  # noqa: BLE001  # whatever a recipe raises is its view's fault
            if len(plans) == 1:
                self.faults[plans[0].name] = fault
                return
            for plan in plans:
                self.compute([plan], before, after)


@dataclass
class Batch:
    """What one round of reading brought. `changes`: of each view; `first_id`: the oldest entry's id."""

    entries: int
    changes: Changes
    drained: bool
    first_id: str | None = None


@dataclass(frozen=True)
class _Read:
    """Entries of one stream: the readable ones as raw rows."""

    rows: pl.DataFrame
    entries: int
    first_id: str | None = None


@dataclass
class _Judged:
    """Rows that keep the contract, and how many do not or are repeats."""

    rows: pl.DataFrame
    quarantined: int = 0
    repeated: int = 0
    days: Days = field(default_factory=Counter)


@dataclass
class _Family:
    """Views whose events are independent by the same column, and the recent rows of their sources."""

    column: str
    plans: list[ViewPlan]
    rows: dict[str, GroupRows] = field(default_factory=dict)


class StreamInputs:
    """The streams of some views. `keep`: how long rows are held for later rows of their group. `days`: as `StreamOptions.days`."""

    def __init__(
        self,
        settings: Settings,
        lake: Lake,
        sources: Mapping[str, SourceSpec],
        plans: Sequence[ViewPlan],
        lateness: timedelta,
        keep: timedelta,
        days: Callable[[str, datetime], DayRange] | None = None,
    ) -> None:
        self._lake, self._days = lake, days
        self._lateness, self._keep = lateness, keep
        names = sorted({name for plan in plans for name in plan.recipe.inputs})
        self.sources = {name: judging(sources[name]) for name in names}
        self._clients = {name: StreamClient(settings.connection(self._reader(name).connection)) for name in names}
        self._plans = tuple(plans)
        columns = dict.fromkeys(cast(str, plan.recipe.independent_by) for plan in plans)
        self._families = [_Family(c, [p for p in plans if p.recipe.independent_by == c]) for c in columns]
        self._references: dict[str, tuple[int, pl.DataFrame]] = {}
        self._empty: dict[str, _Judged] = {}
        self.contracts = ContractWatch(self.sources, lateness)
        # A source of several families is counted in the first.
        self._counted_in = {name: next(f.column for f in self._families if any(name in p.recipe.inputs for p in f.plans)) for name in names}
        self.positions: dict[str, str] = {}
        self.counts = {name: Counts() for name in names}
        # When the streams were last read to their end: whatever is read after that had not arrived by then.
        self.caught_up: datetime | None = None
        # Source → the last entry that came too late: once it has landed, a new start counts it.
        self.missed: dict[str, str] = {}
        self.missed_at: datetime | None = None  # the platform's time of the first of them

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    # --- restoring ---

    def restore(self, since: datetime, now: datetime, limit: int) -> Changes:
        """All events that rows from `since` on can need, from the raw tables and the streams to their end.

        Raises StreamError, and MissingTableError where rows are judged by a table that is not there yet.
        """
        self._references = {name: self._reference(name) for name in self._referred()}
        for name, spec in self.sources.items():
            nothing = self._raw_frame(name, [], now)[0]
            self._empty[name] = _Judged(split(nothing, spec, self._reference_rows()).validated)
        raw = {}
        for name in self.sources:
            raw[name], self.positions[name] = self._landed(name, since, self._plans)
            parts, entries = [raw[name]], limit
            while entries == limit:
                read = self._read(name, now, limit, None)
                parts, entries = [*parts, read.rows.select(raw[name].columns)], read.entries
            raw[name] = pl.concat(parts)
        self.caught_up, self.missed, self.missed_at = now, {}, None
        self.contracts.restart()
        changes = Changes()
        for family in self._families:
            names = sorted({name for plan in family.plans for name in plan.recipe.inputs})
            after = {name: self._judged(name, raw[name]) for name in names}
            for name in (name for name in names if self._counted_in[name] == family.column):
                self.contracts.move(name, Counter(), after[name].days)
            for plans in _by_function(family.plans):
                changes.compute(plans, {}, {name: after[name].rows for name in plans[0].recipe.inputs})
            family.rows = {name: self._held(family.column, name, raw[name], now) for name in names}
        return changes

    def restore_one(self, plan: ViewPlan, since: datetime, now: datetime, limit: int) -> pl.DataFrame:
        """All events that rows of one view from `since` on can need, up to the positions where the other views stand.

        Raises what the view's recipe raises, besides what `restore` does. Not for use while entries are `missed`.
        """
        after = {name: self._judged(name, self._up_to_now(name, plan, since, now, limit)).rows for name in plan.recipe.inputs}
        return changed_events([plan], {}, after)[plan.name]

    def _up_to_now(self, name: str, plan: ViewPlan, since: datetime, now: datetime, limit: int) -> pl.DataFrame:
        """One source's rows up to its position, from the raw table and the stream; moves no position."""
        rows, last = self._landed(name, since, [plan])
        end, client, stream = stream_order(self.positions[name]), self._clients[name], self._reader(name).stream
        parts = [_through(rows, end)]
        while stream_order(last) < end:
            entries = client.read_after(stream, last, limit)
            known = [entry for entry in entries if stream_order(entry[0]) <= end]
            parts.append(self._raw_frame(name, known, now)[0].select(rows.columns))
            if len(known) < limit:
                break
            last = known[-1][0]
        return pl.concat(parts)

    def _landed(self, name: str, since: datetime, plans: Sequence[ViewPlan]) -> tuple[pl.DataFrame, str]:
        """The raw rows from the longest lookback before `since` on, in the order they arrived; the id of the last entry landed."""
        key, reader = ("raw", name), self._reader(name)
        columns = self._raw_frame(name, [], since)[0].columns
        if not self._lake.exists(key):
            return self._raw_frame(name, [], since)[0], START
        version = self._lake.version(key)
        number = self._lake.table(key, version).transaction_version(f"stream:{reader.stream}")
        last = (stream_id_of(number) if number is not None else None) or START
        lookbacks = [plan.recipe.inputs[name] + (plan.hop or timedelta(0)) for plan in plans if name in plan.recipe.inputs]
        rows = self._lake.scan(key, None, version).filter(pl.col(DAY) >= (since - max(lookbacks)).date(), pl.col("payload").is_null())
        return _in_order(rows.collect()).select(columns), last

    def _held(self, column: str, name: str, rows: pl.DataFrame, now: datetime) -> GroupRows:
        spec = self.sources[name]
        held = GroupRows(column, cast(str, spec.time_column))
        held.add(rows.filter(pl.col(cast(str, spec.time_column)) >= now - self._keep))
        return held

    # --- reading on ---

    def read(self, now: datetime, limit: int, views: Container[str]) -> Batch:
        """Up to `limit` entries of each stream beyond its position, as changes of `views`. Raises StreamError with nothing taken in."""
        before = dict(self.positions)
        oldest = None if self.caught_up is None else self.caught_up - self._lateness
        try:
            found = {name: self._read(name, now, limit, oldest) for name in self.sources}
        except StreamError:
            self.positions = before
            raise
        drained = all(read.entries < limit for read in found.values())
        if drained:
            self.caught_up = now
        return Batch(
            entries=sum(read.entries for read in found.values()),
            changes=self._changes({name: read.rows for name, read in found.items() if not read.rows.is_empty()}, views),
            drained=drained,
            first_id=min((read.first_id for read in found.values() if read.first_id), default=None, key=_milliseconds),
        )

    def forget(self) -> None:
        """Drops rows of groups that are over."""
        if self.caught_up is not None:
            for family in self._families:
                for rows in family.rows.values():
                    rows.forget(self.caught_up - self._keep)
            self.contracts.forget((self.caught_up - self._keep).date())

    def refresh_references(self) -> None:
        """Takes over newer versions of the tables that rows are judged by."""
        for name, (version, _) in list(self._references.items()):
            if self._lake.version(("validated", name)) != version:
                self._references[name] = self._reference(name)

    def missed_have_landed(self) -> bool:
        """Whether the raw tables hold every entry that came too late for this worker."""
        return all(self._landed_through(name) >= transaction_number(last) for name, last in self.missed.items())

    def _landed_through(self, name: str) -> int:
        return self._lake.transaction(("raw", name), f"stream:{self._reader(name).stream}")

    def behind_s(self) -> float:
        """Seconds between the newest entry of any stream and the last one read of it, by their ids."""
        behind = [0.0]
        for name, client in self._clients.items():
            newest = client.last_id(self._reader(name).stream)
            if newest is not None and stream_order(newest) > stream_order(self.positions[name]):
                behind.append((_milliseconds(newest) - _milliseconds(self.positions[name])) / 1000)
        return max(behind)

    def _read(self, name: str, now: datetime, limit: int, oldest: datetime | None) -> _Read:
        """Up to `limit` entries beyond the position, which moves on. Rows before `oldest` are left out and counted."""
        entries = self._clients[name].read_after(self._reader(name).stream, self.positions[name], limit)
        rows, malformed = self._raw_frame(name, entries, now)
        if not entries:
            return _Read(rows, 0)
        counts, moment = self.counts[name], pl.col(cast(str, self.sources[name].time_column))
        counts.read += len(entries)
        counts.malformed += malformed
        self.positions[name] = entries[-1][0]
        in_time = rows if oldest is None else rows.filter(moment >= oldest)
        if in_time.height < rows.height:
            counts.too_late += rows.height - in_time.height
            self.missed[name] = entries[-1][0]
            self.missed_at = self.missed_at or now
        return _Read(in_time, len(entries), entries[0][0])

    def _raw_frame(self, name: str, entries: Sequence[tuple[str, Mapping[str, bytes]]], now: datetime) -> tuple[pl.DataFrame, int]:
        """The entries as raw rows, and how many cannot be read."""
        spec = self.sources[name]
        within = (cast(str, spec.time_column), self._days(name, now)) if self._days else None
        batch = parse(entries, spec.contract, now, within)
        rows = stamp(batch.rows, now, spec.time_column).with_columns(pl.lit(None, pl.String).alias("payload"))
        return rows, batch.malformed.height

    def _changes(self, fresh: Mapping[str, pl.DataFrame], views: Container[str]) -> Changes:
        changes = Changes()
        for family in self._families:
            arrived = {name: rows for name, rows in fresh.items() if name in family.rows}
            groups = pl.concat([rows[family.column] for rows in arrived.values()]).unique().to_list() if arrived else []
            known = {name: held.of(groups) for name, held in family.rows.items()}
            before = {name: self._judged(name, rows) for name, rows in known.items()}
            after = {name: self._judged(name, _joined(known[name], arrived[name])) if name in arrived else before[name] for name in known}
            for plans in _by_function([plan for plan in family.plans if plan.name in views]):
                inputs = plans[0].recipe.inputs
                if arrived.keys() & inputs.keys():
                    changes.compute(plans, {n: before[n].rows for n in inputs}, {n: after[n].rows for n in inputs})
            for name, rows in arrived.items():
                family.rows[name].add(rows)
                if self._counted_in[name] != family.column:
                    continue
                self.contracts.move(name, before[name].days, after[name].days)
                self.counts[name].quarantined += after[name].quarantined - before[name].quarantined
                self.counts[name].repeated += after[name].repeated - before[name].repeated
        return changes

    # --- judging ---

    def _judged(self, name: str, rows: pl.DataFrame | None) -> _Judged:
        if rows is None or rows.is_empty():
            return self._empty[name]
        result = split(rows, self.sources[name], self._reference_rows())
        return _Judged(result.validated, result.summary.quarantined, result.summary.redelivered, by_day(result))

    def _referred(self) -> set[str]:
        return {reference.source for spec in self.sources.values() for reference in spec.contract.references}

    def _reference(self, name: str) -> tuple[int, pl.DataFrame]:
        key = ("validated", name)
        if not self._lake.exists(key):
            raise MissingTableError(f"rows are judged by the table validated/{name}, which does not exist yet: materialize it")
        version = self._lake.version(key)
        return version, self._lake.read(key, version=version)

    def _reference_rows(self) -> dict[str, pl.DataFrame]:
        return {name: rows for name, (_, rows) in self._references.items()}

    def _reader(self, name: str) -> StreamReader:
        reader = self.sources[name].reader
        assert isinstance(reader, StreamReader)  # `stream_choice` sees to it
        return reader


def judging(spec: SourceSpec) -> SourceSpec:
    """The source with what sets rows aside; what only warns moves no row."""
    contract = spec.contract
    kept = {
        "references": tuple(r for r in contract.references if r.on_missing == "quarantine"),
        "rules": tuple(r for r in contract.rules if r.on_broken == "quarantine"),
    }
    return spec.model_copy(update={"contract": contract.model_copy(update=kept)})


def _by_function(plans: Sequence[ViewPlan]) -> list[list[ViewPlan]]:
    """Views that share a recipe's events and inputs, so that these are computed once."""
    found: dict[tuple[object, tuple[str, ...]], list[ViewPlan]] = {}
    for plan in plans:
        found.setdefault((plan.recipe.events, tuple(sorted(plan.recipe.inputs))), []).append(plan)
    return list(found.values())


def _joined(known: pl.DataFrame | None, arrived: pl.DataFrame) -> pl.DataFrame:
    return arrived if known is None else pl.concat([known, arrived.select(known.columns)])


def _in_order(rows: pl.DataFrame) -> pl.DataFrame:
    """By arrival, as validation orders versions; within it by stream, where files may have been merged in any order."""
    return rows.sort("received_at", *_id_parts(), maintain_order=True)


def _through(rows: pl.DataFrame, end: tuple[int, int]) -> pl.DataFrame:
    """Without the entries after `end`; what an archive brought has no id and stays."""
    ms, number = _id_parts()
    return rows.filter((ms < end[0]) | ((ms == end[0]) & (number <= end[1])))


def _id_parts() -> list[pl.Expr]:
    """Milliseconds and number of an entry's id, 0 where there is none."""
    parts = pl.col("stream_id").str.splitn("-", 2)
    return [parts.struct.field(f"field_{i}").cast(pl.UInt64, strict=False).fill_null(0) for i in (0, 1)]


def _milliseconds(entry_id: str) -> int:
    return stream_order(entry_id)[0]
