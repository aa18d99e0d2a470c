"""`mlplatform bench serving`: the prediction service under load, beside its peers, in turns.

Belongs here: the order of things. Does not belong here: a single step of them.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from redis import Redis

from mlplatform.clients.registry import Registry
from mlplatform.local import services
from mlplatform.local.bench_serving import prediction_log, report, server
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, DEFAULT_PEERS, OURS, Contender, Site
from mlplatform.local.bench_serving.load import find_wrk
from mlplatform.local.bench_serving.racer import Questions, Racer
from mlplatform.local.bench_serving.targets import Taken, judge
from mlplatform.local.bench_serving.world import MODEL, World
from mlplatform.local.supervisor import Supervisor
from mlplatform.printing import print_json

_SINGLES, _HUNDREDS = 10_000, 200  # different requests of each size
_STARTS = 3


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line. `cache` keeps what may be used again by the next run."""

    cache: Path
    peers: Sequence[str] = DEFAULT_PEERS
    cases: Sequence[str] = tuple(CASES)
    seconds: float = 3.0
    rounds: int = 3
    scale: bool = True


@dataclass(frozen=True)
class Track:
    """Where a race is run."""

    site: Site
    supervisor: Supervisor
    redis: Redis
    cores: server.Cores
    options: Options

    def start(self, contender: Contender, questions: Questions, cores: frozenset[int] | None = None, workers: int = 1) -> Racer:
        return Racer.start(contender, self.site, self.supervisor, cores or self.cores.server, questions, workers)


def run_bench_serving(options: Options, as_json: bool) -> int:
    """Prints figures and targets. Returns 0 if every judged target is met. Raises LoadError where wrk is missing."""
    find_wrk()
    with open_track(options) as track:
        taken = _race(track)
    judged = judge(taken)
    if as_json:
        print_json(report.to_dict(taken, judged))
    else:
        report.show(taken, judged)
    return 0 if report.held(judged) else 1


@contextmanager
def open_track(options: Options) -> Iterator[Track]:
    """The model registered, its values online; everything but the service under load stays on the other cores."""
    available = sorted(os.sched_getaffinity(0))
    cores = server.Cores.split(available, 1)
    if cores is None:
        raise server.TooFewCoresError("two cores are needed: one for the service, one for the load")
    with tempfile.TemporaryDirectory(prefix="mlplatform-bench-") as name, Supervisor(Path(name)) as supervisor:
        folder = Path(name)
        world = World(folder)
        with server.on_cores(cores.load):
            valkey, mlflow = supervisor.start_all([services.valkey(folder), services.mlflow(folder)])
            with Redis.from_url(valkey.url) as redis:
                # What the server writes to disk on the load's core is no cost of the service.
                redis.config_set("appendonly", "no")
                world.write_values(redis)
                world.register(Registry(mlflow.url, timeout_s=30.0))
                yield Track(Site(folder, options.cache, world, valkey.url, mlflow.url), supervisor, redis, cores, options)


def _race(track: Track) -> Taken:
    options = track.options
    cases = [CASES[name] for name in options.cases]
    sizes = sorted({case.rows for case in cases} | {1})
    questions = {rows: track.site.world.questions(_SINGLES if rows == 1 else _HUNDREDS, rows) for rows in sizes}
    ready_s = {OURS: _starts(track, questions)}
    racers, wrong = [], {}
    for name in (OURS, *options.peers):
        racer = track.start(CONTENDERS[name], questions)
        racers.append(racer)
        ready_s.setdefault(name, []).append(racer.running.ready_s)
        wrong[name] = racer.wrong_answers(questions)
        _rest(track, racer)
    measured = [m for turn in range(options.rounds) for case in cases for m in _turn(track, racers, case, turn)]
    balance = prediction_log.balance(racers[0].port, track.redis, MODEL)
    for racer in racers:
        track.supervisor.stop(racer.running.service.name)
    scale, why = _scale(track, questions) if options.scale else (None, "not in this run")
    return Taken(measured, ready_s, wrong, balance, scale, why)


def _starts(track: Track, questions: Questions) -> list[float]:
    """Seconds to the first good answer of starts before the one that is measured; the first downloads the model."""
    found = []
    for _ in range(_STARTS - 1):
        racer = track.start(CONTENDERS[OURS], questions)
        found.append(racer.running.ready_s)
        track.supervisor.stop(racer.running.service.name)
    return found


def _turn(track: Track, racers: Sequence[Racer], case: Case, turn: int) -> Iterator[Measured]:
    """Every contender once under one load; who was first last time is last this time."""
    shift = turn % len(racers)
    for racer in (*racers[shift:], *racers[:shift]):
        if case.name in racer.contender.cases:
            _wake(racer)
            yield racer.measure(case, turn, track.options.seconds, track.supervisor)
            _rest(track, racer)


def _wake(racer: Racer) -> None:
    racer.running.go_on()
    racer.settle()


def _rest(track: Track, racer: Racer) -> None:
    """A peer is halted while others are measured. Ours only idles: it must get on with its log, which is emptied between loads."""
    if racer.contender.name != OURS:
        racer.running.pause()
        return
    prediction_log.drained(racer.port)
    prediction_log.trim(track.redis, MODEL)


def _scale(track: Track, questions: Questions) -> tuple[float | None, str]:
    """Requests/s of two processes to one, in turns, each process with a core of its own; and why there is no figure."""
    cores = server.Cores.split(sorted(track.cores.server | track.cores.load), 2)
    if cores is None:
        return None, "it takes four cores: two for the processes, two for load and Valkey"
    ours, case = CONTENDERS[OURS], CASES["1x64"]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with server.on_cores(cores.load):
        for turn in range(track.options.rounds):
            for workers in (1, 2):
                racer = track.start(ours, questions, frozenset(sorted(cores.server)[:workers]), workers)
                rates[workers].append(racer.measure(case, turn, track.options.seconds, track.supervisor).load.per_s)
                track.supervisor.stop(racer.running.service.name)
                prediction_log.trim(track.redis, MODEL)
    return median(two / one for one, two in zip(rates[1], rates[2], strict=True)), ""

