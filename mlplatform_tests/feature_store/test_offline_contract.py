"""What the offline store promises beyond the plain case: frames of any make, tables of any layout, ranges, other types, chunks."""

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

T0 = datetime(2013, 9, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
FOREVER = timedelta(0)


def at(hours: float) -> datetime:
    return T0 + timedelta(hours=hours)


def ask(repo: Any, entity_df: Any, features: list[str], **options: Any) -> pl.DataFrame:
    return repo.store.get_historical_features(entity_df, features, **options).to_polars()


def declare(repo: Any, name: str, *, ttl: timedelta = FOREVER, created: str = "created", online: bool = True, **features: Any) -> None:
    """One more view over `<lake>/<name>`, on the entity `origin`."""
    from feast import FeatureView, Field, FileSource
    from feast.data_format import DeltaFormat
    from feast.types import Float64, String

    source = FileSource(
        name=f"{name}_table",
        path=f"{repo.lake}/{name}",
        file_format=DeltaFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column=created,
    )
    schema = [Field(name="origin", dtype=String), *(Field(name=f, dtype=kind) for f, kind in (features or {"v": Float64}).items())]
    entities = [repo.store.get_entity("origin")]
    repo.store.apply([FeatureView(name=name, entities=entities, ttl=ttl, schema=schema, source=source, online=online)])


def stored(hours: list[float], late: float = 0, origin: str = "EWR", **columns: Any) -> pl.DataFrame:
    """Rows of one origin known at those hours, created `late` hours after; `v` is the hour unless columns are given."""
    times = {"event_timestamp": [at(h) for h in hours], "created": [at(h + late) for h in hours]}
    values = columns or {"v": [float(h) for h in hours]}
    return pl.DataFrame({"origin": [origin] * len(hours), **times, **values}, schema_overrides=dict.fromkeys(times, TIME))


def write_files(repo: Any, name: str, parts: list[pl.DataFrame]) -> list[Path]:
    """An unpartitioned table of one file for each part, in that order."""
    known: set[Path] = set()
    files = []
    for part in parts:
        write_deltalake(f"{repo.lake}/{name}", part.to_arrow(compat_level=pl.CompatLevel.oldest()), mode="append")
        now = set(Path(repo.lake, name).rglob("*.parquet"))
        files += list(now - known)
        known = now
    return files


def values(repo: Any, name: str, hours: list[float]) -> list[Any]:
    asked = pd.DataFrame({"origin": "EWR", "event_timestamp": [at(h) for h in hours]})
    return ask(repo, asked, [f"{name}:v"]).get_column("v").to_list()


# --- frames of any make ----------------------------------------------------------------------------------------------


def test_a_pandas_index_is_neither_used_nor_given_back(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR", "JFK", "EWR"], "event_timestamp": [at(3), at(4), at(6)]}, index=[7, 7, 0])
    got = repo.store.get_historical_features(asked, ["weather:n"]).to_df()
    assert got["n"].tolist() == [3.0, -4.0, 6.0]
    assert got.index.tolist() == [0, 1, 2]
    assert list(got.columns) == ["origin", "event_timestamp", "n"]


UNITS = {"pandas": ("s", "ms", "us", "ns"), "arrow": ("s", "ms", "us", "ns"), "polars": ("ms", "us", "ns")}  # Polars has no seconds


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize(("make", "unit"), [(make, unit) for make, units in UNITS.items() for unit in units])
def test_times_of_any_unit_and_zone_mean_the_same_moment(repo: Any, unit: str, zone: str | None, make: str) -> None:
    times = pd.Series([at(3), at(6)]).dt.tz_convert(zone or "UTC").dt.as_unit(unit)
    times = times if zone else times.dt.tz_localize(None)
    frame: Any = pd.DataFrame({"origin": ["EWR", "EWR"], "event_timestamp": times})
    if make != "pandas":
        frame = pa.Table.from_pandas(frame)
    got = ask(repo, pl.from_arrow(frame) if make == "polars" else frame, ["weather:n"])
    assert got.get_column("n").to_list() == [3.0, 6.0]
    assert got.schema["event_timestamp"] == TIME


@pytest.mark.parametrize("kind", [object, "category", "string", "string[pyarrow]"])
def test_text_keys_of_any_pandas_type_join(repo: Any, kind: Any) -> None:
    asked = pd.DataFrame({"origin": pd.Series(["EWR", "ZZZ"], dtype=kind), "event_timestamp": [at(3)] * 2})
    assert ask(repo, asked, ["weather:n"]).get_column("n").to_list() == [3.0, None]


def test_a_query_in_place_of_a_frame_is_refused_in_plain_words(repo: Any) -> None:
    with pytest.raises(TypeError, match=r"takes an entity frame .* not str"):
        ask(repo, "SELECT origin, event_timestamp FROM asked", ["weather:n"])


def test_a_row_without_a_time_is_refused(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR", "EWR"], "event_timestamp": [at(3), pd.NaT]})
    with pytest.raises(ValueError, match="event_timestamp has nulls"):
        ask(repo, asked, ["weather:n"])


# --- tables of any layout --------------------------------------------------------------------------------------------


def test_values_of_other_types_come_through_unharmed(repo: Any) -> None:
    from feast.types import Array, Bool, Float32, Int64, String

    declare(repo, "mixed", online=False, word=String, yes=Bool, count=Int64, series=Array(Float32))
    big = 2**53 + 1  # no float holds it
    columns = {"word": ["é", None, ""], "yes": [True, None, False], "count": [big, None, 0], "series": [[1.5, None], None, []]}
    repo.write("mixed", stored([1, 2, 3], **columns).with_columns(pl.col("series").cast(pl.List(pl.Float32))))
    asked = pd.DataFrame({"origin": ["EWR"] * 3 + ["ZZZ"], "event_timestamp": [at(3), at(1), at(2), at(3)]})
    got = ask(repo, asked, [f"mixed:{name}" for name in columns])
    assert got.select(list(columns)).rows() == [("", False, 0, []), ("é", True, big, [1.5, None]), (None,) * 4, (None,) * 4]


def test_a_view_without_a_created_column_goes_by_event_time(repo: Any) -> None:
    declare(repo, "plain", created="")
    repo.write("plain", stored([1, 5]).drop("created"))
    assert values(repo, "plain", [0.9, 1, 5]) == [None, 1.0, 5.0]


def test_a_table_that_grew_a_column_has_nulls_before(repo: Any) -> None:
    from feast.types import Float64

    declare(repo, "grown", v=Float64, w=Float64)
    write_files(repo, "grown", [stored([1])])
    grown = stored([2], v=[2.0], w=[20.0]).to_arrow(compat_level=pl.CompatLevel.oldest())
    write_deltalake(f"{repo.lake}/grown", grown, mode="append", schema_mode="merge")
    asked = pd.DataFrame({"origin": "EWR", "event_timestamp": [at(1), at(2)]})
    assert ask(repo, asked, ["grown:v", "grown:w"]).select("v", "w").rows() == [(1.0, None), (2.0, 20.0)]


def test_a_declared_feature_the_table_lacks_is_named(repo: Any) -> None:
    from feast.types import Float64

    declare(repo, "short", v=Float64, w=Float64)
    repo.write("short", stored([1]))
    with pytest.raises(ValueError, match="has no column w"):
        ask(repo, pd.DataFrame({"origin": ["EWR"], "event_timestamp": [at(1)]}), ["short:w"])


def test_a_value_created_months_later_counts_from_then_on(repo: Any) -> None:
    declare(repo, "late")
    repo.write("late", stored([1]))
    repo.write("late", stored([2], late=24 * 60))
    repo.write("late", stored([30]))
    assert values(repo, "late", [29, 40, 24 * 61]) == [1.0, 30.0, 30.0]
    repo.write("late", stored([31], late=24 * 90))
    assert values(repo, "late", [24 * 80, 24 * 95]) == [30.0, 31.0]


def test_the_day_partition_may_have_another_name_and_is_written_under_it(repo: Any) -> None:
    declare(repo, "days")
    repo.store.config.offline_store.partition_column = "day"
    _first(repo, "days", stored([1, 25]))
    repo.store.write_to_offline_store("days", stored([49]).to_pandas())
    table = DeltaTable(f"{repo.lake}/days")
    assert table.metadata().partition_columns == ["day"]
    assert pl.read_delta(f"{repo.lake}/days").sort("day").get_column("day").to_list() == [date(2013, 9, d) for d in (1, 2, 3)]
    assert values(repo, "days", [2, 26, 50]) == [1.0, 25.0, 49.0]


def _first(repo: Any, name: str, rows: pl.DataFrame) -> None:
    from mlplatform.feature_store.offline import DeltaOfflineStore

    view = repo.store.get_feature_view(name)
    DeltaOfflineStore.offline_write_batch(repo.store.config, view, rows.to_arrow(compat_level=pl.CompatLevel.oldest()), None)


@pytest.mark.parametrize("kind", ["text", "local day"])
def test_a_partition_that_is_not_the_utc_day_loses_no_row(repo: Any, kind: str) -> None:
    declare(repo, "odd", ttl=timedelta(hours=2))
    rows = stored([1, 23, 25])
    day = rows.get_column("event_timestamp").dt.convert_time_zone("Pacific/Kiritimati").dt.date()
    rows = rows.with_columns((day.cast(pl.String) if kind == "text" else day).alias("event_date"))
    write_deltalake(f"{repo.lake}/odd", rows.to_arrow(compat_level=pl.CompatLevel.oldest()), partition_by=["event_date"])
    # One by one, so that each asks for few days.
    assert [values(repo, "odd", [hour]) for hour in (1, 3, 3.5, 23, 23.5, 25)] == [[v] for v in (1.0, 1.0, None, 23.0, 23.0, 25.0)]


def test_times_written_as_texts_are_times_in_the_table(repo: Any) -> None:
    declare(repo, "texts")
    repo.write("texts", stored([1]))
    texts = {"event_timestamp": ["2013-09-01T02:00:00+00:00", "2013-08-31T23:00:00.5-04:00"], "created": ["2013-09-01T02:00:00Z"] * 2}
    repo.store.write_to_offline_store("texts", pd.DataFrame({"origin": ["EWR"] * 2, "v": [2.0, 3.0], **texts}))
    assert values(repo, "texts", [1, 2, 3, 4]) == [1.0, 2.0, 2.0, 3.0]
    wrong = pd.DataFrame({"origin": ["EWR"], "v": [2.0], "event_timestamp": ["noon"], "created": ["noon"]})
    with pytest.raises(ValueError, match="noon"):
        repo.store.write_to_offline_store("texts", wrong)


# --- files outside the needed time -----------------------------------------------------------------------------------


def test_files_that_cannot_matter_are_not_opened_on_an_unpartitioned_table(repo: Any) -> None:
    declare(repo, "flat", ttl=timedelta(hours=6))
    expired, needed, also, future, made_later = write_files(
        repo, "flat", [stored([1, 2]), stored([20]), stored([21]), stored([40, 41]), stored([22], late=30)]
    )
    for file in (expired, future, made_later):
        file.unlink()
    assert values(repo, "flat", [22, 24, 25.9]) == [21.0, 21.0, 21.0]
    needed.unlink()
    with pytest.raises(Exception, match=needed.name):
        values(repo, "flat", [22, 24])
    assert also.exists()


def test_a_correction_is_read_as_soon_as_it_could_matter(repo: Any) -> None:
    declare(repo, "fixed", ttl=timedelta(hours=6))
    write_files(repo, "fixed", [stored([20]), stored([20], late=3, v=[99.0])])
    assert values(repo, "fixed", [22.9, 23, 26, 26.1]) == [20.0, 99.0, 99.0, None]


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_the_chunks_they_are_made_in(repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    moments = [at(round(h, 1)) for h in rng.uniform(-2, 60, 200)]
    asked = pd.DataFrame({"origin": rng.choice(["EWR", "JFK", "LGA"], 200), "event_timestamp": moments, "row": range(200)})
    features = ["weather:temp", "weather:n", "congestion:gone_1h", "state:load"]
    whole = ask(repo, asked, features)
    monkeypatch.setattr("mlplatform.feature_store.retrieval.CHUNK_ROWS", 7)
    assert ask(repo, asked, features).equals(whole)
    assert ask(repo, asked.sort_values("event_timestamp", kind="stable"), features).equals(
        whole.sort("event_timestamp", maintain_order=True)
    )


def test_a_table_written_meanwhile_gives_one_state_of_it(repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlplatform.feature_store.tables import Snapshot

    monkeypatch.setattr("mlplatform.feature_store.retrieval.CHUNK_ROWS", 1)
    read = Snapshot.read

    def read_and_write(self: Snapshot, *arguments: Any) -> pl.DataFrame:
        rows = read(self, *arguments)
        repo.write("weather", stored([3], temp=[0.0], n=[77.0]))
        return rows

    monkeypatch.setattr(Snapshot, "read", read_and_write)
    asked = pd.DataFrame({"origin": "EWR", "event_timestamp": [at(3), at(3.2), at(3.5)]})
    assert ask(repo, asked, ["weather:n"]).get_column("n").to_list() == [3.0] * 3


# --- ranges in place of a frame --------------------------------------------------------------------------------------


def test_a_range_may_be_open_at_either_end(repo: Any) -> None:
    both = ask(repo, None, ["weather:n"], start_date=at(40), end_date=at(47))
    assert both.get_column("event_timestamp").is_between(at(40), at(47)).all()
    assert ask(repo, None, ["weather:n"], start_date=at(40), end_date=at(47).replace(tzinfo=None)).equals(both)
    # Without a start it reaches back as far as the longest ttl.
    assert ask(repo, None, ["weather:n"], end_date=at(47)).equals(ask(repo, None, ["weather:n"], start_date=at(41), end_date=at(47)))
    # Without an end it is now, years after the last row.
    everything = ask(repo, None, ["weather:n"], start_date=at(0))
    assert everything.get_column("event_timestamp").max() == at(47)
    assert ask(repo, None, ["weather:n"]).height == 0


def test_a_range_and_a_frame_together_are_refused(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR"], "event_timestamp": [at(3).astimezone(timezone(timedelta(hours=-4)))]})
    with pytest.raises(ValueError, match="both entity_df and start_date"):
        ask(repo, asked, ["weather:n"], start_date=at(1))
