"""Days in fast motion: what became known is ingested, features follow, an application asks, outcomes are joined.

Belongs here: one simulated tick after the other. Does not belong here: what a tick's assets do.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from mlplatform.client import PredictionClient
from mlplatform.local.profile import LocalPlatform
from mlplatform.local.runs import Runner
from mlplatform.local.traffic import Schedule, Tally, ask, between
from mlplatform.records import DayRange
from mlplatform.specs import Catalog, HttpReader, ModelSpec, StreamReader

if TYPE_CHECKING:
    from mlplatform.features.plan import ViewPlan
    from mlplatform.orchestration.resources import Clients

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
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self, start: datetime, end: datetime, aftermath: timedelta, tick: timedelta, monitor_every: timedelta, progress: OnTick
    ) -> None:
        """From `start` to `end` with an application asking, then `aftermath` without."""
        schedule = Schedule(self.platform.sources_url)
        try:
            for at in between(start, end + aftermath, tick):
                self.advance(at)
                self._tick(at, tick)
                if at < end:
                    self._ask(schedule, at, min(at + tick, end), progress)
                progress(at, self.tally.answered)
                if (at - start) % monitor_every == timedelta(0) and at > start:
                    self.monitor(drift=False)
            self.advance(end + aftermath)
            self._tick(end + aftermath, tick)
            self.monitor(drift=True)
            progress(end + aftermath, self.tally.answered)
        finally:
            schedule.close()

    def advance(self, to: datetime) -> None:
        """Puts the clock; the source systems publish everything due by then before they answer."""
        with self._timed("ingestion"):
            httpx.post(f"{self.platform.sources_url}/clock", json={"to": to.isoformat(), "speed": 0.0}, timeout=60).raise_for_status()

    def _tick(self, at: datetime, tick: timedelta) -> None:
        hour = at.minute == 0
        sources = [
            s.name for s in self.catalog.sources if isinstance(s.reader, StreamReader) or (isinstance(s.reader, HttpReader) and hour)
        ]
        today = DayRange(at.date(), at.date())
        with self._timed("ingestion"):
            landed = self.runner.run(self.runner.keys("raw", names=sources), today)
        days = _touched([m for m in landed.values() if m.get("rows_received")], today)
        changed = [key.path[1] for key, m in landed.items() if m.get("rows_received")]
        with self._timed("validation"):
            if changed:
                self.runner.run(self.runner.keys("validated", "quarantine", names=changed), days)
        due = [name for name, plan in self.plans.items() if _due(at, plan.cadence, tick)]
        if due:
            with self._timed("features"):
                self.runner.run(self.runner.keys("offline", names=due), today)
                self.runner.run(self.runner.keys("online", names=due))

    def _ask(self, schedule: Schedule, start: datetime, end: datetime, progress: OnTick) -> None:
        with self._timed("serving"):
            questions = schedule.questions(start, end)
            ask(self.client, self.model.name, questions, self.platform.clock, self.tally, lambda: None)

    def monitor(self, *, drift: bool) -> None:
        """Drains the log, joins outcomes, reports performance; drift reports too where asked for."""
        stages = ["predictions", "outcomes", "performance", *(["data_drift", "prediction_drift"] if drift else [])]
        with self._timed("monitoring"):
            self.runner.run(self.runner.keys(*stages, names=[self.model.name]))

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


def _touched(landed: list[Mapping[str, object]], today: DayRange) -> DayRange:
    """The days whose raw rows changed: late events belong to days before today."""
    firsts = [date.fromisoformat(str(m["first_day"])) for m in landed if "first_day" in m]
    lasts = [date.fromisoformat(str(m["last_day"])) for m in landed if "last_day" in m]
    return DayRange(min([today.first, *firsts]), max([today.last, *lasts]))


def run_replay(model: str, start: datetime, end: datetime, home: Path) -> int:
    """`mlplatform replay`: asks the running service for every flight whose T lies in [start, end), each in its own request."""
    from rich.progress import track

    from mlplatform.settings import load_settings

    settings = load_settings()
    schedule = Schedule(settings.source_weather)
    tally = Tally()
    try:
        questions = schedule.questions(start, end)
        with PredictionClient(settings.serving_url) as client:
            for question in track(questions, description=f"{len(questions)} requests"):
                tally.asked += 1
                answer = client.predict(model, [dict(question.inputs)])
                tally.answered += 1
                tally.imputed += bool(answer.predictions[0].imputed)
                tally.total_prediction += answer.predictions[0].prediction
    finally:
        schedule.close()
    print(
        f"asked {tally.asked}, answered {tally.answered}, with imputed features {tally.imputed}, mean prediction {tally.mean_prediction:.3f}"
    )  # the command's answer
    return 0 if tally.asked and tally.answered == tally.asked else 1
