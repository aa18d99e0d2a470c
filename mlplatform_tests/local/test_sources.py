"""The source systems show the past only, over their real protocols, and publish what falls due before they answer."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import polars as pl
import pytest
import redis
import uvicorn

from mlplatform.clock import SimulatedClock
from mlplatform.local.deliveries import EVENT_TIME, DeliveryModel, deliveries_between, deliveries_until
from mlplatform.local.nycflights import World
from mlplatform.local.services import source_settings, source_systems, valkey
from mlplatform.local.sources import SourceFiles, create_app, open_systems, prepare_files, schedule_between
from mlplatform.local.supervisor import Supervisor, free_port
from mlplatform.settings import Settings

START = datetime(2013, 9, 1, tzinfo=UTC)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose world and archive are built once; tests bring their own clock and Redis."""
    return tmp_path_factory.mktemp("sources-home")


@pytest.fixture
def api(home: Path, tmp_path: Path, redis_url: str) -> Iterator[httpx.Client]:
    systems = open_systems(home, tmp_path / "clock.json", redis_url, START, DeliveryModel())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(systems), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        yield http
    server.should_exit = True
    thread.join()


def move(api: httpx.Client, to: datetime, speed: float = 0) -> dict:
    answer = api.post("/clock", json={"to": to.isoformat(), "speed": speed})
    assert answer.status_code == 200, answer.text
    return answer.json()


def weather(api: httpx.Client, start: datetime, end: datetime, **page: int) -> dict:
    return api.get("/weather", params={"from": start.isoformat(), "to": end.isoformat(), **page}).json()


def test_weather_never_shows_the_future(api: httpx.Client) -> None:
    far = START + timedelta(days=90)
    for minutes in (0, 59, 60, 61, 60 * 30):
        now = START + timedelta(minutes=minutes)
        move(api, now)
        newest = max(datetime.fromisoformat(row["time_hour"]) for row in weather(api, START - timedelta(days=1), far)["items"])
        assert now - timedelta(minutes=120) < newest <= now - timedelta(minutes=60)


def test_weather_pages_add_up(api: httpx.Client, world: World) -> None:
    begin = START - timedelta(days=30)
    whole = weather(api, begin, START, page_size=100_000)
    pages = [weather(api, begin, START, page=n + 1, page_size=500) for n in range(whole["total_pages"] * 5)]
    assert pages[0]["total_pages"] == -(-len(whole["items"]) // 500) == 5
    assert [row for page in pages for row in page["items"]] == whole["items"]
    expected = world.weather.filter(pl.col("time_hour") >= begin, pl.col("time_hour") < START - timedelta(minutes=59))
    assert len(whole["items"]) == expected.height
    assert weather(api, START, START + timedelta(days=1)) == {"items": [], "page": 1, "total_pages": 0}


@pytest.mark.parametrize("bad", [{"from": "2013-01-01T00:00:00"}, {"from": "yesterday"}, {"page": 0}, {"page_size": 0}])
def test_a_request_that_makes_no_sense_is_refused(api: httpx.Client, bad: dict) -> None:
    good = {"from": "2013-01-01T00:00:00Z", "to": "2013-01-02T00:00:00Z"}
    assert api.get("/weather", params=good | bad).status_code == 422


def test_moving_the_clock_publishes_exactly_the_due_events_before_it_answers(api: httpx.Client, client: redis.Redis, deliveries) -> None:
    for hours in (6, 12, 48):
        now = START + timedelta(hours=hours)
        move(api, now)
        assert api.get("/clock").json()["now"] == now.isoformat()
        for source, rows in deliveries.items():
            live = deliveries_until(deliveries_between(rows, START, None), now)
            assert client.xlen(f"flights.{source}") == live.height


def test_events_that_could_not_be_published_follow_when_redis_is_back(home: Path, tmp_path: Path, deliveries) -> None:
    now, store = START + timedelta(hours=6), tmp_path / "store"
    port = free_port()
    with Supervisor(store) as supervisor:
        systems = open_systems(home, tmp_path / "clock.json", supervisor.start(valkey(store, port)).url, START, DeliveryModel())
    with pytest.raises(redis.ConnectionError):
        systems.move(now, speed=0)
    with Supervisor(store) as supervisor:
        supervisor.start(valkey(store, port))
        missed = systems.move(now, speed=0)
    for source, rows in deliveries.items():
        due = deliveries_until(deliveries_between(rows, START, None), now)
        assert missed[source] == due.height - deliveries_until(due, START).height


def test_the_settings_lead_to_the_files(api: httpx.Client, home: Path) -> None:
    settings = source_settings(home, "redis://r", "http://w")
    with sqlite3.connect(settings["MLPLATFORM_SOURCE_REFERENCE"].removeprefix("sqlite:///")) as database:
        assert database.execute("SELECT count(*) FROM airlines").fetchone() == (16,)
    database.close()
    assert (Path(settings["MLPLATFORM_SOURCE_ARCHIVE"]) / "arrivals" / "2013-08-31.parquet").is_file()
    connected = Settings(source_reference=settings["MLPLATFORM_SOURCE_REFERENCE"], source_archive=settings["MLPLATFORM_SOURCE_ARCHIVE"])
    assert connected.connection("archive") == settings["MLPLATFORM_SOURCE_ARCHIVE"]


def test_the_clock_does_not_go_back(api: httpx.Client, client: redis.Redis) -> None:
    move(api, START + timedelta(hours=1))
    assert api.post("/clock", json={"to": START.isoformat()}).status_code == 409
    assert api.get("/clock").json()["now"] == (START + timedelta(hours=1)).isoformat()


def test_a_running_clock_publishes_by_itself(api: httpx.Client, client: redis.Redis) -> None:
    move(api, START + timedelta(hours=12), speed=36_000)
    before = client.xlen("flights.departures")
    for _ in range(40):
        if client.xlen("flights.departures") > before:
            return
        api.get("/clock")
        client.blpop(["nothing"], timeout=0.1)
    pytest.fail("a clock at ten hours a second brought no departure in four seconds")


def test_archive_and_stream_share_no_delivery_and_miss_none(api: httpx.Client, home: Path, client: redis.Redis, deliveries) -> None:
    end = START + timedelta(days=2)
    move(api, end)
    for source, rows in deliveries.items():
        archived = pl.read_parquet(home / "sources" / "archive" / source / "*.parquet")
        assert archived.columns == [*rows.columns[:-1], "received_at"]
        assert archived.height + client.xlen(f"flights.{source}") == deliveries_until(rows, end).height
        days = sorted(path.stem for path in (home / "sources" / "archive" / source).iterdir())
        assert days[-1] == str(archived[EVENT_TIME[source]].max().date())


def test_a_restart_publishes_nothing_twice(home: Path, tmp_path: Path, redis_url: str, client: redis.Redis, deliveries) -> None:
    clock = tmp_path / "clock.json"
    for hours in (6, 20):
        systems = open_systems(home, clock, redis_url, START, DeliveryModel())
        systems.move(START + timedelta(hours=hours), speed=0)
    # The clock moved while nobody published: the next start catches up.
    SimulatedClock(clock).set(START + timedelta(hours=30))
    open_systems(home, clock, redis_url, START, DeliveryModel())
    for source, rows in deliveries.items():
        live = deliveries_until(deliveries_between(rows, START, None), START + timedelta(hours=30))
        assert client.xlen(f"flights.{source}") == live.height


def test_the_reference_database_holds_the_tables(api: httpx.Client, home: Path, world: World) -> None:
    with sqlite3.connect(home / "sources" / "reference.db") as database:
        for table in ("planes", "airlines", "airports"):
            rows = database.execute(f"SELECT * FROM {table}").fetchall()
            assert rows == getattr(world, table).rows()
    database.close()


def test_files_are_kept_for_the_same_start_and_rebuilt_for_another(tmp_path: Path) -> None:
    files = SourceFiles.under(tmp_path)
    january = datetime(2013, 1, 3, tzinfo=UTC)
    for start, days in ((january, 2), (january + timedelta(days=1), 3)):
        prepare_files(files, start, DeliveryModel())
        assert len(list((files.archive / "schedules").iterdir())) == days
        assert files.read("live_schedules")["delivered_at"].min() == start
    written = files.reference.stat().st_mtime_ns
    prepare_files(files, start, DeliveryModel())
    assert files.reference.stat().st_mtime_ns == written


def test_the_schedule_tells_only_published_flights_with_their_load(world: World) -> None:
    now = START + timedelta(hours=15)
    rows = schedule_between(world.schedules, now, now + timedelta(hours=3), now)
    near = world.schedules.filter(pl.col("scheduled_departure").is_between(START, START + timedelta(days=1)))
    flights = near.select("origin", "scheduled_departure").rows()
    half = timedelta(minutes=30)
    for row in rows.iter_rows(named=True):
        load = sum(origin == row["origin"] and abs(at - row["scheduled_departure"]) <= half for origin, at in flights)
        assert row["scheduled_load"] == load >= 1
    assert rows.height == near.filter(pl.col("scheduled_departure").is_between(now, now + timedelta(hours=3), closed="left")).height
    assert schedule_between(world.schedules, now + timedelta(days=2), now + timedelta(days=3), now).height == 0


def test_the_schedule_is_served_as_an_application_asks_for_it(api: httpx.Client) -> None:
    noon = START + timedelta(hours=14)
    items = api.get("/schedule", params={"from": noon.isoformat(), "to": (noon + timedelta(minutes=15)).isoformat()}).json()["items"]
    assert set(items[0]) == {
        "flight_id", "carrier", "flight", "origin", "dest", "scheduled_departure", "scheduled_arrival", "distance_miles", "scheduled_load",
    }  # fmt: skip


def test_the_process_starts_answers_and_ends(home: Path, tmp_path: Path, redis_url: str) -> None:
    with Supervisor(tmp_path / "home") as supervisor:
        service = supervisor.start(source_systems(home, redis_url, tmp_path / "clock.json", START))
        assert httpx.get(f"{service.url}/clock").json()["now"] == START.isoformat()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/clock")
