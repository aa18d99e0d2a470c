"""The service's reads: one round trip, exact values, age against ttl, nothing heavy imported."""

import asyncio
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from mlplatform.feature_store.codec import Decoded, SchemaMismatchError
from mlplatform.feature_store.commands import KEYS_PER_COMMAND
from mlplatform.feature_store.reader import OnlineReader, Request, SyncOnlineReader, ViewLayout
from mlplatform.feature_store.writer import write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
T0_US = int(T0.timestamp()) * 1_000_000
ROUTE = ViewLayout.declare("route", ["origin", "dest"], ["n", "delay"], timedelta(hours=1))
STATE = ViewLayout.declare("state", [], ["load"], None)


def fill(client: Redis, n: int = 3) -> None:
    rows = pl.DataFrame(
        {
            "origin": ["EWR"] * n,
            "dest": [f"D{i}" for i in range(n)],
            "event_timestamp": [T0] * n,
            "created": [T0 + timedelta(seconds=5)] * n,
            "n": [float(i) for i in range(n)],
            "delay": [None if i == 1 else -float(i) for i in range(n)],
        }
    )
    write_frame(client, "p", "route", ["origin", "dest"], ["n", "delay"], rows)
    write_frame(client, "p", "state", [], ["load"], rows.select("event_timestamp", "created", pl.lit(7).alias("load")).head(1))


def read_both(url: str, requests: list[Request]) -> list[Decoded | None]:
    """Through the async reader, after checking that the plain one says the same."""

    async def run() -> list[Decoded | None]:
        async with AsyncRedis.from_url(url) as client:
            return await OnlineReader(client, "p").read(requests)

    answers = asyncio.run(run())
    with Redis.from_url(url) as client:
        again = SyncOnlineReader(client, "p").read(requests)
    assert [a and (a.event_us, a.created_us, a.values.tobytes()) for a in answers] == [
        a and (a.event_us, a.created_us, a.values.tobytes()) for a in again
    ]
    return answers


def test_values_come_in_the_order_asked_with_none_for_the_unknown(valkey_url: str, redis_client: Redis) -> None:
    fill(redis_client)
    # Join values in the layout's order: dest before origin.
    answers = read_both(
        valkey_url, [(ROUTE, ("D2", "EWR")), (ROUTE, ("D9", "EWR")), (STATE, ()), (ROUTE, ("D1", "EWR")), (ROUTE, ("D2", "EWR"))]
    )
    assert [a is None for a in answers] == [False, True, False, False, False]
    values = [None if a is None else a.values.tolist() for a in answers]
    assert values[0] == values[4] == [2.0, -2.0]
    assert values[2] == [7.0]
    np.testing.assert_array_equal(answers[3].values if answers[3] else None, [1.0, np.nan])
    assert next((a.event_us, a.created_us) for a in answers if a) == (T0_US, T0_US + 5_000_000)


def test_nothing_asked_is_nothing_answered(valkey_url: str) -> None:
    assert read_both(valkey_url, []) == []


def test_more_keys_than_one_command_takes_still_come_back(valkey_url: str, redis_client: Redis) -> None:
    n = 2 * KEYS_PER_COMMAND + 5
    fill(redis_client, n)
    answers = read_both(valkey_url, [(ROUTE, (f"D{i}", "EWR")) for i in reversed(range(n))])
    assert [a.values[0] for a in answers if a is not None] == list(reversed(range(n)))


def test_age_is_judged_as_history_judges_it() -> None:
    value = Decoded(T0_US, T0_US, np.zeros(2))
    hour = 3_600_000_000
    assert ROUTE.state(value, T0_US + hour) == "fresh"
    assert ROUTE.state(value, T0_US + hour + 1) == "expired"
    assert ROUTE.state(None, T0_US) == "missing"
    assert STATE.state(value, T0_US + 10**15) == "fresh"
    assert ROUTE.age_us(value, T0_US - 5) == -5


def test_a_view_whose_features_changed_is_named(valkey_url: str, redis_client: Redis) -> None:
    fill(redis_client)
    changed = ViewLayout.declare("route", ["origin", "dest"], ["n"], None)
    with pytest.raises(SchemaMismatchError, match="view route"), Redis.from_url(valkey_url) as client:
        SyncOnlineReader(client, "p").read([(changed, ("D1", "EWR"))])


def test_the_wrong_number_of_join_values_is_refused(redis_client: Redis) -> None:
    with pytest.raises(ValueError, match="view route"):
        SyncOnlineReader(redis_client, "p").read([(ROUTE, ("EWR",))])


def test_join_keys_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by name"):
        ViewLayout("route", ("origin", "dest"), ("n",), 0, None)


@settings(deadline=None)
@given(st.permutations(["a", "b", "c", "d"]))
def test_values_come_in_whatever_order_the_features_are_named(valkey_url: str, order: list[str]) -> None:
    numbers = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    with Redis.from_url(valkey_url) as client:
        rows = pl.DataFrame({"event_timestamp": [T0], "created": [T0], **numbers})
        write_frame(client, "p", "letters", [], list(reversed(order)), rows)
        found = SyncOnlineReader(client, "p").read([(ViewLayout.declare("letters", [], order, None), ())])[0]
    assert found is not None
    assert found.values.tolist() == [numbers[name] for name in order]


def test_the_reader_needs_no_heavy_library() -> None:
    heavy = {"feast", "pandas", "polars", "pyarrow", "deltalake"}
    code = f"import sys, mlplatform.feature_store.reader; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
