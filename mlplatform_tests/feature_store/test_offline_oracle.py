"""Random histories in real Delta files, asked for through the Feast SDK, against the brute-force oracle."""

import os
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("MLPLATFORM_TEST_EXAMPLES", "10000")) // 50
START = datetime(2013, 8, 31, 20, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
TEXT, WHOLE, HOURS = ("a", "b", None), (0, 1, None), range(10)
DELAYS = (*[0] * 8, *range(-2, 10))
# The caller's zone: naive, UTC, west, east.
ZONES = (None, UTC, timezone(timedelta(hours=-4)), timezone(timedelta(hours=5, minutes=45)))
TTL = 4

# Midnight UTC lies within, so that tables have two day partitions. Key, hour, delay of creation; key, hour, zone.
stored = st.lists(st.sampled_from(list(product(TEXT, WHOLE, HOURS, DELAYS))), max_size=14)
asked = st.lists(st.sampled_from(list(product(TEXT, WHOLE, HOURS, ZONES))), max_size=8)


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


class Views:
    """Three views that share a feature name: one key with a ttl, two keys without one and renamed, no key and no created."""

    def __init__(self, folder: Path, later: bool) -> None:
        from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource
        from feast.data_format import DeltaFormat
        from feast.repo_config import RepoConfig
        from feast.types import Int64, String
        from feast.value_type import ValueType

        self.folder, self.later = folder, later
        folder.mkdir()
        who = Entity(name="who", join_keys=["who"], value_type=ValueType.STRING)
        number = Entity(name="number", join_keys=["number"], value_type=ValueType.INT64)
        keys = {"one": [who], "two": [who, number], "none": []}
        fields = {"who": Field(name="who", dtype=String), "number": Field(name="number", dtype=Int64)}

        def view(name: str) -> FeatureView:
            source = FileSource(
                name=f"{name}_table",
                path=str(folder / name),
                file_format=DeltaFormat(),
                timestamp_field="event_timestamp",
                created_timestamp_column="" if name == "none" else "created",
                field_mapping={"stored_v": "v"} if name == "one" else {},
            )
            schema = [*(fields[e.name] for e in keys[name]), Field(name="v", dtype=Int64)]
            return FeatureView(
                name=name,
                entities=keys[name],
                schema=schema,
                source=source,
                ttl=timedelta(0) if name == "two" else timedelta(hours=TTL),
            )

        config = RepoConfig(
            project="oracle",
            provider="local",
            registry=str(folder / "registry.db"),
            offline_store={"type": "mlplatform.feature_store.offline.DeltaOfflineStore", "later_corrections": later},
            online_store=None,
            entity_key_serialization_version=3,
            repo_path=folder,
        )
        self.store = FeatureStore(config=config)
        self.store.apply([who, number, *(view(name) for name in keys)])
        renamed = self.store.get_feature_view("two").with_join_key_map({"who": "asker", "number": "count"})
        features = [self.store.get_feature_view("one"), renamed, self.store.get_feature_view("none")]
        self.store.apply([FeatureService(name="asked", features=features)])
        self.service = self.store.get_feature_service("asked")

    def write(self, name: str, rows: list[Any], by_day: bool) -> None:
        """The view's table anew; the value of a row is its position."""
        table = pl.DataFrame(
            {
                "who": [r[0] for r in rows],
                "number": [r[1] for r in rows],
                "event_timestamp": [at(r[2]) for r in rows],
                "created": [at(r[3]) for r in rows],
                "stored_v" if name == "one" else "v": list(range(len(rows))),
            },
            schema_overrides={"who": pl.String, "number": pl.Int64, "event_timestamp": TIME, "created": TIME},
        ).with_columns(pl.col("event_timestamp").dt.date().alias("event_date"))
        table = table.with_columns(pl.col("^(stored_)?v$").cast(pl.Int64))
        write_deltalake(
            str(self.folder / name),
            table.to_arrow(compat_level=pl.CompatLevel.oldest()),
            mode="overwrite",
            schema_mode="overwrite",
            partition_by=["event_date"] if by_day else None,
        )

    def ask(self, questions: list[Any]) -> pl.DataFrame:
        frame = pd.DataFrame(
            {
                "who": pd.Series([q[0] for q in questions], dtype=object),
                "asker": pd.Series([q[0] for q in questions], dtype=object),
                "count": pd.Series([q[1] for q in questions], dtype="float64"),
                "event_timestamp": pd.Series([_in_zone(at(q[2]), q[3]) for q in questions], dtype=object),
            },
        ).set_index(pd.Index([0] * len(questions)))
        return self.store.get_historical_features(frame, self.service, full_feature_names=True).to_polars()


def _in_zone(moment: datetime, zone: Any) -> datetime:
    return moment.replace(tzinfo=None) if zone is None else moment.astimezone(zone)


def once(rows: list[Any]) -> list[Any]:
    """(key…, event, created), no two alike: of rows equal in all of them a table keeps no order."""
    return list(dict.fromkeys((who, number, hour, hour + delay) for who, number, hour, delay in rows))


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Views]:
    folder = tmp_path_factory.mktemp("oracle")
    return {later: Views(folder / str(later), later) for later in (False, True)}


@pytest.mark.timeout(900)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(asked, stored, stored, stored, st.booleans(), st.booleans())
def test_history_equals_the_oracle_cell_by_cell(
    views: dict[bool, Views], oracle: Any, questions: list, one: list, two: list, none: list, by_day: bool, later: bool
) -> None:
    asking = views[later]
    tables = {"one": once(one), "two": once(two), "none": once([(None, None, hour, 0) for *_, hour, _ in none])}
    for name, rows in tables.items():
        asking.write(name, rows, by_day)
    got = asking.ask(questions)
    assert got.height == len(questions)
    assert got.get_column("who").to_list() == [q[0] for q in questions]
    asked_for = [q[:3] for q in questions]
    for name, keys, ttl in (("one", 1, TTL), ("two", 2, None), ("none", 0, TTL)):
        assert got.get_column(f"{name}__v").to_list() == oracle(asked_for, tables[name], keys, ttl, later)
