"""The sample application: knows the published schedule, and asks for every flight at its time T.

Belongs here: what an application does. Does not belong here: anything the platform knows and an application does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import httpx

from mlplatform.client import PredictionClient
from mlplatform.clock import SimulatedClock

HORIZON = timedelta(minutes=120)


@dataclass(frozen=True)
class Question:
    """One input of a prediction request, and the moment it is asked."""

    at: datetime
    inputs: Mapping[str, Any]


@dataclass
class Tally:
    """What the application saw."""

    asked: int = 0
    answered: int = 0
    imputed: int = 0
    total_prediction: float = 0.0
    request_ids: set[str] = field(default_factory=set)

    @property
    def mean_prediction(self) -> float:
        return self.total_prediction / self.answered if self.answered else float("nan")


class Schedule:
    """The airlines' published schedule, from the source system's API."""

    def __init__(self, base_url: str) -> None:
        self._client = httpx.Client(base_url=base_url, timeout=60)

    def advance(self, to: datetime) -> None:
        """Puts the simulated clock; the source systems publish everything due by then before they answer."""
        self._client.post("/clock", json={"to": to.isoformat(), "speed": 0.0}).raise_for_status()

    def questions(self, start: datetime, end: datetime) -> Sequence[Question]:
        """The flights to ask for with T in [start, end), in the order of T."""
        answer = self._client.get("/schedule", params={"from": (start + HORIZON).isoformat(), "to": (end + HORIZON).isoformat()})
        answer.raise_for_status()
        found = [_question(flight) for flight in answer.json()["items"]]
        return sorted(found, key=lambda q: q.at)

    def close(self) -> None:
        self._client.close()


def _question(flight: Mapping[str, Any]) -> Question:
    fields = ("carrier", "flight", "origin", "dest", "scheduled_departure", "scheduled_arrival", "distance_miles", "scheduled_load")
    return Question(datetime.fromisoformat(flight["scheduled_departure"]) - HORIZON, {name: flight[name] for name in fields})


def ask(
    client: PredictionClient, model: str, questions: Sequence[Question], clock: SimulatedClock, tally: Tally, beside: Sequence[str] = ()
) -> None:
    """Asks each question in a request of its own, the simulated clock put to its T. A request that fails is not counted as answered.
    The models `beside` are asked the same, and not counted."""
    for question in questions:
        clock.set(question.at)
        tally.asked += 1
        answer = client.predict(model, [dict(question.inputs)])
        tally.answered += 1
        prediction = answer.predictions[0]
        tally.request_ids.add(prediction.request_id)
        tally.imputed += bool(prediction.imputed)
        tally.total_prediction += prediction.prediction
        for other in beside:
            client.predict(other, [dict(question.inputs)])


def between(start: datetime, end: datetime, step: timedelta) -> Iterator[datetime]:
    """start, start + step, … below end."""
    at = start
    while at < end:
        yield at
        at += step
