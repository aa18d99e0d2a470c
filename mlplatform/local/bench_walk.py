"""`mlplatform bench quality --walk`: whether gates and canary would have let the right retrains through, over the year 2013.

Belongs here: the run and its tables. Does not belong here: the walk itself (`walk`).
"""

import json
import os
import platform as machine
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mlplatform.local.bench_quality import AFTER
from mlplatform.local.demo import Demo
from mlplatform.local.profile import LocalPlatform, refuse_to_reset, reset
from mlplatform.local.report import Report
from mlplatform.printing import show
from mlplatform.records import DayRange

if TYPE_CHECKING:
    from mlplatform.local.walk import Month, Walk
    from mlplatform.specs import ModelSpec
    from mlplatform.training.dataset import Dataset

_NO_HOLD_OUT = 7  # July, whose retrain is badly calibrated where June was learned and not tested on


def run_bench_walk(home: Path, as_json: bool, seeds: int = 1) -> int:
    """Returns 0 where every walk held (see `Walk.held`). Leaves nothing running."""
    refuse_to_reset(home.absolute())
    report = Report(home, "[bold]mlplatform bench quality --walk[/bold]: a retrain each month of 2013", aside=as_json)
    reset(home)
    with report.live(), LocalPlatform(home=home, start=AFTER) as platform:
        demo = Demo.open(platform, report, None)
        demo.tables(DayRange(demo.catalog.start, AFTER.date()))
        with report.task("joining the year"):
            spec, year = _year(demo)
        asked = {field.name for field in spec.request_fields if field.constant is None}
        entity = sorted(asked & {key for plan in demo.plans.values() for key in plan.join_keys})  # as `sticky.sticky_fields` has it
        walks = {seed: _walk(report, spec.model_copy(update={"seed": seed}), year, entity) for seed in _seeds(spec, seeds)}
    held = all(walk.held for walk in walks.values())
    if as_json:
        result = {
            "machine": {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system()},
            "walks": {seed: _plain(walk) for seed, walk in walks.items()},
            "seconds": {name: round(s, 1) for name, s in report.all_seconds().items()},
            "held": held,
        }
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        for seed, walk in walks.items():
            _show(report.console, seed, walk)
        report.console.print("[green]held[/green]" if held else "[red]not held[/red]")
    return 0 if held else 1


def _seeds(spec: "ModelSpec", count: int) -> list[int]:
    return [spec.seed, *range(1, count)]


def _year(demo: Demo) -> tuple["ModelSpec", "Dataset"]:
    """Every labelled row of the year with its features, and the model with its split moved to where the first retrain can begin."""
    from mlplatform.local.walk import FIRST, begins, in_order
    from mlplatform.orchestration.assets.training import read_training_data
    from mlplatform.orchestration.automation.jobs import labels_complete
    from mlplatform.specs import Split

    spec = demo.model
    whole = Split(train_start=spec.split.train_start, validate_start=date(2013, 2, 1), test_start=date(2013, 3, 1), end=date(2014, 1, 1))
    year = in_order(spec, read_training_data(demo.clients, spec.model_copy(update={"split": whole}), demo.plans, {}))
    first = labels_complete(spec, begins(date(2013, FIRST, 1)))
    return spec.model_copy(update={"split": spec.split.moved_to(first)}), year


def _walk(report: Report, spec: "ModelSpec", year: "Dataset", entity: Sequence[str]) -> "Walk":
    from mlplatform.local.walk import FIRST, LAST, retrain, walk

    months = [date(2013, month, 1) for month in range(FIRST, LAST + 1)]
    retrains = []
    with report.stage(f"retraining, seed {spec.seed}", len(months) + 1) as step:
        for month in months:
            step(f"{month:%B}", False)
            retrains.append(retrain(spec, year, month))
            step(f"{month:%B}", True)
        beside = retrain(spec, year, date(2013, _NO_HOLD_OUT, 1), hold_out=False)
        step("without a test month", True)
    with report.stage(f"gates and canaries, seed {spec.seed}", 0):
        return walk(year, retrains, beside, entity)


def _plain(walk: "Walk") -> dict[str, Any]:
    return {
        "first": {"passed": walk.first.passed, "gates": [asdict(g) for g in walk.first.gates]},
        "months": [asdict(m) | {"good": m.good, "stopped": m.stopped} for m in walk.months],
        "no_hold_out": asdict(walk.no_hold_out),
        "pooled": {name: dict(metrics) for name, metrics in walk.pooled.items()},
        "held": walk.held,
    }


def _show(console: Console, seed: int, walk: "Walk") -> None:
    table = Table(title=f"Seed {seed}: each month's retrain beside what served when it was made (its figure / theirs, in that month)")
    for name in ("month", "gates", "canary", "days", "serves then", "label", "mean prediction", "ECE", "log loss", "AUC"):
        table.add_column(name, justify="left" if name in ("month", "gates", "canary", "serves then") else "right", overflow="fold")
    first = "passed" if walk.first.passed else "REFUSED"
    table.add_row("Apr", first, "nothing served before", "", "Apr", *([""] * 5))
    for month in walk.months:
        if month.month == walk.no_hold_out.month:
            table.add_row(*_line(walk.no_hold_out, f"{month.month}, nothing held out", ""), style="dim")
        table.add_row(*_line(month, month.month, month.serves))
    show(table, console)
    pooled = Table(title="April to December, all answers")
    for name in ("", "AUC", "log loss", "ECE", "saving"):
        pooled.add_column(name, justify="right" if name else "left")
    for name, m in walk.pooled.items():
        pooled.add_row(name, *(f"{m[k]:.4f}" for k in ("auc", "log_loss", "ece", "saving")))
    show(pooled, console)


def _line(month: "Month", name: str, serves: str) -> tuple[str, ...]:
    gates = "passed" if month.passed else f"REFUSED {month.gates}"
    days = "" if month.days is None else f"{month.days:.1f}"
    both = [_both(month.challenger, month.champion, metric) for metric in ("mean_prediction", "ece", "log_loss", "auc")]
    return (name, gates, month.canary, days, serves, f"{month.challenger['base_rate']:.3f}", *both)


def _both(mine: Mapping[str, float], theirs: Mapping[str, float], metric: str) -> str:
    return f"{mine[metric]:.3f} / {theirs[metric]:.3f}"
