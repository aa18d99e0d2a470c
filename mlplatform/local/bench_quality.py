"""`mlplatform bench quality`: the whole year through the same assets, and what the model reaches on November and December.

Belongs here: the run and its table. Does not belong here: any computation of its own: it materializes the assets.
"""

import json
import os
import platform as machine
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlplatform.local.demo import Demo
from mlplatform.local.profile import LocalPlatform, refuse_to_reset, reset
from mlplatform.local.report import Report
from mlplatform.printing import show
from mlplatform.records import DayRange

# The clock stands right after the last outcome of 2013. The sources end at different moments before it, so the range
# ends with a day that is not over, of which neither rows nor freshness are asked.
AFTER = datetime(2014, 1, 2, 12, tzinfo=UTC)
BOUNDS = {"auc": (0.745, True), "log_loss": (0.505, False), "ece": (0.02, False)}
TARGETS = {"auc": 0.75, "log_loss": 0.500, "ece": 0.015}


def run_bench_quality(home: Path, as_json: bool) -> int:
    """Returns 0 if every bound is kept. Leaves nothing running."""
    refuse_to_reset(home.absolute())
    report = Report(home, "[bold]mlplatform bench quality[/bold]: the year 2013 through the same assets", aside=as_json)
    reset(home)
    with report.live(), LocalPlatform(home=home, start=AFTER) as platform:
        demo = Demo.open(platform, report, None)
        tested, baselines = _year(demo)
    held = all(tested[m] >= bound if higher else tested[m] <= bound for m, (bound, higher) in BOUNDS.items())
    result = {
        "machine": {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system()},
        "split": "train January to August, validate September and October, test November and December 2013",
        "metrics": tested,
        "baselines": baselines,
        "bounds": {m: b for m, (b, _) in BOUNDS.items()},
        "targets": TARGETS,
        "seconds": {name: round(s, 1) for name, s in report.all_seconds().items()},
        "held": held,
    }
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        _show(report.console, tested, baselines, held)
    return 0 if held else 1


def _year(demo: Demo) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    from mlplatform.catalog.flights.models import YEAR_SPLIT
    from mlplatform.orchestration.assets.evaluation import evaluate_version, newest_version

    demo.tables(DayRange(demo.catalog.start, AFTER.date()))
    split = {name: value.isoformat() for name, value in YEAR_SPLIT.model_dump().items()}
    config = {"ops": {f"training_set_{demo.model.name}": {"config": split}}}
    with demo.stage("training", "training_set", "tuning", "model") as step:
        demo.runner.run(demo.runner.keys("training_set", "tuning", "model"), config=config, on_step=step)
    with demo.stage("evaluation"):
        result, _ = evaluate_version(demo.clients, demo.model, newest_version(demo.clients, demo.model))
    return dict(result.metrics), {name: dict(m) for name, m in result.baselines.items()}


def _show(console: Console, tested: dict[str, float], baselines: dict[str, dict[str, float]], held: bool) -> None:
    table = Table(title="Test rows: November and December 2013")
    for name in ("", "AUC", "log loss", "ECE", "rows"):
        table.add_column(name, justify="right" if name else "left")
    for name, metrics in {**baselines, "flight_disruption": tested}.items():
        table.add_row(name, f"{metrics['auc']:.4f}", f"{metrics['log_loss']:.4f}", f"{metrics['ece']:.4f}", f"{metrics['rows']:,.0f}")
    table.add_row("must reach", *(f"{BOUNDS[m][0]}" for m in ("auc", "log_loss", "ece")), "")
    table.add_row("target", *(f"{TARGETS[m]}" for m in ("auc", "log_loss", "ece")), "")
    show(table, console)
    console.print("[green]every bound is kept[/green]" if held else "[red]a bound is broken[/red]")
