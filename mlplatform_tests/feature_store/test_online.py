"""The online store through the Feast SDK: what is served equals history, keeps its order, and grows old."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import polars as pl
import pytest
from redis import Redis

from mlplatform.feature_store.codec import COUNTER_KEY, decode, entity_part, generation_of, pointer_key
from mlplatform.feature_store.reader import SyncOnlineReader
from mlplatform.feature_store.reclaim import manifest_of, pointers
from mlplatform.feature_store.writer import write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
END = T0 + timedelta(hours=47, minutes=30)
FEATURES = ["weather:temp", "weather:n", "record:n", "record:late", "congestion:gone_1h", "state:load"]


def at(hours: float) -> datetime:
    return T0 + timedelta(hours=hours)


def row(hours: float, n: float, created: float | None = None) -> pd.DataFrame:
    times = {"event_timestamp": [at(hours)], "created": [at(hours if created is None else created)]}
    return pd.DataFrame({"origin": ["EWR"], "temp": [1.0], "n": [n], **times})


def online(repo: Any, features: list[str], rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return repo.store.get_online_features(features, rows, **options).to_dict()


def weather_n(repo: Any, origin: str = "EWR") -> float | None:
    return online(repo, ["weather:n"], [{"origin": origin}])["n"][0]


def dump(client: Redis) -> dict[tuple[str, bytes], bytes]:
    """(view, entity) → packed value, of what is read."""
    views = {p.current.number: view for (_, view), p in pointers(client).items() if p.current}
    found = {key: generation_of(key) for key in client.keys("fs:*")}
    return {(views[at[0]], at[1]): client.get(key) for key, at in sorted(found.items()) if at and at[0] in views}


def test_what_is_served_after_materializing_equals_history_at_that_time(repo: Any) -> None:
    repo.store.materialize(T0, END)
    rows = [{"origin": o, "carrier": c, "flight": f} for o in ("EWR", "JFK", "ZZZ") for c in ("AA", "UA", "ZZ") for f in (1, 11, 111)]
    served = pl.DataFrame(online(repo, FEATURES, rows, full_feature_names=True))
    asked = pd.DataFrame(rows).assign(event_timestamp=END)
    history = repo.store.get_historical_features(asked, FEATURES, full_feature_names=True).to_polars()
    columns = [f.replace(":", "__") for f in FEATURES]
    assert served.select(columns).rows() == history.select(columns).rows()
    assert served.get_column("weather__n").null_count() == 9


def test_on_demand_features_are_computed_from_the_served_ones(repo: Any) -> None:
    repo.store.materialize(T0, END)
    assert online(repo, ["shifted_temp:shifted"], [{"origin": "JFK", "shift": 2.0}])["shifted"] == [49.5]


def test_feasts_own_engine_and_ours_leave_the_same_bytes(repo: Any, redis_client: Redis) -> None:
    from feast import FeatureStore

    repo.store.materialize(T0, END, feature_views=["weather", "record", "state"])
    ours = dump(redis_client)
    redis_client.flushdb()
    stock = FeatureStore(config=repo.store.config.model_copy(update={"batch_engine_config": "local"}))
    stock.materialize(T0, END, feature_views=["weather", "record", "state"])
    assert dump(redis_client) == ours
    assert len(ours) == 2 + 4 + 1


def test_the_fast_writer_and_feast_write_the_same_bytes(repo: Any, redis_client: Redis) -> None:
    rows = pl.read_delta(f"{repo.lake}/record").drop("event_date")
    repo.store.write_to_online_store("record", rows.to_pandas())
    through_feast = dump(redis_client)
    redis_client.flushdb()
    counts = write_frame(redis_client, "flights", "record", ["flight", "carrier"], ["n", "late"], rows)
    assert (counts.written, counts.skipped) == (4, 8)
    assert dump(redis_client) == through_feast
    assert list(through_feast) == sorted(("record", entity_part("record", (c, f))) for c in ("AA", "UA") for f in (1, 11))


def test_the_services_reader_reads_what_feast_wrote(repo: Any, redis_client: Redis) -> None:
    from mlplatform.feature_store.online import layout_of

    repo.store.materialize(T0, END)
    layouts = {name: layout_of(repo.store.get_feature_view(name)) for name in ("weather", "record")}
    layouts["congestion"] = layout_of(repo.store.get_stream_feature_view("congestion"))
    assert layouts["record"].join_keys == ("carrier", "flight")
    requests = [(layouts["weather"], ("EWR",)), (layouts["record"], ("UA", 11)), (layouts["congestion"], ("JFK",))]
    answers = SyncOnlineReader(redis_client, "flights").read(requests)
    assert [a.values.tolist() if a else None for a in answers] == [[47.0, 47.5], [0.0, 4011.0], [-94.0]]


def test_an_expired_value_is_missing_but_its_time_is_told(repo: Any) -> None:
    repo.store.materialize(T0, END)
    repo.clock.set(at(47 + 6))
    assert weather_n(repo) == 47.0
    repo.clock.set(at(47 + 6) + timedelta(microseconds=1))
    answer = online(repo, ["weather:n"], [{"origin": "EWR"}, {"origin": "ZZZ"}])
    assert answer["n"] == [None, None]
    response = repo.store.get_online_features(["weather:n"], [{"origin": "EWR"}, {"origin": "ZZZ"}])
    assert response.to_dict(include_event_timestamps=True)["n__ts"] == [int(at(47).timestamp()), 0]


def test_corrections_win_and_late_values_lose(repo: Any) -> None:
    repo.store.write_to_online_store("weather", row(46, 1.0))
    repo.store.write_to_online_store("weather", row(45, 2.0, created=47))
    assert weather_n(repo) == 1.0
    repo.store.write_to_online_store("weather", row(46, 3.0, created=47))
    assert weather_n(repo) == 3.0
    repo.store.write_to_online_store("weather", row(46, 1.0))
    assert weather_n(repo) == 3.0


def test_a_correction_in_delta_reaches_redis_by_materializing_again(repo: Any) -> None:
    repo.store.materialize(T0, END)
    fix = pl.DataFrame({"origin": ["EWR"], "event_timestamp": [at(47)], "created": [at(48)], "temp": [0.0], "n": [99.0]})
    repo.write("weather", fix)
    repo.clock.set(at(48))
    repo.store.materialize(T0, END)
    assert weather_n(repo) == 99.0


def test_a_push_is_served(repo: Any) -> None:
    pushed = pd.DataFrame({"origin": ["EWR"], "event_timestamp": [at(47.4)], "created": [at(47.4)], "gone_1h": [7.0]})
    repo.store.push("congestion_push", pushed)
    assert online(repo, ["congestion:gone_1h"], [{"origin": "EWR"}])["gone_1h"] == [7.0]


def test_incremental_materialization_moves_on(repo: Any) -> None:
    repo.store.materialize(T0, at(10), feature_views=["weather"])
    repo.clock.set(at(12))  # every fifth row, that of 10:00 among them, is created 90 minutes late
    assert weather_n(repo) == 10.0
    repo.clock.set(at(13))
    repo.store.materialize_incremental(at(13), feature_views=["weather"])
    assert weather_n(repo) == 13.0


def test_materializing_keeps_entities_that_have_no_row_in_the_window(repo: Any, redis_client: Redis) -> None:
    repo.store.materialize(T0, at(10), feature_views=["weather"])
    only_jfk = pl.DataFrame({"origin": ["JFK"], "event_timestamp": [at(10.5)], "created": [at(10.5)], "temp": [0.0], "n": [5.0]})
    repo.write("weather", only_jfk)
    before = pointers(redis_client)["flights", "weather"].current
    repo.store.materialize(at(10.25), at(10.75), feature_views=["weather"])
    repo.clock.set(at(12))
    assert (weather_n(repo), weather_n(repo, "JFK")) == (10.0, 5.0)
    pointer = pointers(redis_client)["flights", "weather"]
    assert pointer.previous == before
    assert pointer.current is not None
    manifest = manifest_of(redis_client, pointer.current.number)
    assert manifest is not None
    assert (manifest.entities, manifest.carried_over, manifest.state) == (1, 1, "verified")


def test_a_materialization_of_changed_features_begins_anew(repo: Any) -> None:
    from feast import FeatureView, Field
    from feast.types import Int64, String

    repo.store.materialize(T0, END, feature_views=["record"])
    old = repo.store.get_feature_view("record")
    changed = FeatureView(
        name="record",
        entities=[repo.store.get_entity(name) for name in ("flight", "carrier")],
        ttl=old.ttl,
        schema=[Field(name="flight", dtype=Int64), Field(name="carrier", dtype=String), Field(name="n", dtype=Int64)],
        source=old.batch_source,
    )
    repo.store.apply([changed])
    rows = pl.read_delta(f"{repo.lake}/record").drop("event_date", "late")
    with pytest.raises(ValueError, match="rebuild the view"):
        repo.store.write_to_online_store("record", rows.to_pandas())
    repo.store.materialize(T0, END, feature_views=["record"])
    assert online(repo, ["record:n"], [{"carrier": "AA", "flight": 1}])["n"] == [4001]


def test_reads_and_writes_work_from_asyncio(repo: Any) -> None:
    async def run() -> dict[str, Any]:
        await repo.store.initialize()
        await repo.store.write_to_online_store_async("weather", row(47, 8.0))
        response = await repo.store.get_online_features_async(["weather:n", "weather:temp"], [{"origin": "EWR"}, {"origin": "ZZZ"}])
        await repo.store.close()
        return response.to_dict()

    for _ in range(2):  # each in a loop of its own
        answer = asyncio.run(run())
        assert (answer["n"], answer["temp"]) == ([8.0, None], [1.0, None])


def test_a_renamed_join_key_reads_the_same_value(repo: Any) -> None:
    from feast import FeatureService

    view = repo.store.get_feature_view("weather")
    service = FeatureService(name="renamed", features=[view[["n"]].with_name("at_dest").with_join_key_map({"origin": "dest"})])
    repo.store.apply([service])
    repo.store.materialize(T0, END, feature_views=["weather"])
    answer = repo.store.get_online_features(service, [{"dest": "JFK"}], full_feature_names=True).to_dict()
    assert answer["at_dest__n"] == [-47.0]


def test_a_view_that_is_gone_takes_its_values_with_it_and_no_others(repo: Any, redis_client: Redis) -> None:
    repo.store.materialize(T0, END)
    redis_client.set("someone-elses", b"1")
    longer = row(47, 1.0).assign(record_id=1)
    write_frame(redis_client, "flights", "record2", ["record_id"], ["n"], pl.from_pandas(longer))
    repo.store.apply([], objects_to_delete=[repo.store.get_feature_service("both"), repo.store.get_feature_view("record")], partial=False)
    assert not redis_client.exists(pointer_key("flights", "record"))
    assert {view for view, _ in dump(redis_client)} == {"weather", "congestion", "state", "record2"}
    assert len(redis_client.keys("fs:*")) == 2 + 2 + 1 + 1
    repo.store.teardown()
    # The last number stays: no later generation can be taken for an earlier one.
    assert sorted(redis_client.keys()) == [COUNTER_KEY, b"someone-elses"]


def test_a_view_that_cannot_be_packed_is_refused_at_apply(repo: Any) -> None:
    from feast import FeatureView, Field
    from feast.types import String

    weather = repo.store.get_feature_view("weather")
    words = FeatureView(
        name="words", entities=[repo.store.get_entity("origin")], source=weather.batch_source, schema=[Field(name="text", dtype=String)]
    )
    with pytest.raises(ValueError, match="view words cannot be served: feature text is String"):
        repo.store.apply([words])


def test_reading_under_a_changed_schema_is_an_error_not_a_guess(repo: Any, redis_client: Redis) -> None:
    from feast import Field
    from feast.types import Float64

    from mlplatform.feature_store.codec import SchemaMismatchError

    repo.store.materialize(T0, END)
    view = repo.store.get_feature_view("weather")
    view.features = [f for f in view.features if f.name != "temp"] + [Field(name="temp2", dtype=Float64)]
    with pytest.raises(SchemaMismatchError, match="view weather"):
        repo.store._get_provider().online_store.online_read(repo.store.config, view, _keys("EWR"))
    packed = dump(redis_client)["weather", entity_part("weather", ["EWR"])]
    with pytest.raises(SchemaMismatchError):
        decode(packed, 1, 2)


def _keys(origin: str | None) -> list[Any]:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return [EntityKey(join_keys=["origin"], entity_values=[Value() if origin is None else Value(string_val=origin)])]


def test_an_entity_without_its_key_reads_as_missing_and_is_never_written(repo: Any) -> None:
    view = repo.store.get_feature_view("weather")
    store = repo.store._get_provider().online_store
    assert store.online_read(repo.store.config, view, _keys(None)) == [(None, None)]
    with pytest.raises(ValueError, match="join keys"):
        store.online_write_batch(repo.store.config, view, [(_keys(None)[0], {}, T0, None)], None)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("rediss://:p@h:1", "rediss://:p@h:1"),
        ("localhost:6379", "redis://localhost:6379?"),
        ("h", "redis://h:6379?"),
        ("h:7,db=3,password=0042,ssl=true", "rediss://h:7?db=3&password=0042"),
    ],
)
def test_urls_and_feasts_own_form_are_understood(text: str, url: str) -> None:
    from redis.connection import parse_url

    from mlplatform.feature_store.online import redis_url

    assert redis_url(text) == url
    assert parse_url(redis_url("h:7,db=3,password=0042")) == {"host": "h", "port": 7, "db": 3, "password": "0042"}
