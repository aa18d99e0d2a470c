"""`mlplatform bench serving --sink-dead`: what a request notices of a prediction log whose Redis hangs.

Belongs here: the turns with that Redis halted and not, and how far the p99 moves. Does not belong here: other loads (`run`).

One process of the service answers all turns, its features in a Valkey of their own. Halting the log's Redis (SIGSTOP) is harder on the
service than a closed port: connections are taken and nothing is answered.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from redis import Redis

from mlplatform.local import services
from mlplatform.local.bench_serving import prediction_log, server
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, OURS
from mlplatform.local.bench_serving.load import find_wrk
from mlplatform.local.bench_serving.prediction_log import LogBalance
from mlplatform.local.bench_serving.racer import Racer
from mlplatform.local.bench_serving.run import Options, Track, open_track
from mlplatform.printing import print_json, say, table

LOADS, SECONDS = ("1x64", "open"), 60.0  # unless others are asked for
MOVED = 1.05  # what the p99 with a dead sink may be, to the p99 with one that answers
ALIVE, DEAD = "answers", "hangs"
_FIRST_NOTICE_S = 6.0  # the first write that hangs takes five seconds to fail


@dataclass(frozen=True)
class Found:
    """`measured` by case and state of the sink, in the order of the rounds; `spilled`: the most that lay on disk at once."""

    measured: dict[tuple[str, str], list[Measured]]
    balance: LogBalance
    spilled: int

    def moved(self, case: str) -> float:
        """p99 with the sink hanging to p99 with it answering: the median over rounds, each compared within itself."""
        return median(b.load.p99_ms / a.load.p99_ms for a, b in zip(self.measured[case, ALIVE], self.measured[case, DEAD], strict=True))

    def noise(self, case: str) -> float:
        """The largest p99 of the turns with the sink answering to their smallest: what turns that should be alike differ by."""
        found = [m.load.p99_ms for m in self.measured[case, ALIVE]]
        return max(found) / min(found)

    @property
    def errors(self) -> int:
        return sum(m.load.errors for turns in self.measured.values() for m in turns)

    @property
    def held(self) -> bool:
        kept = self.spilled > 0 and not self.errors and not self.balance.missing
        return kept and all(self.moved(case) <= MOVED for case, _ in self.measured)


def run_sink_dead(options: Options, as_json: bool) -> int:
    """Prints figures. Returns 0 if the p99 moved by less than 5 %, nothing failed and every record is accounted for."""
    find_wrk()
    found = _measure(options)
    told = _told(found)
    if as_json:
        print_json(told)
    else:
        table("The prediction log's Redis, answering and hanging", told["turns"], empty="")
        table("How far the p99 moves", told["moved"], empty="")
        say(f"prediction log: {told['prediction_log']}; most on disk at once {found.spilled:,}; failed requests {found.errors}")
        say("[green]held[/green]" if found.held else "[red]not held[/red]", markup=True)
    return 0 if found.held else 1


def _measure(options: Options) -> Found:
    measured: dict[tuple[str, str], list[Measured]] = {}
    spilled = 0
    with open_track(options) as shared, _sink(shared) as (sink, redis):
        track = replace(shared, site=replace(shared.site, log_url=sink.service.url))
        racer = track.start(CONTENDERS[OURS])
        for turn in range(options.rounds):
            for case in (CASES[name] for name in options.cases):
                for state in (ALIVE, DEAD):
                    one, on_disk = _turn(track, racer, sink, case, turn, state)
                    measured.setdefault((case.name, state), []).append(one)
                    spilled = max(spilled, on_disk)
                    # As long as the outage was, and a little: replaying leaves most of the time to requests.
                    prediction_log.drained(racer.port, 60 + 2 * options.seconds)
                    prediction_log.trim(redis, options.model)
        return Found(measured, prediction_log.balance(racer.port, redis, options.model, 0), spilled)


def _turn(track: Track, racer: Racer, sink: server.Running, case: Case, turn: int, state: str) -> tuple[Measured, int]:
    """One load; and the records on disk at its end."""
    if state == ALIVE:
        return racer.measure(case, turn, track.options.seconds, track.supervisor), 0
    sink.pause()
    try:
        racer.load(case, _FIRST_NOTICE_S)  # how an outage begins is part of the load, but the figures are of its course
        one = racer.measure(case, turn, track.options.seconds, track.supervisor)
        return one, prediction_log.read_counts(racer.port)["spilled"]
    finally:
        sink.go_on()


@contextmanager
def _sink(track: Track) -> Iterator[tuple[server.Running, Redis]]:
    launch = replace(services.valkey(track.site.folder / "log"), name="valkey-log")
    with server.on_cores(track.cores.load):
        running = server.Running(track.supervisor.start(launch), 0.0)
    with Redis.from_url(launch.url) as redis:
        redis.config_set("appendonly", "no")
        yield running, redis


def _told(found: Found) -> dict[str, Any]:
    cases = list(dict.fromkeys(case for case, _ in found.measured))
    return {
        "turns": [_row(case, state, turns) for (case, state), turns in found.measured.items()],
        "moved": [_moved(found, case) for case in cases],
        "prediction_log": {**found.balance.counts, "in_stream": found.balance.in_stream, "missing": found.balance.missing},
        "most_on_disk": found.spilled,
        "errors": found.errors,
        "held": found.held,
    }


def _moved(found: Found, case: str) -> dict[str, Any]:
    return {
        "load": CASES[case].title,
        "p99 ×": round(found.moved(case), 3),
        "limit": MOVED,
        "alike turns differ ×": round(found.noise(case), 3),
    }


def _row(case: str, state: str, turns: Sequence[Measured]) -> dict[str, Any]:
    return {
        "load": CASES[case].title,
        "log's Redis": state,
        "requests/s": round(median(m.load.per_s for m in turns)),
        "p50 ms": round(median(m.load.p50_ms for m in turns), 2),
        "p99 ms": round(median(m.load.p99_ms for m in turns), 2),
        "p99 of each round": ", ".join(f"{m.load.p99_ms:.2f}" for m in turns),
        "CPU s/1k": round(median(m.cpu_s_per_1000 for m in turns), 4),
    }
