"""`mlplatform bench join`: the training join of this store beside bare Polars and Feast's own stores, in one run.

Belongs here: rounds, timing, comparing answers, the table, the memory of a large join. Does not belong here: the lake and the
engines (`join_contenders.py`).
"""

import json
import os
import platform as machine
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from mlplatform.local.join_contenders import (
    BARE,
    CORRECTED,
    DUCKDB,
    OURS,
    STORE,
    Contender,
    ask,
    contenders,
    duckdb_reads_delta,
    entity_rows,
    feast_store,
    write_lake,
)
from mlplatform.printing import show

# What must hold: ours against bare Polars at most, against Feast's duckdb store at least.
AT_MOST_BARE, AT_LEAST_DUCKDB = 1.5, 3.0
TABLE_ROWS = 500_000
# What part of the rows an engine gets that would take minutes for all of them.
HEAVY = 10
MEMORY_TABLE_ROWS = 5_000_000
MEMORY_LIMIT_GB = 8.0


def run_bench_join(rows: int, rounds: int, as_json: bool) -> int:
    """Returns 0 if both ratios of CPU time are kept, 1 if not. Writes to a temporary folder only."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        lake = Path(folder, "lake")
        tables = write_lake(lake, TABLE_ROWS)
        stock = _stock_installed()
        if stock:
            stack.enter_context(duckdb_reads_delta())
        racing = contenders(Path(folder), lake, stock)
        asked = entity_rows(rows)
        for contender in racing:
            contender.answer(asked.head(100).copy())  # imports, and Feast's first look at its registry
        lines = _race(racing, asked, rounds)
    seconds = {line["engine"]: line["cpu_s"] for line in lines}
    ratios = {"to bare Polars": seconds[STORE] / seconds[BARE]}
    if stock:
        ratios["of Feast duckdb to this store"] = seconds[DUCKDB] / seconds[STORE]
    held = ratios["to bare Polars"] <= AT_MOST_BARE and ratios.get("of Feast duckdb to this store", AT_LEAST_DUCKDB) >= AT_LEAST_DUCKDB
    result = {"machine": _machine(), "entity_rows": rows, "table_rows": tables, "rounds": rounds, "engines": lines}
    result |= {"cpu_ratios": ratios, "held": held}
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        _show(lines, ratios, rows, tables, stock, held)
    return 0 if held else 1


def _stock_installed() -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("duckdb", "ibis"))


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system()}


def _race(racing: Sequence[Contender], asked: pd.DataFrame, rounds: int) -> list[dict[str, Any]]:
    """Every round in a fresh order; wall and CPU seconds of each, and its answer compared with this store's."""
    wall: dict[str, list[float]] = {c.name: [] for c in racing}
    cpu: dict[str, list[float]] = {c.name: [] for c in racing}
    answers: dict[str, pl.DataFrame] = {}
    dice = np.random.default_rng(0)
    for number in range(rounds):
        for contender in (racing[i] for i in dice.permutation(len(racing))):
            if contender.heavy and number:
                continue
            entities = (
                asked.head(len(asked) // HEAVY).copy() if contender.heavy else asked.copy()
            )  # Feast's stores write into the frame they are given
            started, used = time.perf_counter(), time.process_time()
            answer = contender.answer(entities)
            wall[contender.name].append(time.perf_counter() - started)
            cpu[contender.name].append(time.process_time() - used)
            answers[contender.name] = plain(answer)
    return [
        {
            "engine": name,
            "runs": len(wall[name]),
            "rows_in": n,
            "wall_s": round(median(wall[name]), 3),
            "cpu_s": round(median(cpu[name]), 3),
            "rows_out": answer.height,
            "in_order": answer.get_column("row").equals(pl.Series("row", range(n), dtype=pl.Int64)),
            "compared_with": like,
            "cells_different": different_cells(answers[like], answer),
        }
        for name, like, n, answer in ((c.name, c.like, len(asked) // (HEAVY if c.heavy else 1), answers[c.name]) for c in racing)
    ]


def plain(answer: pa.Table) -> pl.DataFrame:
    """The row numbers and the features, NaN as null: engines differ in which of them they use for "no value"."""
    return pl.DataFrame(answer).select("row", pl.col(pl.Float64).fill_nan(None))


def different_cells(expected: pl.DataFrame, got: pl.DataFrame) -> int:
    """Feature cells of the rows both frames have that are not the same, null equal to null. Rows are matched by `row`."""
    features = [name for name in expected.columns if name != "row"]
    both = expected.join(got.select("row", *features), on="row", how="inner", suffix=" of the other")
    return sum(both.select((pl.col(f).ne_missing(pl.col(f"{f} of the other"))).sum()).item() for f in features)


def _show(lines: Sequence[dict[str, Any]], ratios: dict[str, float], rows: int, tables: dict[str, int], stock: bool, held: bool) -> None:
    console = Console()
    sizes = ", ".join(f"{n:,}" for n in tables.values())
    table = Table(title=f"{rows:,} entity rows × 3 views × 10 features; tables of {sizes} rows; medians")
    shown = {"engine": "", "runs": "runs", "rows_in": "in", "rows_out": "out", "in_order": "order", "cells_different": "differ"}
    shown |= {"wall_s": "wall s", "cpu_s": "cpu s"}
    for name, title in shown.items():
        table.add_column(title, justify="left" if name == "engine" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(_shown(line[name]) for name in shown))
    show(table, console)
    console.print(f"differ: feature cells unlike {STORE!r}; {BARE!r} is compared with {CORRECTED!r}, which keeps the same rule")
    if not stock:
        console.print("Feast's own stores were left out: pip install 'mlplatform[bench]'")
    for name, ratio in ratios.items():
        console.print(f"CPU time {name}: {ratio:.2f}")
    bounds = f"at most {AT_MOST_BARE} × bare Polars" + (f", at least {AT_LEAST_DUCKDB:g} × faster than Feast duckdb" if stock else "")
    console.print(f"[green]kept: {bounds}[/green]" if held else f"[red]broken: {bounds}[/red]")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- memory ----------------------------------------------------------------------------------------------------------


def run_bench_join_memory(rows: int, as_json: bool) -> int:
    """The peak memory of a process that asks for `rows` rows through the Feast SDK. Returns 0 if it stays within the limit."""
    with tempfile.TemporaryDirectory() as folder:
        lake = Path(folder, "lake")
        tables = write_lake(lake, MEMORY_TABLE_ROWS)
        code = f"from mlplatform.local.bench_join import join_alone; join_alone({str(lake)!r}, {folder!r}, {rows})"
        # A process of its own: what was needed to write the lake is not the join's.
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the join failed with status {done.returncode}: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    held = measured["peak_gb"] <= MEMORY_LIMIT_GB and measured["rows_out"] == rows
    result = {"machine": _machine(), "entity_rows": rows, "table_rows": tables, **measured, "limit_gb": MEMORY_LIMIT_GB, "held": held}
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        Console().print(
            f"{rows:,} entity rows × 3 views × 10 features, tables of {', '.join(f'{n:,}' for n in tables.values())} rows: "
            f"peak {measured['peak_gb']:.2f} GB ({measured['before_gb']:.2f} GB before the join, entity frame included), "
            f"{measured['wall_s']:.0f} s, {measured['rows_out']:,} rows out"
        )
    return 0 if held else 1


def join_alone(lake: str, folder: str, rows: int) -> None:
    """Runs in the measured process: asks, and prints its own peak."""
    store = feast_store(Path(folder, "alone"), Path(lake), {"type": OURS})
    asked = entity_rows(rows)
    before = _peak_gb()
    started = time.perf_counter()
    answer = ask(store, asked)
    seconds = time.perf_counter() - started
    print(json.dumps({"peak_gb": _peak_gb(), "before_gb": before, "wall_s": round(seconds, 1), "rows_out": answer.num_rows}))  # noqa: T201


def _peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
