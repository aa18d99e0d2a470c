"""Admission control against a simulated server at half, once, three and ten times its capacity."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from serving_app.protection.admission import Admission

WORK_S = 100e-6  # the processor time of one request: ten thousand a second
REFUSAL_S = 5e-6
TARGET_S = 0.02
HEARTBEAT_S = 0.01


@dataclass
class Outcome:
    waits_s: list[float] = field(default_factory=list)  # from arrival to answer, of those taken
    refused: int = 0
    seconds: float = 0.0

    @property
    def answered_per_s(self) -> float:
        return len(self.waits_s) / self.seconds

    def slowest(self, share: float) -> float:
        return sorted(self.waits_s)[int(share * (len(self.waits_s) - 1))]


def simulate(
    load: float,
    admission: Admission | None,
    seconds: float = 4.0,
    waiting_s: float = 0.0,
    per_turn: int = 1_000_000,
    warm_up_s: float = 1.0,
) -> Outcome:
    """One event loop. What arrives (Poisson) is read in the next turn, taken or refused in the turn after, and worked on in a later one.

    `load`: arrivals by capacity. `waiting_s`: time a request spends waiting for a store, before its work. `per_turn`: requests worked on
    in one turn; the others queue inside the application, and the loop itself is never late. The heartbeat is the service's: due every
    ten milliseconds, met in one turn, run in the next.
    """
    rng = random.Random(7)
    result = Outcome(seconds=seconds - warm_up_s)
    rate = load / WORK_S
    now, arrival, beat, processor = 0.0, rng.expovariate(rate), HEARTBEAT_S, 0.0
    met: list[float] = []
    met_beat = 0.0
    due: deque[tuple[float, float, float]] = deque()
    while now < seconds:
        turn_began = now
        if met_beat and admission:
            admission.observe(now - met_beat, now, processor)
            beat, met_beat = now + HEARTBEAT_S, 0.0
        elif beat <= now:
            met_beat = beat
        ready = 0
        while ready < min(per_turn, len(due)) and due[ready][0] <= turn_began:
            ready += 1
        for arrived in met:
            if admission is None or admission.enter():
                due.append((arrived + waiting_s, arrived, now))
            else:
                result.refused += now >= warm_up_s
                now += REFUSAL_S
        met = []
        while arrival <= turn_began:
            met.append(arrival)
            arrival += rng.expovariate(rate)
        for _ in range(ready):
            _, arrived, entered = due.popleft()
            now += WORK_S
            if admission:
                admission.leave(now - entered)
            if now >= warm_up_s:
                result.waits_s.append(now - arrived)
        processor += now - turn_began
        if now == turn_began:  # nothing to do: on to the next event, or a short turn where something was only passed on
            now = now + 1e-6 if met or met_beat else min(t for t in (arrival, beat, due[0][0] if due else arrival) if t > now)
    return result


def service() -> Admission:
    return Admission(cap=1024, target_s=TARGET_S)


def test_without_admission_control_an_overloaded_server_answers_everybody_late() -> None:
    assert simulate(3.0, None).slowest(0.5) > 1.0


def test_at_half_load_nobody_is_refused() -> None:
    outcome = simulate(0.5, service())
    assert outcome.refused == 0
    assert outcome.slowest(0.99) < 0.002


@pytest.mark.parametrize("load", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("waiting_s", [0.0, 0.001])
def test_over_capacity_the_accepted_are_answered_in_time_and_the_server_stays_busy(load: float, waiting_s: float) -> None:
    outcome = simulate(load, service(), waiting_s=waiting_s)
    # Read, taken, worked on: three turns of the loop, each about as long as the target.
    assert outcome.slowest(0.99) < 4 * TARGET_S
    assert outcome.slowest(1.0) < 5 * TARGET_S
    spent_on_refusals = outcome.refused / outcome.seconds * REFUSAL_S
    assert outcome.answered_per_s > 0.8 * (1 - spent_on_refusals) / WORK_S


@pytest.mark.parametrize("load", [3.0, 10.0])
def test_a_queue_inside_the_application_is_seen_though_the_loop_is_never_late(load: float) -> None:
    # What was taken before the queue was seen is still answered: the cap bounds that, and here it is over after the warm-up.
    outcome = simulate(load, Admission(cap=4096, target_s=TARGET_S), seconds=4.0, per_turn=5, warm_up_s=2.0)
    assert outcome.slowest(0.99) < 10 * TARGET_S
    spent_on_refusals = outcome.refused / outcome.seconds * REFUSAL_S
    assert outcome.answered_per_s > 0.8 * (1 - spent_on_refusals) / WORK_S


def test_a_slow_store_alone_makes_nobody_be_refused() -> None:
    outcome = simulate(0.1, service(), waiting_s=0.5)
    assert outcome.refused == 0


def test_after_an_overload_the_limit_comes_back() -> None:
    admission = service()
    simulate(10.0, admission)
    assert admission.limit < 0.5 * admission.cap
    while admission.in_work:
        admission.leave(0.1)
    for tick in range(400):
        admission.observe(0.0005, 100.0 + tick * HEARTBEAT_S, 0.0)
    assert admission.limit == admission.cap


def test_one_late_heartbeat_among_good_ones_changes_nothing() -> None:
    admission = service()
    for tick in range(100):
        admission.observe(0.5 if tick % 10 == 0 else 0.001, tick * HEARTBEAT_S, 0.0)
    assert admission.limit == admission.cap


def test_a_store_that_is_slow_fills_the_places_and_no_more() -> None:
    outcome = simulate(0.5, Admission(cap=100, target_s=TARGET_S), waiting_s=0.5)
    assert outcome.refused > 0
    assert outcome.slowest(1.0) < 0.5 + 5 * TARGET_S


def test_the_limit_never_falls_below_its_floor() -> None:
    admission = Admission(cap=64, target_s=TARGET_S, floor=4)
    for tick in range(1000):
        admission.observe(1.0, tick * HEARTBEAT_S, 0.0)
    assert admission.limit == 4.0
    assert [admission.enter() for _ in range(5)] == [True] * 4 + [False]
    assert (admission.in_work, admission.refused) == (4, 1)


def test_bytes_of_bodies_are_bounded_together() -> None:
    admission = Admission(cap=10, target_s=TARGET_S, buffer_bytes=100)
    assert admission.hold(60)
    assert not admission.hold(60)
    admission.release(120)
    assert admission.hold(100)
