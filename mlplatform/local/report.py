"""What a person sees of the demo: progress bars while it runs, a table and a summary at the end.

Belongs here: rendering. Does not belong here: measuring (`accounting`) or doing anything.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlplatform.cli_options import HERE
from mlplatform.printing import show

if TYPE_CHECKING:
    from mlplatform.local.profile import LocalPlatform
    from mlplatform.local.replay import OnTick


def down_command(home: Path) -> str:
    """What ends the platform under `home`."""
    return "make down" if home.absolute() == HERE.absolute() else f"mlplatform down --home {home}"


@dataclass(frozen=True)
class StageRow:
    """One line of the closing table. `fault` says why the stage did not do its work; empty when it did."""

    stage: str
    assets: int
    rows_in: int | None
    rows_out: int | None
    quarantined: int | None
    seconds: float
    fault: str = ""


class StepCounter:
    """Moves a bar on by one for each finished step, and names the step at work."""

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        self._progress, self._task, self._name = progress, task, name

    def __call__(self, step: str, finished: bool) -> None:
        if finished:
            self._progress.advance(self._task)
        else:
            self._progress.update(self._task, description=f"{self._name}: {step}")


@contextmanager
def warnings_to_file(path: Path) -> Iterator[None]:
    """Keeps libraries' warnings (deprecations inside Dagster, Feast's alpha notes) out of the bars, and in a file."""
    logger = logging.getLogger("py.warnings")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logger.propagate = propagate
        logger.removeHandler(handler)
        handler.close()


@dataclass
class Report:
    """Collects and shows. `status` is the command's exit status. `aside`: on stderr, where stdout carries an answer for programs."""

    home: Path
    title: str
    aside: bool = False
    rows: list[StageRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.console = Console(stderr=self.aside)
        self._seconds: dict[str, float] = {}
        self._facts: list[tuple[str, str]] = []
        self._began = time.perf_counter()
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            # Without a terminal (CI, a log file) a bar would be one line per refresh; the plain lines say the same.
            disable=not self.console.is_terminal,
        )

    @property
    def status(self) -> int:
        return 0 if self.rows and not any(row.fault for row in self.rows) else 1

    @contextmanager
    def live(self) -> Iterator[None]:
        self.console.print(self.title, soft_wrap=True)
        with self._progress, warnings_to_file(self.home / "logs" / "warnings.log"):
            yield

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        with self.stage(name, 0, counted=False):
            yield

    @contextmanager
    def stage(self, name: str, steps: int, *, counted: bool = True) -> Iterator[StepCounter]:
        task = self._progress.add_task(name, total=steps or None)
        began = time.perf_counter()
        yield StepCounter(self._progress, task, name)
        took = time.perf_counter() - began
        if counted:
            self._seconds[name] = self._seconds.get(name, 0.0) + took
        done = max(steps, 1)
        self._progress.update(task, description=name, total=done, completed=done)
        if not self.console.is_terminal:
            self.console.print(f"{name}: done in {took:.1f} s")

    @contextmanager
    def replay(self, start: datetime, end: datetime) -> "Iterator[OnTick]":
        """The bar of the days in fast motion, by simulated minutes."""
        minutes = int((end - start).total_seconds() // 60)
        task = self._progress.add_task("September passes", total=minutes)
        last_day = [start.date()]

        def on_tick(at: datetime, answered: int) -> None:
            said = f"{at:%d %b %H:%M} UTC, {answered} answers"
            self._progress.update(task, completed=int((at - start).total_seconds() // 60), description=said)
            if not self.console.is_terminal and at.date() != last_day[0]:
                last_day[0] = at.date()
                self.console.print(said)

        yield on_tick
        self._progress.update(task, completed=minutes)

    def started(self, platform: "LocalPlatform") -> None:
        """Says where the services answer, as soon as they do."""
        for service in platform.supervisor.services:
            self.console.print(f"  {service.name:<10} {service.url}", style="dim")

    def add_seconds(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds_of(self, stage: str) -> float:
        return self._seconds.get(stage, 0.0)

    def all_seconds(self) -> dict[str, float]:
        """Wall seconds by stage."""
        return dict(self._seconds)

    def add(self, row: StageRow) -> None:
        self.rows.append(row)

    def fact(self, name: str, value: str) -> None:
        """A line of the closing summary."""
        self._facts.append((name, value))

    def print_summary(self, platform: "LocalPlatform", keep: bool) -> None:
        table = Table(title="What happened", caption="seconds: of a stage's assets together; some run at once")
        for name in ("stage", "assets", "rows in", "rows out", "quarantined", "seconds"):
            table.add_column(name, justify="left" if name == "stage" else "right")
        for row in self.rows:
            counts = ("" if n is None else f"{n:,}" for n in (row.rows_in, row.rows_out, row.quarantined))
            table.add_row(row.stage, str(row.assets), *counts, f"{row.seconds:.1f}", style="red" if row.fault else None)
        show(table, self.console)
        for row in self.rows:
            if row.fault:
                self.console.print(f"[red]{row.stage}: {row.fault}[/red]")
        for name, value in self._facts:
            self.console.print(f"  [bold]{name:<16}[/bold] {value}", highlight=False, soft_wrap=True)
        self.console.print(f"  [bold]{'took':<16}[/bold] {time.perf_counter() - self._began:.0f} s")
        if keep:
            for service in platform.supervisor.services:
                if service.url:
                    self.console.print(f"  [bold]{service.name:<18}[/bold] {service.url}", highlight=False)
            told = f"Everything is left running, schedules and sensors too, which may train; `{down_command(self.home)}` stops it."
            self.console.print(told, highlight=False, soft_wrap=True)
        else:
            self.console.print(
                "Everything is stopped. `make up` starts it again with a UI to look around: Dagster, MLflow, the service's /docs."
            )
