"""`mlplatform demo --release`: three versions that want to serve, two of them bad, on real flights; what the judge does about each.

Belongs here: the order of the story, and what must come of it. Does not belong here: a day in fast motion (`replay`), what is spoilt
(`planted`), gates, canaries and verdicts (the platform's own assets).
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlplatform.local import warm_up
from mlplatform.local.demo import Demo
from mlplatform.local.profile import START, LocalPlatform, refuse_to_reset, reset
from mlplatform.local.report import Report
from mlplatform.local.supervisor import Supervisor
from mlplatform.printing import show

if TYPE_CHECKING:
    from mlplatform.client import PredictionClient
    from mlplatform.local.replay import Replay
    from mlplatform.orchestration.runner import Runner
    from mlplatform.records import LedgerEntry

# The champion of the story was trained two weeks ago, so that the one that follows has learned more.
CHAMPION_END = date(2013, 8, 18)
TRIALS = 2
TICK = timedelta(hours=2)
JUDGED_EVERY = timedelta(hours=4)
# A verdict takes half a day to twelve days of nine hundred questions a day; more than this is a fault.
PATIENCE = timedelta(days=21)
_LOADED_WITHIN_S = 60.0
_OUTCOMES = {"promote": "promoted", "reject": "rejected"}


@dataclass(frozen=True)
class Chapter:
    """One version's way. `gates`: what those declared said. `outcome`: promoted, rejected or undecided; `wanted`: what it must be."""

    version: int
    what: str
    gates: str
    wanted: str
    outcome: str
    answers: int
    took: timedelta
    reason: str

    @property
    def fault(self) -> str:
        return "" if self.outcome == self.wanted else f"version {self.version} ({self.what}) was to be {self.wanted}, and is {self.outcome}"


def run_release(home: Path, keep: bool = False, trials: int | None = None) -> int:
    """Runs the story under `home`, from nothing. Returns 0 only if the bad versions were rejected and the good one serves."""
    refuse_to_reset(home.absolute())
    report = Report(
        home, "[bold]mlplatform demo --release[/bold]: a slow version, one with shuffled labels, and a good one ask for production"
    )
    with report.live():
        warm_up.start()
        with report.task("clearing what an earlier demo left"), Supervisor(home):
            reset(home)
        with LocalPlatform(home=home) as platform:
            report.started(platform)
            demo = Demo.open(platform, report, trials or TRIALS)
            demo.training_config = {"ops": {f"training_set_{demo.model.name}": {"config": {"end": CHAMPION_END.isoformat()}}}}
            warm_up.settle()
            demo.build()
            story = Release.begin(demo)
            story.tell()
            demo.finish()
            if keep:
                platform.start_automation()
                platform.start_clock(1.0)
                platform.supervisor.detach()
    story.show()
    report.print_summary(platform, keep)
    return report.status or int(any(chapter.fault for chapter in story.chapters))


@dataclass
class Release:
    """The story on a running platform whose first version serves. `at`: the simulated time reached."""

    demo: Demo
    replay: "Replay"
    client: "PredictionClient"
    at: datetime
    chapters: list[Chapter] = field(default_factory=list)

    @classmethod
    def begin(cls, demo: Demo, at: datetime = START) -> "Release":
        from mlplatform.client import PredictionClient
        from mlplatform.local.replay import Replay

        settings = demo.clients.settings
        client = PredictionClient(settings.serving_url, api_key=settings.serving_api_key.get_secret_value())
        replay = Replay(demo.platform, demo.runner, demo.clients, demo.catalog, demo.model, demo.plans, client, demo.tally)
        return cls(demo, replay, client, at)

    def tell(self) -> None:
        """The three chapters, then what monitoring says of the days that passed."""
        from mlplatform.orchestration.automation.jobs import training_run_config

        spoilt = self.spoilt_graph()
        self.chapter("as it was, but slow", "rejected", self.register_slow, spoilt)
        self.chapter("labels shuffled in training", "rejected", lambda: self._train(spoilt), spoilt)
        newest = training_run_config(self.demo.model, self.at)
        self.chapter("trained anew on two more weeks", "promoted", lambda: self._train(self.demo.runner, newest), None)
        with self.demo.stage("monitoring"):
            self.replay.monitor(drift=True)
        for stage, seconds in self.replay.seconds.items():
            self.demo.report.add_seconds(stage, seconds)

    def spoilt_graph(self) -> "Runner":
        """Runs the same assets with labels shuffled in training, and no gates."""
        from mlplatform.local.planted import planted
        from mlplatform.orchestration.build import build
        from mlplatform.orchestration.runner import Runner

        with self.demo.report.task("loading the graph with the faults planted"):
            return Runner.open(build([planted(self.demo.catalog, self.demo.model)]), self.demo.platform.home / "dagster")

    # --- making versions ---

    def register_slow(self) -> None:
        from mlplatform.contracts import PRODUCTION
        from mlplatform.local.planted import register_slow

        serves = self.demo.clients.registry.by_alias(self.demo.model.name, PRODUCTION)
        assert serves is not None  # the demo's own build has just promoted it
        register_slow(self.demo.clients, self.demo.model, serves)

    def _train(self, runner: "Runner", config: Mapping[str, Any] | None = None) -> None:
        runner.run(runner.keys("training_set", "tuning", "model", names=[self.demo.model.name]), config=config)

    # --- one version's way ---

    def chapter(self, what: str, wanted: str, make: Callable[[], None], ungated: "Runner | None") -> None:
        """`make` registers the version. `ungated`: runs the evaluation once more without gates, where those declared have refused it."""
        from mlplatform.local.traffic import Schedule

        report, name = self.demo.report, self.demo.model.name
        with report.task(f"{what}: made and evaluated"):
            make()
            version = self.demo.clients.registry.versions(name)[0].version
            refused = self._refusal(self.demo.runner)
            if refused and ungated is not None:
                told = f"version {version}, {what}: {_shortened(refused)}; now as if there were no gates"
                report.console.print(told, highlight=False)
                refused_still = self._refusal(ungated)
                assert not refused_still, refused_still
            self.demo.runner.run(self.demo.runner.keys("deployment", names=[name]))
        began, asked = self.at, self.demo.tally.answered
        self._await_canary(version)
        with report.replay(began, began + PATIENCE) as progress, closing(Schedule(self.demo.platform.sources_url)) as schedule:
            self.replay.judge()  # what was counted before the first judgement is no evidence
            while (end := self._end(version)) is None and self.at - began < PATIENCE:
                until = self.at + JUDGED_EVERY
                for moment in self.replay.moments(schedule, self.at, until, TICK):
                    progress(moment, self.demo.tally.answered)
                schedule.advance(until)
                self.at = until
                self.replay.judge()
        outcome = "undecided" if end is None else _OUTCOMES[end.action]
        reason = end.reason if end else f"no verdict within {PATIENCE.days} days"
        answers = self.demo.tally.answered - asked
        self.chapters.append(Chapter(version, what, refused or "passed", wanted, outcome, answers, self.at - began, reason))
        report.console.print(f"version {version}, {what}: {outcome} after {_hours(self.at - began)}: {reason}", highlight=False)

    def _refusal(self, runner: "Runner") -> str:
        """What the gates of the runner's catalog say of the newest version; empty where they pass it."""
        from mlplatform.orchestration.runner import RunFailedError

        try:
            runner.run(runner.keys("evaluation", names=[self.demo.model.name]))
        except RunFailedError:
            newest = self.demo.clients.ledger.entries(self.demo.model.name)[-1]
            if newest.action != "refuse":
                raise
            return f"refused: {newest.reason}"
        return ""

    def _await_canary(self, version: int) -> None:
        """Until the service has loaded the canary: what is asked before that is no trial."""
        deadline = time.monotonic() + _LOADED_WITHIN_S
        while version not in {v["version"] for v in self.client.model(self.demo.model.name)["traffic"]["variants"]}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service has not taken version {version} as canary within {_LOADED_WITHIN_S:g} s")
            time.sleep(0.1)

    def _end(self, version: int) -> "LedgerEntry | None":
        """The entry that ended the version's trial; None while it goes on."""
        entries = self.demo.clients.ledger.entries(self.demo.model.name)
        return next((e for e in reversed(entries) if e.actor == "judge" and e.version == version and e.action in _OUTCOMES), None)

    # --- telling ---

    def show(self) -> None:
        """What became of each version, and the ledger, which says the same."""
        from rich.table import Table

        from mlplatform.deployment.history import told_action

        console = self.demo.report.console
        table = Table(title="Who asked for production", show_lines=True)
        for name in ("version", "what it is", "its gates", "as canary", "answers of all", "after", "why"):
            table.add_column(name, justify="right" if name in ("version", "answers of all", "after") else "left", overflow="fold")
        for c in self.chapters:
            row = (str(c.version), c.what, _shortened(c.gates), c.outcome, f"{c.answers:,}", _hours(c.took), c.reason)
            table.add_row(*row, style="red" if c.fault else None)
        show(table, console)
        ledger = Table(title=f"The ledger of {self.demo.model.name}")
        for name in ("at (UTC)", "action", "version", "actor", "reason"):
            ledger.add_column(name, overflow="fold", no_wrap=name == "at (UTC)")
        before = ""
        for e in self.demo.clients.ledger.entries(self.demo.model.name):
            told = '"' if e.reason == before else e.reason  # one step is several entries for one reason
            action = told_action(e.action, e.evidence)
            ledger.add_row(f"{e.at.astimezone(UTC):%d %b %H:%M}", action, "" if e.version is None else str(e.version), e.actor, told)
            before = e.reason
        show(ledger, console)
        for chapter in self.chapters:
            if chapter.fault:
                console.print(f"[red]{chapter.fault}[/red]")


def _shortened(reason: str) -> str:
    """The first of several reasons, and how many more there are."""
    first, *others = reason.split("; ")
    return f"{first}; and {len(others)} more" if len(others) > 1 else reason


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.0f} h"
