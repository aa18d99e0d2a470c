"""The demo's source systems in one process: reference database, weather API, event streams with archive, the schedule.

Belongs here: serving the world of `nycflights` over the real protocols, up to the simulated clock and never beyond.
Does not belong here: anything of the platform; it reads these systems as it would read a customer's.

    python -m mlplatform.local.sources --port 8100 --redis redis://127.0.0.1:6379/0 --clock HOME/clock.json \
        --home HOME --start 2013-09-01T00:00:00Z
"""

import argparse
import json
import logging
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import orjson
import polars as pl
import redis
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Response
from pydantic import AwareDatetime, BaseModel

from mlplatform.clock import SimulatedClock
from mlplatform.local.deliveries import EVENT_TIME, DeliveryModel, all_deliveries, deliveries_between, write_archive
from mlplatform.local.nycflights import WORLD_VERSION, World, load_world
from mlplatform.local.publisher import Publisher

log = logging.getLogger(__name__)

WEATHER_KNOWN_AFTER = timedelta(minutes=60)
LOAD_WINDOW = timedelta(minutes=30)
_PUBLISH_EVERY_S = 0.25
_REFERENCE_KEYS = {"planes": "tailnum", "airlines": "carrier", "airports": "faa"}
_SQL_TYPES = {pl.Int64: "INTEGER", pl.Float64: "REAL", pl.String: "TEXT"}


@dataclass(frozen=True)
class SourceFiles:
    """What the source systems keep under `HOME/sources`: the reference database and the archive of old events."""

    folder: Path

    @property
    def world_cache(self) -> Path:
        return self.folder / "world"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.db"

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    @property
    def served(self) -> Path:
        return self.folder / "served"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def read(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self.served / f"{name}.parquet")

    @classmethod
    def under(cls, home: Path) -> "SourceFiles":
        return cls(home.absolute() / "sources")


def fingerprint(start: datetime, model: DeliveryModel) -> str:
    """Names the deliveries of a start and a model: what files and streams must agree on."""
    return json.dumps({"world": WORLD_VERSION, "start": start.astimezone(UTC).isoformat(), **asdict(model)}, sort_keys=True)


def prepare_files(files: SourceFiles, start: datetime, model: DeliveryModel) -> str:
    """Writes everything the systems serve, unless the files of this start and model are there; gives their fingerprint.

    The reference database, the archive (delivered before `start`), and what the running process reads: the deliveries
    from `start` on, the weather, the schedule.
    """
    mark = fingerprint(start, model)
    if files.manifest.is_file() and files.manifest.read_text() == mark:
        return mark
    world = load_world(files.world_cache)
    files.manifest.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=files.folder) as name:
        scratch = Path(name)
        write_reference(world, scratch / files.reference.name)
        (scratch / files.served.name).mkdir()
        for table in ("weather", "schedules"):
            getattr(world, table).write_parquet(scratch / files.served.name / f"{table}.parquet", compression="lz4")
        for source, rows in all_deliveries(world, model).items():
            write_archive(rows, EVENT_TIME[source], start, scratch / files.archive.name / source)
            live = deliveries_between(rows, start, None)
            live.write_parquet(scratch / files.served.name / f"live_{source}.parquet", compression="lz4")
        for folder in (files.archive, files.served):
            if folder.exists():
                shutil.rmtree(folder)
            (scratch / folder.name).rename(folder)
        (scratch / files.reference.name).replace(files.reference)
    # Last: only a finished set of files carries the mark.
    files.manifest.write_text(mark)
    return mark


def write_reference(world: World, path: Path) -> None:
    """The SQLite database with the tables `planes`, `airlines` and `airports`."""
    with sqlite3.connect(path) as connection:
        for table, key in _REFERENCE_KEYS.items():
            frame: pl.DataFrame = getattr(world, table)
            columns = ", ".join(
                f'"{name}" {_SQL_TYPES[type(dtype)]}{" PRIMARY KEY" if name == key else ""}' for name, dtype in frame.schema.items()
            )
            connection.execute(f'CREATE TABLE "{table}" ({columns})')
            marks = ", ".join("?" * frame.width)
            rows = frame.iter_rows()
            connection.executemany(f'INSERT INTO "{table}" VALUES ({marks})', rows)  # noqa: S608  # names from this file
    connection.close()


def weather_between(weather: pl.DataFrame, start: datetime, end: datetime, now: datetime) -> pl.DataFrame:
    """Observations with `start <= time_hour < end` that are known at `now`, by time and origin."""
    hour = pl.col("time_hour")
    return weather.filter(hour >= start, hour < end, hour + WEATHER_KNOWN_AFTER <= now)


def schedule_between(schedules: pl.DataFrame, start: datetime, end: datetime, now: datetime) -> pl.DataFrame:
    """Flights with `start <= scheduled_departure < end` of the schedule published at `now`, with `scheduled_load`.

    The load counts the flights scheduled from the same origin at most 30 minutes before or after, the flight included.
    """
    at = pl.col("scheduled_departure")
    near = (
        schedules.lazy()
        .filter(pl.col("published_at") <= now, at >= start - LOAD_WINDOW, at < end + LOAD_WINDOW)
        .select("flight_id", "carrier", "flight", "origin", "dest", at, "scheduled_arrival", "distance_miles")
        .sort("origin", at, "flight_id")
        .collect()
    )
    loads = [_loads(rows["scheduled_departure"]) for _, rows in near.group_by("origin", maintain_order=True)]
    load = pl.concat(loads) if loads else pl.Series(dtype=pl.Int64)
    return near.with_columns(scheduled_load=load).filter(at >= start, at < end).sort(at, "flight_id")


def _loads(times: pl.Series) -> pl.Series:
    upper = times.search_sorted(times + LOAD_WINDOW, side="right").cast(pl.Int64)
    return upper - times.search_sorted(times - LOAD_WINDOW, side="left").cast(pl.Int64)


class ClockTime(BaseModel):
    """Puts the clock forward to `to`; afterwards it runs at `speed` simulated seconds a second (0: stands still)."""

    to: AwareDatetime
    speed: float = 0.0


class SourceSystems:
    """The running systems: what the HTTP API reads, the clock, and the publisher that follows it."""

    def __init__(self, weather: pl.DataFrame, schedules: pl.DataFrame, clock: SimulatedClock, publisher: Publisher) -> None:
        self.weather = weather
        self.schedules = schedules
        self.clock = clock
        self.publisher = publisher
        self._moving = threading.Lock()
        self._stop = threading.Event()
        self.error: str | None = None

    def move(self, to: datetime, speed: float) -> dict[str, int]:
        """Sets the clock, then publishes what fell due. Raises `ValueError` where `to` lies in the past."""
        with self._moving:
            now = self.clock.now()
            if to < now:
                raise ValueError(f"the clock shows {now.isoformat()} and does not go back")
            # The clock first: published first, an event could be received before it happened.
            self.clock.set(to, speed)
            return self.catch_up()

    def catch_up(self) -> dict[str, int]:
        """Publishes what is due by the clock; a restarted process begins with it."""
        published = self.publisher.publish_until(self.clock.now())
        self.error = None
        return published

    def follow(self) -> None:
        """Publishes as a running clock goes, until `close`."""
        while not self._stop.wait(_PUBLISH_EVERY_S):
            try:
                self.catch_up()
            except redis.RedisError as failure:
                # Told at GET /clock; the next round publishes what this one could not.
                self.error = str(failure)
                log.warning("events wait: %s", failure)

    def close(self) -> None:
        self._stop.set()


def create_app(systems: SourceSystems) -> FastAPI:
    """The HTTP face of the source systems."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        follower = threading.Thread(target=systems.follow, name="publish-events")
        follower.start()
        yield
        systems.close()
        follower.join()

    app = FastAPI(title="Sample source systems", lifespan=lifespan, docs_url=None, redoc_url=None)
    since = Annotated[AwareDatetime, Query(alias="from", description="inclusive, ISO 8601 with zone")]
    until = Annotated[AwareDatetime, Query(alias="to", description="exclusive, ISO 8601 with zone")]

    @app.get("/weather")
    def weather(
        start: since, end: until, page: Annotated[int, Query(ge=1)] = 1, page_size: Annotated[int, Query(ge=1, le=100_000)] = 1000
    ) -> Response:
        rows = weather_between(systems.weather, start, end, systems.clock.now())
        pages = -(-rows.height // page_size)
        return _json({"items": rows.slice((page - 1) * page_size, page_size).to_dicts(), "page": page, "total_pages": pages})

    @app.get("/schedule")
    def schedule(start: since, end: until) -> Response:
        return _json({"items": schedule_between(systems.schedules, start, end, systems.clock.now()).to_dicts()})

    @app.get("/clock")
    def read_clock() -> Response:
        return _json({"now": systems.clock.now(), "published": systems.publisher.published(), "error": systems.error})

    @app.post("/clock")
    def move_clock(time: ClockTime) -> Response:
        try:
            published = systems.move(time.to, time.speed)
        except ValueError as refusal:
            raise HTTPException(409, str(refusal)) from refusal
        except redis.RedisError as failure:
            raise HTTPException(503, f"the clock is set, but its events are not all published: {failure}") from failure
        return _json({"now": systems.clock.now(), "published": published})

    return app


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def open_systems(home: Path, clock_file: Path, redis_url: str, start: datetime, model: DeliveryModel) -> SourceSystems:
    """Builds what is missing under `home`, starts the clock where it has none, and publishes what is due already."""
    files = SourceFiles.under(home)
    mark = prepare_files(files, start, model)
    live = {source: files.read(f"live_{source}") for source in EVENT_TIME}
    clock = SimulatedClock(clock_file)
    if not clock_file.exists():
        clock.set(start)
    systems = SourceSystems(
        files.read("weather"), files.read("schedules"), clock, Publisher(redis.Redis.from_url(redis_url, decode_responses=True), live, mark)
    )
    systems.catch_up()
    return systems


def _instant(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise argparse.ArgumentTypeError(f"'{text}' has no time zone: write 2013-09-01T00:00:00Z")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The demo's source systems")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--redis", required=True, help="Redis URL of the event streams")
    parser.add_argument("--clock", type=Path, required=True, help="file of the simulated clock")
    parser.add_argument("--home", type=Path, required=True, help="the platform's home; files go to HOME/sources")
    parser.add_argument("--start", type=_instant, required=True, help="events delivered before it are archived, later ones streamed")
    parser.add_argument("--seed", type=int, default=DeliveryModel.seed)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    systems = open_systems(given.home, given.clock, given.redis, given.start, DeliveryModel(seed=given.seed))
    uvicorn.run(create_app(systems), host="127.0.0.1", port=given.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
