"""`mlplatform bench serving`: the prediction service under load, beside its peers, in turns.

Belongs here: the order of things. Does not belong here: a single step of them.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from redis import Redis

from mlplatform.clients.registry import Registry
from mlplatform.local import services
from mlplatform.local.bench_serving import answers, prediction_log, profile, quota, report, server
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, DEFAULT_PEERS, OURS, WITHOUT_MODEL, Contender, Site
from mlplatform.local.bench_serving.home_world import HomeWorld
from mlplatform.local.bench_serving.load import LoadError, find_wrk
from mlplatform.local.bench_serving.racer import WARM_UP_S, Questions, Racer
from mlplatform.local.bench_serving.targets import Taken, judge
from mlplatform.local.bench_serving.world import ENTITIES, MODEL, Subject, World
from mlplatform.local.processes import group_members
from mlplatform.local.supervisor import Supervisor
from mlplatform.printing import print_json, table

_SINGLES, _HUNDREDS = 10_000, 200  # different requests of each size
_CHECKED = 500  # of them, before anything is measured
_CHECKED_ONLY = 2_000  # with --check
_STARTS = 3
_SHARE = 0.4  # of a core for each of two processes, where there is none for each: the load has the rest of both


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line. `cache` keeps what may be used again by the next run.

    `home`: the platform whose own `model` is served, and those in `more` after it; None: the made-up model. `peers` None: those that
    suit the model. `entities`: of each view of the made-up model; with many, requests are as many that hardly one comes again.
    """

    cache: Path
    model: str = MODEL
    home: Path | None = None
    peers: Sequence[str] | None = None
    cases: Sequence[str] = tuple(CASES)
    seconds: float = 3.0
    rounds: int = 3
    scale: bool = True
    more: Sequence[str] = ()
    entities: int = ENTITIES

    @property
    def racing(self) -> list[Contender]:
        """Ours first. Raises ValueError for a peer that is unknown, or has no way to serve a home's model."""
        possible = [name for name in CONTENDERS if name != OURS and (self.home is None or name in WITHOUT_MODEL)]
        wanted = self.peers if self.peers is not None else [name for name in DEFAULT_PEERS if name in possible]
        if unknown := sorted(set(wanted) - set(possible)):
            raise ValueError(f"no such peer here: {', '.join(unknown)}; there are {', '.join(possible)}")
        if unknown := sorted(set(self.cases) - set(CASES)):
            raise ValueError(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
        return [CONTENDERS[name] for name in (OURS, *wanted)]


@dataclass(frozen=True)
class Track:
    """Where a race is run."""

    site: Site
    supervisor: Supervisor
    redis: Redis
    cores: server.Cores
    options: Options
    questions: Questions

    def start(self, contender: Contender, cores: frozenset[int] | None = None) -> Racer:
        return Racer.start(contender, self.site, self.supervisor, cores or self.cores.server, self.questions)

    def stop(self, racer: Racer) -> None:
        racer.running.go_on()  # a halted process would not see that it is asked to end
        self.supervisor.stop(racer.running.service.name)

    def wrong_answers(self, racer: Racer, count: int) -> int:
        return answers.wrong_answers(racer, self.questions, self.site.subject, self.redis, count)


def run_bench_serving(options: Options, as_json: bool) -> int:
    """Prints figures and targets. Returns 0 if every judged target is met. Raises LoadError where wrk is missing."""
    find_wrk()
    racing = options.racing
    told, held = {}, True
    for model in (options.model, *options.more):
        with open_track(replace(options, model=model)) as track:
            taken = _race(track, racing)
        judged = judge(taken, made_up=options.home is None)
        told[model] = report.to_dict(taken, judged)
        held = held and report.held(judged)
        if not as_json:
            report.show(model, taken, judged)
    if as_json:
        print_json(told if options.more else told[options.model])
    return 0 if held else 1


def run_check(options: Options, as_json: bool) -> int:
    """Compares answers only, many more of them. Returns 0 if all are what `Booster.predict` says."""
    with open_track(options) as track:
        wrong = track.wrong_answers(track.start(CONTENDERS[OURS]), _CHECKED_ONLY)
        asked = [question for many in track.questions.values() for question in many[:_CHECKED_ONLY]]
    predictions = sum(len(question.inputs) for question in asked)
    found = {"model": options.model, "requests": len(asked), "predictions": predictions, "wrong": wrong}
    if as_json:
        print_json(found)
    else:
        table("Answers, bit by bit", [found], empty="")
    return 1 if wrong else 0


def run_profile(options: Options, as_json: bool) -> int:
    """Samples the service under the first of the cases, and shows where its processor time went."""
    find_wrk()
    profile.find_py_spy()
    case = CASES[options.cases[0]]
    with open_track(options) as track:
        racer = track.start(CONTENDERS[OURS])
        racer.measure(case, 0, 1.0, track.supervisor)
        samples = track.site.folder / "samples.txt"
        sampler = profile.sampling(racer.running.service.pid, options.seconds, samples)
        racer.load(case, options.seconds)
        said, _ = sampler.communicate()
        if not samples.exists():
            raise LoadError(f"py-spy gave no samples: {said.strip()[-500:]}")
        found = list(profile.stacks(samples.read_text()))
    report.show_profile(case, profile.by_package(found), profile.by_function(found), as_json)
    return 0


@contextmanager
def open_track(options: Options) -> Iterator[Track]:
    """The model registered, its values online; everything but the service under load stays on the other cores."""
    cores = server.Cores.split(sorted(os.sched_getaffinity(0)), 1)
    if cores is None:
        raise server.TooFewCoresError("two cores are needed: one for the service, one for the load")
    with tempfile.TemporaryDirectory(prefix="mlplatform-bench-") as name, Supervisor(Path(name)) as supervisor:
        folder = Path(name)
        subject: Subject = HomeWorld(folder, options.home, options.model) if options.home else World(folder, entities=options.entities)
        with server.on_cores(cores.load):
            valkey, mlflow = supervisor.start_all([services.valkey(folder), services.mlflow(folder)])
            with Redis.from_url(valkey.url) as redis:
                # What the server writes to disk on the load's core is no cost of the service.
                redis.config_set("appendonly", "no")
                subject.prepare(redis, Registry(mlflow.url, timeout_s=30.0))
                site = Site(folder, options.cache, subject, valkey.url, mlflow.url)
                many = {CASES[name].rows for name in options.cases if CASES[name].rows > 1}
                sizes = {1: max(_SINGLES, options.entities)} | {rows: max(_HUNDREDS, options.entities // rows) for rows in many}
                questions = {rows: subject.questions(count, rows) for rows, count in sizes.items()}
                yield Track(site, supervisor, redis, cores, options, questions)


def _race(track: Track, racing: Sequence[Contender]) -> Taken:
    options = track.options
    ready_s = {OURS: _starts(track)}
    added = prediction_log.added(track.redis, options.model)
    racers, wrong = [], {}
    for contender in racing:
        racer = track.start(contender)
        racers.append(racer)
        ready_s.setdefault(contender.name, []).append(racer.running.ready_s)
        wrong[contender.name] = track.wrong_answers(racer, _CHECKED)
        _rest(track, racer)
    cases = [CASES[name] for name in options.cases]
    measured = [m for turn in range(options.rounds) for case in cases for m in _turn(track, racers, case, turn)]
    balance = prediction_log.balance(racers[0].port, track.redis, options.model, added)
    for racer in racers:
        track.stop(racer)
    scale, how = _scale(track) if options.scale else (None, "not in this run")
    return Taken(measured, ready_s, wrong, balance, scale, how)


def _starts(track: Track) -> list[float]:
    """Seconds to the first good answer of starts before the one that is measured; the first downloads the model."""
    found = []
    for _ in range(_STARTS - 1):
        racer = track.start(CONTENDERS[OURS])
        found.append(racer.running.ready_s)
        track.stop(racer)
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
    """A peer is halted while others are measured. Ours only idles: it must get on with its log."""
    if not racer.contender.keeps_log:
        racer.running.pause()
        return
    prediction_log.drained(racer.port)
    prediction_log.trim(track.redis, track.options.model)


def _expected_scale(track: Track) -> str:
    """What one process has to say of two: they would share the connections, and fewer connections make smaller batches."""
    whole = CASES["1x64"]
    half = replace(whole, connections=whole.connections // 2)
    racer = track.start(CONTENDERS[OURS])
    shares = []
    for turn in range(track.options.rounds):
        rates = [racer.measure(case, turn, track.options.seconds, track.supervisor).load.per_s for case in (half, whole)]
        shares.append(rates[0] / rates[1])
        _rest(track, racer)
    track.stop(racer)
    share = median(shares)
    return f"One with half of the connections answers {share:.2f} as many requests/s: two with a core each, {2 * share:.2f} × as many"


def _scale(track: Track) -> tuple[float | None, str]:
    """Requests/s of two processes to one, in turns, and how it was measured; or None, and why there is no figure."""
    everywhere = track.cores.server | track.cores.load
    apart = server.Cores.split(sorted(everywhere), 2)
    if apart is not None:
        return _ratio(track, apart, None), ""
    try:
        return _ratio(track, server.Cores(everywhere, everywhere), _SHARE), f"each held to {_SHARE:g} of a core"
    except quota.NoQuotaError as error:
        why = f"it takes four cores, two for the processes and two for load and Valkey, or leave to hold each to a part of one: {error}"
        return None, f"{why}. {_expected_scale(track)}" if "1x64" in track.options.cases else why


def _ratio(track: Track, cores: server.Cores, share: float | None) -> float:
    """Median over the rounds: two processes with half of the connections each, to one with all. `share`: of a core for each process,
    where they have none of their own."""
    whole = CASES["1x64"]
    half = replace(whole, connections=whole.connections // 2)
    ratios: list[float] = []
    with server.on_cores(cores.load), ExitStack() as stack:
        own = [frozenset({core}) for core in sorted(cores.server)[:2]]
        racers = [track.start(replace(CONTENDERS[OURS], name=f"{OURS}-{i}"), mine) for i, mine in enumerate(own, 1)]
        for racer in racers:
            stack.callback(track.stop, racer)
            if share:
                stack.enter_context(quota.held(group_members(racer.running.service.pgid), share))
        for turn in range(track.options.rounds):
            # Who is alone changes, should one have the better place.
            alone = _together(racers[turn % 2 : turn % 2 + 1], whole, track.options.seconds)
            ratios.append(_together(racers, half, track.options.seconds) / alone)
            for racer in racers:
                _rest(track, racer)
    return median(ratios)


def _together(racers: Sequence[Racer], case: Case, seconds: float) -> float:
    """Requests/s of all of them, each under the same load at the same time."""
    with ThreadPoolExecutor(len(racers)) as pool:
        list(pool.map(lambda racer: racer.load(case, WARM_UP_S), racers))
        figures = list(pool.map(lambda racer: racer.load(case, seconds), racers))
    return float(sum(each.per_s for each in figures))
