"""What a Feast retrieval does once it runs: entity frames in, feature columns beside them.

Belongs here: turning any entity frame into questions, asking each view, the retrieval job. Does not belong here: the join
itself (`join.py`), file access (`tables.py`), the Feast entry points (`offline.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.saved_dataset import SavedDatasetStorage

from mlplatform.feature_store.join import TIME, as_utc, latest_known
from mlplatform.feature_store.tables import FeatureTable, Snapshot, arrow

EVENT_TIMESTAMP = "event_timestamp"
# Questions answered at once. Fewer bound the memory further, more read the rows of a ttl before each chunk less often.
CHUNK_ROWS = 2_000_000


@dataclass(frozen=True)
class ViewQuery:
    """What is wanted of one view. Columns are named as in the table, `features` maps them to the names in the answer."""

    view: str
    table: FeatureTable
    on: dict[str, str]  # the entity frame's column → the table's
    event: str
    created: str | None
    ttl: timedelta | None
    features: dict[str, str]


class DeltaRetrievalJob(RetrievalJob):  # type: ignore[misc]  # Feast is untyped here
    """A retrieval that runs once, when its result is first asked for."""

    def __init__(
        self,
        evaluate: Callable[[], pa.Table],
        *,
        table_of: Callable[[SavedDatasetStorage], FeatureTable],
        on_demand_feature_views: Sequence[OnDemandFeatureView] = (),
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__()
        self._evaluate = evaluate
        self._table_of = table_of
        self._on_demand_feature_views = list(on_demand_feature_views)
        self._full_feature_names = full_feature_names
        self._metadata = metadata
        self._result: pa.Table | None = None

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        if self._result is None:
            self._result = self._evaluate()
        return self._result

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    def to_polars(self) -> pl.DataFrame:
        """The result with on-demand features, without a detour through pandas."""
        return pl.DataFrame(self.to_arrow())

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the result, on-demand features included. Raises SavedDatasetLocationAlreadyExists."""
        table = self._table_of(storage)
        if not allow_overwrite and table.exists():
            raise SavedDatasetLocationAlreadyExists(location=table.uri)
        table.replace(self.to_polars())


def entity_table(entity_df: object) -> tuple[pa.Table, str]:
    """Any entity frame (pandas, Polars, Arrow) as Arrow, its time column in UTC microseconds, and that column's name.

    The time column is `event_timestamp`, or else the only timestamp column. Times without a zone are UTC; a pandas column of
    mixed zones is understood. Rows keep their order. Raises TypeError, ValueError.
    """
    if isinstance(entity_df, pd.DataFrame):
        return _from_pandas(entity_df)
    if isinstance(entity_df, pl.DataFrame):
        table = arrow(entity_df)
    elif isinstance(entity_df, pa.Table):
        table = entity_df
    else:
        raise TypeError(f"this offline store takes an entity frame (pandas, Polars or Arrow), not {type(entity_df).__name__}")
    name = _time_column({f.name: pa.types.is_timestamp(f.type) for f in table.schema})
    times = pl.DataFrame({name: pl.from_arrow(table.column(name))})
    return _with_column(table, name, times.select(as_utc(name, times.schema)).get_column(name)), name


def _from_pandas(entity_df: pd.DataFrame) -> tuple[pa.Table, str]:
    name = _time_column({str(c): pd.api.types.is_datetime64_any_dtype(entity_df[c]) for c in entity_df.columns})
    # utc=True reads naive times as UTC and brings each zone of a mixed column to it.
    times = pd.to_datetime(entity_df[name], utc=True).dt.floor("us").dt.as_unit("us")
    table = pa.Table.from_pandas(entity_df.drop(columns=name), preserve_index=False)
    position = entity_df.columns.get_loc(name)
    return table.add_column(position, name, pa.array(times, pa.timestamp("us", "UTC"))).replace_schema_metadata(None), name


def _time_column(is_time: dict[str, bool]) -> str:
    if EVENT_TIMESTAMP in is_time:
        return EVENT_TIMESTAMP
    candidates = [name for name, yes in is_time.items() if yes]
    if len(candidates) != 1:
        raise ValueError(f"name the entity frame's time column {EVENT_TIMESTAMP}: its timestamp columns are {candidates}")
    return candidates[0]


def _with_column(table: pa.Table, name: str, values: pl.Series) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values.to_arrow(compat_level=pl.CompatLevel.oldest()))


def enrich(entities: pa.Table, time: str, queries: Sequence[ViewQuery], *, later_corrections: bool) -> pa.Table:
    """`entities` with each view's features beside them: the same rows, in the same order."""
    clashes = set(entities.column_names) & {name for q in queries for name in q.features.values()}
    if clashes:
        raise ValueError(f"the entity frame already has columns named like features: {sorted(clashes)}; rename them or ask for full names")
    keys = dict.fromkeys([time, *(mine for q in queries for mine in q.on)])
    if missing := [name for name in keys if name not in entities.column_names]:
        raise ValueError(f"the entity frame lacks {', '.join(missing)}; it has {', '.join(entities.column_names)}")
    asked = _Questions.of(pl.DataFrame({name: pl.from_arrow(entities.column(name)) for name in keys}), time)
    result = entities
    for query in queries:
        for name, column in _answers(asked, query, later_corrections):
            result = result.append_column(name, column)
    return result


@dataclass(frozen=True)
class _Questions:
    """Keys and times in order of time, in chunks, and each original row's place in that order (None: it is the original).

    A chunk reads no more of a table than its own stretch of time and the ttl before it, which is what bounds the memory.
    """

    time: str
    chunks: Sequence[pl.DataFrame]
    places: pl.Series | None

    @classmethod
    def of(cls, questions: pl.DataFrame, time: str) -> "_Questions":
        times = questions.get_column(time)
        if times.has_nulls():
            raise ValueError(f"column {time} has nulls: a row without a time has no features")
        places = None
        if not times.is_sorted():
            order = times.arg_sort()
            questions, places = questions.select(pl.all().gather(order)), order.arg_sort()
        return cls(time, list(questions.iter_slices(CHUNK_ROWS)) or [questions], places)

    def restored(self, values: pl.Series) -> pl.Series:
        """Values in order of time, back in the original order."""
        return values if self.places is None else values.gather(self.places)


def _answers(asked: _Questions, query: ViewQuery, later_corrections: bool) -> Iterator[tuple[str, pa.Array]]:
    table = query.table.open()
    only = len(asked.chunks) == 1
    parts = []
    for chunk in asked.chunks:
        rows = _rows_for(chunk.get_column(asked.time), query, table, later_corrections)
        match = latest_known(
            chunk,
            rows,
            on=query.on,
            at=asked.time,
            event=query.event,
            created=query.created,
            ttl=query.ttl,
            later_corrections=later_corrections,
        )
        match = asked.restored(match) if only else match
        # A column in one piece is gathered from in a third of the time; one at a time, so that the table is not there twice.
        parts.append({name: rows.get_column(stored).rechunk().gather(match) for stored, name in query.features.items()})
    for name in query.features.values():
        column = parts[0].pop(name) if only else asked.restored(pl.concat([part.pop(name) for part in parts]))
        yield name, arrow(column.to_frame(name)).column(name)


def _rows_for(times: pl.Series, query: ViewQuery, table: Snapshot, later_corrections: bool) -> pl.DataFrame:
    """The view's rows that any of the questions could need."""
    columns = [*query.on.values(), query.event, *([query.created] if query.created else []), *query.features]
    first, last = times.min(), times.max()
    if not isinstance(first, datetime) or not isinstance(last, datetime):
        return pl.DataFrame(schema={name: table.schema[name] for name in dict.fromkeys(columns)})
    created_by = (query.created, last) if query.created and not later_corrections else None
    return table.read(columns, first - query.ttl if query.ttl else None, last, created_by)


def questions_in_range(queries: Sequence[ViewQuery], start: datetime, end: datetime, *, later_corrections: bool) -> tuple[pa.Table, str]:
    """Entity rows for a retrieval without an entity frame: each moment in [start, end] at which some view got a new row.

    That moment is when the row could first be used: the later of its event time and its created time. Entities come from the
    views that have all the join keys of all views. Raises ValueError where there is none.
    """
    keys = sorted({mine for q in queries for mine in q.on})
    complete = [q for q in queries if sorted(q.on) == keys]
    if not complete:
        raise ValueError(f"no view has all the join keys {keys}: give an entity frame, a range alone cannot tell which go together")
    moments = []
    for query in complete:
        times = [query.event] + ([query.created] if query.created and not later_corrections else [])
        rows = query.table.read([*query.on.values(), *times], None, end)
        usable = pl.max_horizontal(as_utc(name, rows.schema) for name in times).alias(EVENT_TIMESTAMP)
        moments.append(rows.select(*(pl.col(query.on[k]).alias(k) for k in keys), usable))
    found = pl.concat(moments, how="vertical_relaxed").drop_nulls().filter(pl.col(EVENT_TIMESTAMP).is_between(start, end)).unique()
    return arrow(found.sort(EVENT_TIMESTAMP, *keys).cast({EVENT_TIMESTAMP: TIME})), EVENT_TIMESTAMP
