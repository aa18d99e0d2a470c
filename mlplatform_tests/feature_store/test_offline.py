"""History through the Feast SDK: no row lost, none leaked, in the caller's order."""

import shutil
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from mlplatform.clients.fingerprints import computed, mark_append, recorded
from mlplatform.clients.lake import Lake

T0 = datetime(2013, 9, 1, tzinfo=UTC)
WEATHER = ["weather:temp", "weather:n"]


def at(hours: float) -> datetime:
    return T0 + timedelta(hours=hours)


def ask(repo: Any, entity_df: Any, features: list[str], **options: Any) -> pl.DataFrame:
    return repo.store.get_historical_features(entity_df, features, **options).to_polars()


def weather_at(rows: pl.DataFrame, origin: str | None, t: datetime, later: bool = False, ttl: timedelta = timedelta(hours=6)) -> Any:
    """The oracle: `n` of the newest usable row of an origin, tried one by one."""
    usable = [
        (r["event_timestamp"], r["created"], r["n"])
        for r in rows.iter_rows(named=True)
        if r["origin"] == origin and r["event_timestamp"] <= t and (later or r["created"] <= t)
    ]
    event, _, value = max(usable, default=(datetime(2000, 1, 1, tzinfo=UTC), None, None))
    return value if t - event <= ttl else None


def questions(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    hours = rng.uniform(-2, 60, n)
    return pd.DataFrame(
        {"origin": rng.choice(["EWR", "JFK", "LGA"], n), "event_timestamp": [at(round(h, 1)) for h in hours], "row": range(n)}
    )


def test_n_rows_in_are_n_rows_out_in_order_and_equal_to_the_oracle(repo: Any) -> None:
    asked = questions(300)
    stored = pl.read_delta(f"{repo.lake}/weather")
    got = ask(repo, asked, WEATHER)
    assert got.get_column("row").to_list() == list(range(300))
    assert got.get_column("n").to_list() == [
        weather_at(stored, o, t) for o, t in zip(asked["origin"], asked["event_timestamp"], strict=True)
    ]


def test_later_corrections_come_only_where_the_configuration_says_so(repo: Any) -> None:
    asked = questions(300, seed=1)
    stored = pl.read_delta(f"{repo.lake}/weather")
    strict = ask(repo, asked, WEATHER)
    repo.store.config.offline_store.later_corrections = True
    got = ask(repo, asked, WEATHER)
    assert got.get_column("n").to_list() == [
        weather_at(stored, o, t, later=True) for o, t in zip(asked["origin"], asked["event_timestamp"], strict=True)
    ]
    assert not got.equals(strict)
    assert ask(repo, asked, WEATHER, filter_by_created_timestamp=True).equals(strict)


def test_a_correction_counts_from_the_time_it_was_made(repo: Any) -> None:
    correction = pl.DataFrame({"origin": ["EWR"], "event_timestamp": [at(12)], "created": [at(14)], "temp": [99.0], "n": [99.0]})
    repo.write("weather", correction)
    asked = pd.DataFrame({"origin": "EWR", "event_timestamp": [at(12.5), at(13.99), at(12), at(14)]})
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [12.0, 13.0, 12.0, 14.0]
    repo.write("weather", correction.with_columns(pl.lit(at(47)).alias("event_timestamp"), pl.lit(at(49)).alias("created")))
    late = pd.DataFrame({"origin": "EWR", "event_timestamp": [at(48.9), at(49)]})
    assert ask(repo, late, WEATHER).get_column("n").to_list() == [47.0, 99.0]


def test_the_same_name_in_several_views_stays_apart_under_full_names(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR"], "carrier": ["UA"], "flight": [11], "event_timestamp": [at(21)]})
    got = ask(repo, asked, ["weather:n", "record:n", "record:late", "congestion:gone_1h", "state:load"], full_feature_names=True)
    assert got.drop("event_timestamp").row(0, named=True) == {
        "origin": "EWR",
        "carrier": "UA",
        "flight": 11,
        "weather__n": 21.0,
        "record__n": 2011,
        "record__late": False,
        "congestion__gone_1h": 42.0,
        "state__load": 3.0,
    }


def test_expired_unknown_future_and_missing_keys_are_null(repo: Any) -> None:
    asked = pd.DataFrame(
        {"origin": ["EWR", "EWR", "ZZZ", None, "EWR"], "event_timestamp": [at(47 + 6), at(47 + 6.01), at(5), at(5), at(-1)]}
    )
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [47.0, None, None, None, None]


def test_time_zones_are_mixed_and_missing_without_harm(repo: Any) -> None:
    new_york = timezone(timedelta(hours=-4))
    moments = [at(7), at(7).astimezone(new_york), at(7).replace(tzinfo=None)]
    asked = pd.DataFrame({"origin": "EWR", "event_timestamp": pd.Series(moments, dtype=object)})
    got = ask(repo, asked, WEATHER)
    assert got.get_column("n").to_list() == [7.0] * 3
    assert got.schema["event_timestamp"] == pl.Datetime("us", "UTC")
    naive = pd.DataFrame({"origin": ["EWR"], "event_timestamp": pd.to_datetime(["2013-09-01 07:00:00.000000999"])})
    assert ask(repo, naive, WEATHER).get_column("n").to_list() == [7.0]
    # One nanosecond before the value was known is still before.
    early = pd.DataFrame({"origin": ["EWR"], "event_timestamp": pd.to_datetime(["2013-09-01 06:59:59.999999999"])})
    assert ask(repo, early, WEATHER).get_column("n").to_list() == [6.0]


@pytest.mark.parametrize("kind", ["polars", "arrow"])
def test_other_frames_than_pandas_are_taken(repo: Any, kind: str) -> None:
    frame = pl.DataFrame({"origin": ["JFK", "EWR"], "event_timestamp": [at(3), at(4)], "tag": ["a", "b"]}).with_columns(
        pl.col("origin").cast(pl.Categorical)
    )
    got = ask(repo, frame if kind == "polars" else pa.table(frame.to_arrow()), WEATHER)
    assert got.select("tag", "n").rows() == [("a", -3.0), ("b", 4.0)]


def test_the_only_timestamp_column_serves_as_the_time(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR"], "asked_at": [at(9)]})
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [9.0]
    with pytest.raises(ValueError, match="event_timestamp"):
        ask(repo, asked.assign(other=at(1)), WEATHER)


def test_an_empty_entity_frame_gives_an_empty_answer_with_every_column(repo: Any) -> None:
    asked = pd.DataFrame({"origin": pd.Series([], dtype="str"), "event_timestamp": pd.Series([], dtype="datetime64[ns, UTC]")})
    got = ask(repo, asked, WEATHER)
    assert got.shape == (0, 4)
    assert got.schema["n"] == pl.Float64


def test_an_empty_table_gives_nulls(repo: Any) -> None:
    DeltaTable(f"{repo.lake}/weather").delete()
    got = ask(repo, questions(5), WEATHER)
    assert got.get_column("n").to_list() == [None] * 5


def test_repeated_entity_rows_are_all_answered(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR"] * 4, "event_timestamp": [at(5)] * 4})
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [4.0] * 4


def test_renamed_join_keys_ask_the_same_view_twice(repo: Any) -> None:
    from feast import FeatureService

    weather = repo.store.get_feature_view("weather")
    service = FeatureService(
        name="ends",
        features=[
            weather[["n"]].with_name("from_weather").with_join_key_map({"origin": "start"}),
            weather[["n"]].with_name("to_weather").with_join_key_map({"origin": "stop"}),
        ],
    )
    repo.store.apply([service])
    asked = pd.DataFrame({"start": ["EWR", "JFK"], "stop": ["JFK", "ZZZ"], "event_timestamp": [at(4), at(6)]})
    got = repo.store.get_historical_features(asked, service, full_feature_names=True).to_polars()
    assert got.select("from_weather__n", "to_weather__n").rows() == [(4.0, -4.0), (-6.0, None)]


def test_on_demand_features_are_computed_from_the_joined_ones(repo: Any) -> None:
    asked = pd.DataFrame({"origin": ["EWR", "ZZZ"], "event_timestamp": [at(4), at(4)], "shift": [1.0, 1.0]})
    frame = repo.store.get_historical_features(asked, ["weather:temp", "shifted_temp:shifted"]).to_df()
    np.testing.assert_array_equal(frame["shifted"], [5.5, np.nan])


def test_mapped_columns_are_read_under_their_stored_names(repo: Any) -> None:
    from feast import Entity, FeatureView, Field, FileSource
    from feast.data_format import DeltaFormat
    from feast.types import Float64, String
    from feast.value_type import ValueType

    source = FileSource(
        name="mapped",
        path=f"{repo.lake}/weather",
        file_format=DeltaFormat(),
        timestamp_field="known",
        created_timestamp_column="made",
        field_mapping={"n": "number", "event_timestamp": "known", "created": "made", "origin": "airport"},
    )
    airport = Entity(name="airport", join_keys=["airport"], value_type=ValueType.STRING)
    view = FeatureView(
        name="mapped", entities=[airport], source=source, schema=[Field(name="airport", dtype=String), Field(name="number", dtype=Float64)]
    )
    repo.store.apply([airport, view])
    asked = pd.DataFrame({"airport": ["EWR"], "event_timestamp": [at(8)]})
    assert ask(repo, asked, ["mapped:number"]).get_column("number").to_list() == [8.0]
    repo.store.materialize(T0, at(47), feature_views=["mapped"])
    online = repo.store.get_online_features(["mapped:number"], [{"airport": "JFK"}]).to_dict()
    assert online["number"] == [-47.0]


def test_only_the_files_of_the_needed_days_are_read(repo: Any) -> None:
    # Files of the second day are gone: reading them would fail.
    for file in Path(repo.lake, "weather", "event_date=2013-09-02").iterdir():
        file.unlink()
    asked = pd.DataFrame({"origin": ["EWR"], "event_timestamp": [at(23)]})
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [23.0]
    with pytest.raises((OSError, pl.exceptions.ComputeError)):
        ask(repo, asked.assign(event_timestamp=at(25)), WEATHER)


def test_a_range_without_entity_rows_gives_each_row_when_it_became_usable(repo: Any) -> None:
    got = repo.store.get_historical_features(features=["weather:n", "congestion:gone_1h"], start_date=at(4), end_date=at(7)).to_polars()
    ewr = got.filter(pl.col("origin") == "EWR").sort("event_timestamp")
    # The row of 5:00 was created at 6:30, when that of 6:00 was known already.
    assert ewr.select("event_timestamp", "n", "gone_1h").rows() == [
        (at(4), 4.0, 8.0),
        (at(5), 4.0, 10.0),
        (at(6), 6.0, 12.0),
        (at(6.5), 6.0, 12.0),
        (at(7), 7.0, 14.0),
    ]


@pytest.mark.filterwarnings("ignore:(Saving|Retrieving) datasets? is an experimental feature:RuntimeWarning")
@pytest.mark.parametrize("form", ["delta", "parquet"])
def test_a_result_is_persisted_and_read_again(repo: Any, tmp_path: Path, form: str) -> None:
    from feast.data_format import DeltaFormat, ParquetFormat
    from feast.errors import SavedDatasetLocationAlreadyExists
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    path = str(tmp_path / "saved" / ("set" if form == "delta" else "set.parquet"))
    storage = SavedDatasetFileStorage(path, DeltaFormat() if form == "delta" else ParquetFormat())
    job = repo.store.get_historical_features(questions(20), WEATHER)
    repo.store.create_saved_dataset(from_=job, name="kept", storage=storage)
    back = repo.store.get_saved_dataset("kept").to_df()
    assert len(back) == 20
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)


def test_written_rows_are_appended_and_found(repo: Any) -> None:
    rows = pd.DataFrame({"origin": ["LGA"], "event_timestamp": [at(30)], "created": [at(30)], "temp": [1.0], "n": [5.0]})
    repo.store.write_to_offline_store("weather", rows)
    asked = pd.DataFrame({"origin": ["LGA"], "event_timestamp": [at(31)]})
    assert ask(repo, asked, WEATHER).get_column("n").to_list() == [5.0]
    assert pl.read_delta(f"{repo.lake}/weather").filter(pl.col("origin") == "LGA").get_column("event_date").to_list() == [at(30).date()]


@pytest.mark.parametrize("there", [True, False])
def test_written_rows_are_in_the_recorded_fingerprint_as_they_are_stored(repo: Any, there: bool) -> None:
    """Whole numbers, and times of another zone and in nanoseconds, become what the table has."""
    from mlplatform.feature_store.offline import DeltaOfflineStore

    def store(n: float, **others: Any) -> None:
        rows = pd.DataFrame({"origin": ["LGA"], "event_timestamp": [at(30)], "created": [at(30)], "n": [n], **others})
        table = pa.Table.from_pandas(rows, preserve_index=False)
        DeltaOfflineStore.offline_write_batch(repo.store.config, repo.store.get_feature_view("weather"), table, None)

    key = ("weather",)
    kept = Lake(repo.lake).read(key)
    shutil.rmtree(f"{repo.lake}/weather")
    lake = Lake(repo.lake)
    if there:
        lake.append(key, kept, metadata=mark_append(lake, key, kept).metadata())
    store(5.0, temp=[1.25])
    store(6, temp=[2], event_timestamp=[pd.Timestamp("2013-09-03T01:00:00-04:00").as_unit("ns")])
    assert lake.row_count(key) == (len(kept) if there else 0) + 2
    assert recorded(lake, key) == computed(lake, key)


def test_pull_all_gives_every_row_of_the_range_and_pull_latest_the_newest(repo: Any) -> None:
    from mlplatform.feature_store.offline import DeltaOfflineStore

    source = repo.store.get_feature_view("weather").batch_source
    common = (repo.store.config, source, ["origin"], ["n"], "event_timestamp", "created")
    everything = DeltaOfflineStore.pull_all_from_table_or_query(*common, start_date=at(3), end_date=at(5).replace(tzinfo=None)).to_df()
    assert sorted(everything["n"]) == [-5.0, -4.0, -3.0, 3.0, 4.0, 5.0]
    latest = DeltaOfflineStore.pull_latest_from_table_or_query(*common, at(3), at(5)).to_df()
    assert sorted(latest["n"]) == [-5.0, 5.0]
    assert DeltaOfflineStore.pull_latest_from_table_or_query(*common, at(-9), at(-8)).to_df().empty


def test_what_is_wrong_is_said(repo: Any) -> None:
    from mlplatform.feature_store.tables import MissingFeatureTableError

    asked = questions(2)
    with pytest.raises(ValueError, match="lacks origin"):
        ask(repo, asked.drop(columns="origin"), WEATHER)
    with pytest.raises(ValueError, match=r"named like features: \['n'\]"):
        ask(repo, asked.assign(n=1), WEATHER)
    with pytest.raises(TypeError, match="entity frame"):
        ask(repo, "SELECT 1", WEATHER)
    Path(repo.lake, "weather").rename(Path(repo.lake, "gone"))
    with pytest.raises(MissingFeatureTableError, match="materialize its asset first"):
        ask(repo, asked, WEATHER)
