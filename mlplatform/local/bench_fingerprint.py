"""`mlplatform bench fingerprint`: how fast tables are hashed, and what each way of hashing notices.

Belongs here: the tables, the two ways to compare with, the measurement. Does not belong here: the fingerprint itself.
"""

import hashlib
import json
import os
import platform as machine
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from mlplatform.fingerprint import content_hash
from mlplatform.printing import show

ROWS = 2_000_000
MIXED_COLUMNS = 10
ROUNDS = 5
# What the fingerprint promises; the ways it is compared with are timed over fewer rows, being slower.
LEAST_CELLS_PER_S = 20_000_000
_FEWER_ROWS = 100_000


def run_bench_fingerprint(as_json: bool) -> int:
    """Prints the figures. Returns 0 if the promised speed is reached and every change is noticed by the fingerprint."""
    tables = {"mixed": mixed(ROWS), "distinct_strings": distinct_strings(ROWS), "long_strings": long_strings(ROWS // 10)}
    small = mixed(_FEWER_ROWS)
    # In turns: what else the machine does meets all of them alike.
    rounds = [_round(tables, small) for _ in range(ROUNDS)]
    # What is slower than the fastest round waited for something else (the reasoning of `timeit`).
    seconds = {name: min(r[name] for r in rounds) for name in rounds[0]}
    per_s = {name: round(table.height * table.width / seconds[name]) for name, table in tables.items()}
    cells = small.height * small.width
    result = {
        "machine": {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system()},
        "cells_per_s": {**per_s, "digest_per_row": round(cells / seconds["digest_per_row"])},
        "promised_cells_per_s": LEAST_CELLS_PER_S,
        "times_faster_than_digest_per_row": round(seconds["digest_per_row"] / seconds["small"], 1),
        "mlflow_digest_s": round(seconds["mlflow"], 4),
        "same_rows_s": round(seconds["small"], 4),
        "notices": noticed(small),
    }
    held = per_s["mixed"] >= LEAST_CELLS_PER_S and all(by["fingerprint"] for by in result["notices"].values())  # type: ignore[attr-defined]
    result["held"] = held
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        _show(Console(), result)
    return 0 if held else 1


def mixed(rows: int) -> pl.DataFrame:
    """Ten columns of every kind that feature tables have, a tenth of one of them null."""
    rng = np.random.default_rng(0)
    table = {f"x{i}": pl.Series(rng.normal(size=rows)) for i in range(5)} | {
        "with_nulls": pl.Series(rng.normal(size=rows)).zip_with(pl.Series(rng.random(rows) < 0.9), pl.Series([None], dtype=pl.Float64)),
        "count": pl.Series(rng.integers(0, 1000, rows)),
        "flag": pl.Series(rng.random(rows) < 0.5),
        "key": pl.Series(rng.integers(0, 500, rows)).cast(pl.String),
        "at": pl.Series(rng.integers(0, 10**15, rows)).cast(pl.Datetime("us", "UTC")),
    }
    assert len(table) == MIXED_COLUMNS
    return pl.DataFrame(table)


def distinct_strings(rows: int) -> pl.DataFrame:
    return pl.DataFrame({"id": pl.Series(np.arange(rows)).cast(pl.String) + "-flight"})


def long_strings(rows: int) -> pl.DataFrame:
    return pl.DataFrame({"text": pl.Series(np.arange(rows)).cast(pl.String) + "x" * 300})


def digest_per_row(table: pl.DataFrame) -> str:
    """What came before: the sorted BLAKE2b of each row's bytes, in a Python loop."""
    cells = [column.is_null().to_numpy().astype(np.uint8).reshape(-1, 1) for column in table.iter_columns()]
    cells += [_eight_bytes(column) for column in table.iter_columns()]
    block = np.ascontiguousarray(np.hstack(cells))
    data, width = block.tobytes(), block.shape[1]
    digests = sorted(hashlib.blake2b(data[i : i + width], digest_size=16).digest() for i in range(0, len(data), width))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _eight_bytes(column: pl.Series) -> Any:
    if column.dtype == pl.String:
        column = column.cast(pl.Categorical).to_physical()
    values = column.cast(pl.Float64 if column.dtype.is_float() else pl.Int64).fill_null(0).to_numpy()
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)


def mlflow_digest(table: pl.DataFrame) -> str:
    """MLflow's own digest of a pandas dataset."""
    import mlflow.data

    return str(mlflow.data.from_pandas(table.to_pandas()).digest)


def noticed(table: pl.DataFrame) -> dict[str, dict[str, bool]]:
    """For each change of one cell, whether the fingerprint and MLflow's digest change with it."""
    last = pl.int_range(pl.len()) == pl.len() - 1
    first = pl.int_range(pl.len()) == 0
    changes = {
        "a number in the last row": pl.when(last).then(pl.col("x0") + 1).otherwise(pl.col("x0")).alias("x0"),
        "a number in the first row": pl.when(first).then(pl.col("x0") + 1).otherwise(pl.col("x0")).alias("x0"),
        "a flag in the first row": (pl.col("flag") ^ first).alias("flag"),
        "a time in the first row": pl.when(first).then(pl.col("at").dt.offset_by("1d")).otherwise(pl.col("at")).alias("at"),
    }
    before = content_hash(table), mlflow_digest(table)
    found = {}
    for name, change in changes.items():
        changed = table.with_columns(change)
        found[name] = {"fingerprint": content_hash(changed) != before[0], "mlflow": mlflow_digest(changed) != before[1]}
    return found


def _round(tables: dict[str, pl.DataFrame], small: pl.DataFrame) -> dict[str, float]:
    hashed = {name: _seconds(content_hash, table) for name, table in tables.items()}
    return {
        **hashed,
        "small": _seconds(content_hash, small),
        "digest_per_row": _seconds(digest_per_row, small),
        "mlflow": _seconds(mlflow_digest, small),
    }


def _seconds(function: Callable[[pl.DataFrame], str], table: pl.DataFrame) -> float:
    began = time.perf_counter()
    function(table)
    return time.perf_counter() - began


def _show(console: Console, result: dict[str, Any]) -> None:
    speed = Table(title=f"Million cells a second (best of {ROUNDS} rounds)", title_justify="left")
    speed.add_column("table")
    speed.add_column("", justify="right")
    for name, per_s in result["cells_per_s"].items():
        speed.add_row(name.replace("_", " "), f"{per_s / 1e6:.1f}")
    speed.add_row("promised for mixed", f"{LEAST_CELLS_PER_S / 1e6:.1f}")
    show(speed, console)
    console.print(
        f"{result['times_faster_than_digest_per_row']} times as fast as a digest per row; {_FEWER_ROWS:,} rows take "
        f"{result['same_rows_s']} s, MLflow's digest of them {result['mlflow_digest_s']} s (it reads the first 10,000)"
    )
    notices = Table(title="One changed cell is noticed by", title_justify="left")
    for name in ("", "fingerprint", "MLflow's digest"):
        notices.add_column(name)
    for change, by in result["notices"].items():
        notices.add_row(change, *("yes" if by[way] else "no" for way in ("fingerprint", "mlflow")))
    show(notices, console)
    console.print("[green]the promise is kept[/green]" if result["held"] else "[red]the promise is broken[/red]")
