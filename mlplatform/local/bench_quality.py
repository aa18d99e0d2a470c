"""`mlplatform bench quality`: the whole year through the same assets, and what the models reach on November and December.

Belongs here: the run and its table. Does not belong here: any computation of its own: it materializes the assets.
"""

import json
import os
import platform as machine
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
CHALLENGER = "torch_tabular"


@dataclass(frozen=True)
class Bound:
    """What a metric must reach, and what it should; `upper` bounds are kept from below."""

    metric: str
    must: float
    target: float
    upper: bool = True

    def kept(self, metrics: Mapping[str, float]) -> bool:
        value = metrics[self.metric]
        return value <= self.must if self.upper else value >= self.must


BOUNDS: Mapping[str, tuple[Bound, ...]] = {
    "flight_disruption": (Bound("auc", 0.745, 0.75, upper=False), Bound("log_loss", 0.505, 0.5), Bound("ece", 0.02, 0.015)),
    "flight_disruption, torch": (Bound("auc", 0.75, 0.757, upper=False), Bound("log_loss", 0.505, 0.497), Bound("ece", 0.03, 0.018)),
    "arrival_delay": (
        Bound("pinball_p50", 10.5, 10.3),
        Bound("mae", 20.8, 20.5),
        Bound("coverage", 0.76, 0.8, upper=False),
        Bound("coverage", 0.84, 0.8),
    ),
}


@dataclass(frozen=True)
class Tested:
    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]


def run_bench_quality(home: Path, as_json: bool) -> int:
    """Returns 0 if every bound is kept. Leaves nothing running."""
    refuse_to_reset(home.absolute())
    report = Report(home, "[bold]mlplatform bench quality[/bold]: the year 2013 through the same assets", aside=as_json)
    reset(home)
    with report.live(), LocalPlatform(home=home, start=AFTER) as platform:
        demo = Demo.open(platform, report, None)
        tested = _year(demo)
    held = all(bound.kept(tested[name].metrics) for name, bounds in BOUNDS.items() for bound in bounds)
    if as_json:
        result = {
            "machine": {"cores": os.cpu_count(), "python": machine.python_version(), "system": machine.system()},
            "split": "train January to August, validate September and October, test November and December 2013",
            "models": {name: asdict(t) for name, t in tested.items()},
            "bounds": {name: [asdict(b) for b in bounds] for name, bounds in BOUNDS.items()},
            "seconds": {name: round(s, 1) for name, s in report.all_seconds().items()},
            "held": held,
        }
        print(json.dumps(result, indent=2))  # noqa: T201  # the command's answer
    else:
        _show(report.console, tested, held)
    return 0 if held else 1


def _year(demo: Demo) -> dict[str, Tested]:
    from mlplatform.catalog.flights.models import YEAR_SPLIT
    from mlplatform.orchestration.assets.evaluation import evaluate_version, newest_version

    demo.tables(DayRange(demo.catalog.start, AFTER.date()))
    split = {name: value.isoformat() for name, value in YEAR_SPLIT.model_dump().items()}
    config = {"ops": {f"training_set_{model.name}": {"config": split} for model in demo.catalog.models}}
    with demo.stage("training", "training_set", "tuning", "model") as step:
        demo.runner.run(demo.runner.keys("training_set", "tuning", "model"), config=config, on_step=step)
    tested = {}
    with demo.stage("evaluation"):
        for spec in demo.catalog.models:
            result, _ = evaluate_version(demo.clients, spec, newest_version(demo.clients, spec))
            tested[spec.name] = Tested(dict(result.metrics), {name: dict(m) for name, m in result.baselines.items()})
    with demo.stage("challenger"):
        tested[f"{demo.model.name}, torch"] = Tested(_challenger(demo), {})
    return {name: tested[name] for name in BOUNDS}


def _challenger(demo: Demo) -> dict[str, float]:
    """The other family on the first model's own training set, as it would be registered with another `trainer`."""
    from mlplatform.evaluation.measures import scorer
    from mlplatform.orchestration.assets.training import open_training_set
    from mlplatform.training import fitting
    from mlplatform.training.trainers import base

    data, _, spec = open_training_set(demo.clients, demo.model)
    trained = fitting.fit(spec.model_copy(update={"trainer": CHALLENGER}), data, base.get(CHALLENGER), {})
    return dict(scorer(spec)(data.part("test")["label"].to_numpy(), trained.predict(data, "test")))


def _show(console: Console, tested: Mapping[str, Tested], held: bool) -> None:
    for name, found in tested.items():
        shown = list(dict.fromkeys(bound.metric for bound in BOUNDS[name]))
        table = Table(title=f"{name}: November and December 2013, {found.metrics['rows']:,.0f} rows")
        for column in ("", *(m.replace("_", " ") for m in shown)):
            table.add_column(column, justify="right" if column else "left")
        for row, metrics in {**found.baselines, name: found.metrics}.items():
            table.add_row(row, *(f"{metrics[m]:.4f}" for m in shown))
        for row in ("must", "target"):
            table.add_row(row, *(_bounds(name, metric, row) for metric in shown))
        show(table, console)
    console.print("[green]every bound is kept[/green]" if held else "[red]a bound is broken[/red]")


def _bounds(name: str, metric: str, which: str) -> str:
    values = [(b.upper, b.must if which == "must" else b.target) for b in BOUNDS[name] if b.metric == metric]
    if which == "target":
        return f"{values[0][1]:g}"
    return " and ".join(f"{'<=' if upper else '>='} {value:g}" for upper, value in sorted(values))
