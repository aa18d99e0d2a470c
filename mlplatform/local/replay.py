"""Days in fast motion: what became known is ingested, features follow, an application asks, outcomes are joined.

Belongs here: one simulated tick after the other. Does not belong here: what a tick's assets do.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from mlplatform.client import PredictionClient
from mlplatform.local.profile import LocalPlatform
from mlplatform.local.traffic import Schedule, Tally, ask, between
from mlplatform.orchestration.runner import AssetKey, RunFailedError, Runner
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.records import DayRange, SkewSummary
from mlplatform.specs import Catalog, HttpReader, ModelSpec, SourceSpec, StreamReader

if TYPE_CHECKING:
    from mlplatform.features.plan import ViewPlan
    from mlplatform.orchestration.resources import Clients

# A step is named after its assets' stage.
STAGE_OF_STEP = {
    "raw": "ingestion",
    "validated": "validation",
    "offline": "features",
    "online": "features",
    **dict.fromkeys(("predictions", "outcomes", "performance", "data", "prediction", "skew"), "monitoring"),
    "canary": "deployment",
}

IDLE = timedelta(hours=1)
AFTERMATH_TICK = timedelta(hours=2)

# Called with the simulated time reached and the answers so far.
OnTick = Callable[[datetime, int], None]


@dataclass
class Replay:
    """Everything a tick needs. `seconds` adds up the wall time by stage."""

    platform: LocalPlatform
    runner: Runner
    clients: "Clients"
    catalog: Catalog
    model: ModelSpec
    plans: "Mapping[str, ViewPlan]"
    client: PredictionClient
    tally: Tally
    beside: tuple[str, ...] = ()  # models that are asked the same questions
    seconds: dict[str, float] = field(default_factory=dict)
    # The first earlier day that got late rows and was not split again yet, by source.
    _late: dict[str, date] = field(default_factory=dict, init=False)

    def run(
        self, start: datetime, end: datetime, aftermath: timedelta, tick: timedelta, monitor_every: timedelta, progress: OnTick
    ) -> None:
        """From `start` to `end` with an application asking every `tick`, then `aftermath` without."""
        schedule = Schedule(self.platform.sources_url)
        try:
            monitored = start
            for at in self.moments(schedule, start, end, tick):
                progress(at, self.tally.answered)
                if at - monitored >= monitor_every:
                    self.monitor(drift=False)
                    monitored = at
            for at in between(end, end + aftermath + AFTERMATH_TICK, AFTERMATH_TICK):
                self._advance(schedule, at)
                self._tick(at, AFTERMATH_TICK)
                progress(at, self.tally.answered)
            self.monitor(drift=True)
        finally:
            schedule.close()

    def moments(self, schedule: Schedule, start: datetime, end: datetime, tick: timedelta) -> Iterator[datetime]:
        """Lets the time from `start` to `end` pass: what became known by each moment is taken in, then the application asks for what
        falls due before the next one. Yields each moment once that is done."""
        at = start
        while at < end:
            self._advance(schedule, at)
            self._tick(at, tick)
            # By the hour while nobody asks: at night no flight is two hours from its departure.
            asked_soon = schedule.questions(at, min(at + IDLE, end))
            upcoming = at + tick if asked_soon else (at + IDLE).replace(minute=0)
            self._ask(schedule, at, min(upcoming, end))
            yield at
            at = upcoming

    def _advance(self, schedule: Schedule, to: datetime) -> None:
        with self._timed("ingestion"):
            schedule.advance(to)

    def _tick(self, at: datetime, tick: timedelta) -> None:
        """One run for what became known: today's raw and validated rows, and the views whose time has come."""
        sources = [s.name for s in self.catalog.sources if self._has_news(s, at)]
        due = [name for name, plan in self.plans.items() if _due(at, plan.cadence, tick)]
        today = DayRange(at.date(), at.date())
        keys = [*self.runner.keys("raw", "validated", "quarantine", names=sources), *self.runner.keys("offline", "online", names=due)]
        if not keys:
            return
        landed = self._run(keys, today)
        self._late |= {key.path[1]: first for key, metadata in landed.items() if (first := _first_day(metadata)) < today.first}
        if self._late and at.minute == 0:
            # Late events belong to an earlier day's partition: that one is split again.
            late = DayRange(min(self._late.values()), today.first - timedelta(days=1))
            self._run(self.runner.keys("validated", "quarantine", names=self._late), late)
            self._late.clear()

    def _has_news(self, source: SourceSpec, at: datetime) -> bool:
        """Whether reading the source can bring anything: entries wait in its stream, or the API's hour is full."""
        match source.reader:
            case StreamReader(connection=connection, stream=stream, group=group):
                with self.clients.source_streams(connection) as client:
                    status = client.status(stream, group)
                return status is None or status.lag is None or status.lag + status.pending > 0
            case HttpReader():
                return at.minute == 0
            case _:
                return False

    def _run(self, keys: Sequence[AssetKey], days: DayRange | None) -> Mapping[AssetKey, Mapping[str, object]]:
        """Runs assets, each second of it booked to the stage whose step was at work."""
        began: dict[str, float] = {}

        def book(step: str, finished: bool) -> None:
            if not finished:
                began[step] = time.perf_counter()
                return
            stage = STAGE_OF_STEP[step.split("_", maxsplit=1)[0]]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began[step]

        return self.runner.run(keys, days, on_step=book)

    def _ask(self, schedule: Schedule, start: datetime, end: datetime) -> None:
        with self._timed("serving"):
            questions = schedule.questions(start, end)
            ask(self.client, self.model.name, questions, self.platform.clock, self.tally, self.beside)

    def judge(self) -> None:
        """Drains the log, joins outcomes, and has the canary judged, as its sensor does."""
        self._run(self.runner.keys("predictions", "outcomes", "canary", names=[self.model.name]), None)

    def monitor(self, *, drift: bool) -> None:
        """Drains the log, joins outcomes, reports performance; drift and skew too where asked for."""
        stages = ["predictions", "outcomes", "performance", *(["data_drift", "prediction_drift"] if drift else [])]
        self._run(self.runner.keys(*stages, names=[self.model.name, *self.beside]), None)
        if drift:
            self._prove()

    def _prove(self) -> None:
        """Measures skew. A proof that fails leaves its summary, and the closing table tells of it; the demo goes on to that."""
        try:
            self._run(self.runner.keys("skew", names=[self.model.name, *self.beside]), None)
        except RunFailedError:
            if any(newest_summary(self.clients, "skew", name, SkewSummary) is None for name in (self.model.name, *self.beside)):
                raise

    def _timed(self, stage: str) -> "_Timer":
        return _Timer(self.seconds, stage)


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self._from


def _due(at: datetime, cadence: timedelta, tick: timedelta) -> bool:
    """Whether a multiple of the cadence lies in (at - tick, at]."""
    since = timedelta(seconds=at.timestamp())
    return since // cadence > (since - tick) // cadence


def _first_day(landed: Mapping[str, object]) -> date:
    """The first day that got raw rows; `date.max` where none did."""
    return date.fromisoformat(str(landed["first_day"])) if landed.get("rows_received") and "first_day" in landed else date.max


def run_replay(model: str, start: datetime, end: datetime, home: Path) -> int:
    """`mlplatform replay`: asks the running service for every flight whose T lies in [start, end), each in its own request."""
    from rich.console import Console
    from rich.progress import track

    from mlplatform.cli_faults import AwayError
    from mlplatform.queries import QuestionError
    from mlplatform.settings import load_settings

    settings, console = load_settings(), Console()
    if not settings.source_weather:
        raise QuestionError(f"no platform was ever started under {home}: `make up`, then ask again")
    schedule = Schedule(settings.source_weather)
    tally = Tally()
    try:
        try:
            questions = schedule.questions(start, end)
        except httpx.TransportError as down:
            raise AwayError(f"the schedule cannot be read: {down}", "source weather", "serving") from down
        if not questions:
            raise QuestionError(
                f"the schedule published by now has no flight to ask for between {start:%Y-%m-%d %H:%M} and {end:%Y-%m-%d %H:%M} UTC"
            )
        with PredictionClient(settings.serving_url, api_key=settings.serving_api_key.get_secret_value()) as client:
            for question in track(questions, description=f"{len(questions)} requests"):
                tally.asked += 1
                answer = client.predict(model, [dict(question.inputs)])
                tally.answered += 1
                tally.imputed += bool(answer.predictions[0].imputed)
                tally.total_prediction += answer.predictions[0].prediction
    finally:
        schedule.close()
    console.print(f"asked {tally.asked}, answered {tally.answered}, with imputed features {tally.imputed}")
    console.print(f"mean prediction {tally.mean_prediction:.3f}")
    return 0 if tally.asked and tally.answered == tally.asked else 1
