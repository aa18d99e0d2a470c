"""`mlplatform bench serving`: the prediction service under load, beside its peers, in turns.

Belongs here: the order of things. Does not belong here: a single step of them.
"""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redis import Redis

from mlplatform.clients.registry import Registry
from mlplatform.local import services
from mlplatform.local.bench_serving import server
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, OURS, Contender, Site
from mlplatform.local.bench_serving.load import LoadFigures, Target, closed_loop, find_wrk, open_loop
from mlplatform.local.bench_serving.report import Report, show
from mlplatform.local.bench_serving.world import Question, World, write_bodies
from mlplatform.local.supervisor import Supervisor, free_port
from mlplatform.printing import print_json, say

_WARM_UP_S = 1.0
_CHECK_AT_ONCE = 32


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    peers: Sequence[str] = ()
    cases: Sequence[str] = tuple(CASES)
    seconds: float = 3.0
    rounds: int = 3


def run_bench_serving(options: Options, as_json: bool) -> int:
    """Prints figures and targets. Returns 0 if every judged target is met."""
    find_wrk()
    with tempfile.TemporaryDirectory(prefix="mlplatform-bench-") as folder, Supervisor(Path(folder)) as supervisor:
        cores = server.Cores.split(sorted(os.sched_getaffinity(0)), 1)
        if cores is None:
            say("error: two cores are needed, one for the service and one for the load")
            return 1
        world = World(Path(folder))
        with server.on_cores(cores.load):
            site = _open_site(Path(folder), world, supervisor)
            report = _measure(options, site, supervisor, cores)
    print_json(report.to_dict()) if as_json else show(report)
    return 0 if report.held else 1


def _open_site(folder: Path, world: World, supervisor: Supervisor) -> Site:
    valkey, mlflow = supervisor.start_all([services.valkey(folder), services.mlflow(folder)])
    with Redis.from_url(valkey.url) as redis:
        # What the server writes to disk on the load's core is no cost of the service.
        redis.config_set("appendonly", "no")
        world.write_values(redis)
    world.register(Registry(mlflow.url, timeout_s=30.0))
    return Site(folder, world, valkey.url, mlflow.url)


def _measure(options: Options, site: Site, supervisor: Supervisor, cores: server.Cores) -> Report:
    chosen = [CONTENDERS[name] for name in (OURS, *options.peers)]
    cases = [CASES[name] for name in options.cases]
    questions = {rows: site.world.questions(200 if rows > 1 else 10_000, rows) for rows in sorted({case.rows for case in cases} | {1})}
    racers = [Racer.start(contender, site, supervisor, cores, questions) for contender in chosen]
    wrong = {racer.contender.name: racer.wrong_answers(questions) for racer in racers}
    for racer in racers:
        racer.running.pause()
    measured: list[Measured] = []
    for turn in range(options.rounds):
        for case in cases:
            for racer in racers:
                measured.append(racer.measure(case, turn, options.seconds, supervisor))
    return Report(measured, {racer.contender.name: racer.running.ready_s for racer in racers}, wrong)


@dataclass(frozen=True)
class Racer:
    """A running contender with the bodies it is sent, by rows."""

    contender: Contender
    port: int
    running: server.Running
    bodies: dict[int, Path]

    @classmethod
    def start(
        cls, contender: Contender, site: Site, supervisor: Supervisor, cores: server.Cores, questions: dict[int, list[Question]]
    ) -> "Racer":
        port = free_port()
        bodies: dict[int, Path] = {}
        first = None
        if contender.ask:
            for rows, asked in questions.items():
                bodies[rows] = write_bodies(site.folder / f"{contender.name}-{rows}.jsonl", [contender.ask(q) for q in asked])
            first = contender.ask(questions[1][0])
        running = server.start(supervisor, contender.launch(site, port, 1), cores.server, contender.path, first)
        return cls(contender, port, running, bodies)

    def wrong_answers(self, questions: dict[int, list[Question]]) -> int:
        """Of some hundred requests, many at once: predictions that are not, bit by bit, what `Booster.predict` says."""
        ask, read = self.contender.ask, self.contender.read
        if ask is None or read is None:
            return 0

        def wrong(question: Question) -> int:
            said = np.array(read(server.ask(self.port, self.contender.path, ask(question))), dtype=np.float32)
            if said.shape != question.answers.shape:
                return len(question.answers)
            return int((said.view(np.uint32) != question.answers.view(np.uint32)).sum())

        asked = [question for many in questions.values() for question in many[:500]]
        with ThreadPoolExecutor(_CHECK_AT_ONCE) as pool:
            return sum(pool.map(wrong, asked))

    def measure(self, case: Case, turn: int, seconds: float, supervisor: Supervisor) -> Measured:
        self.running.go_on()
        self._load(case, _WARM_UP_S)
        before, busy, own = self.running.usage, server.busy_s(), server.own_s(supervisor)
        figures = self._load(case, seconds)
        after = self.running.usage
        others = (server.busy_s() - busy) - (server.own_s(supervisor) - own)
        self.running.pause()
        return Measured(
            contender=self.contender.name,
            case=case.name,
            turn=turn,
            load=figures,
            cpu_s_per_1000=(after.cpu_s - before.cpu_s) / max(1, figures.requests) * 1000,
            rss_mb=after.rss_mb,
            others_cores=max(0.0, others / figures.seconds),
        )

    def _load(self, case: Case, seconds: float) -> LoadFigures:
        target = Target(self.port, self.contender.path, self.bodies.get(case.rows))
        return open_loop(target, case.rate, seconds) if case.rate else closed_loop(target, case.connections, seconds)
