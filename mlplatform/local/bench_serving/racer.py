"""A contender that runs, under one load after the other.

Belongs here: what is done with one running service. Does not belong here: who races whom, and when (`run`), whether
answers are right (`answers`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlplatform.local.bench_serving import server
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import Contender, Site
from mlplatform.local.bench_serving.load import LoadFigures, Target, closed_loop, open_loop
from mlplatform.local.bench_serving.world import Question, write_bodies
from mlplatform.local.supervisor import Supervisor, free_port

Questions = Mapping[int, Sequence[Question]]  # by inputs a request

WARM_UP_S = 1.0


@dataclass(frozen=True)
class Racer:
    """`bodies`: the file of request bodies, by inputs a request; empty for a contender that is only greeted."""

    contender: Contender
    port: int
    path: str
    running: server.Running
    bodies: Mapping[int, Path]

    @classmethod
    def start(
        cls,
        contender: Contender,
        site: Site,
        supervisor: Supervisor,
        cores: frozenset[int],
        questions: Questions,
    ) -> "Racer":
        """Starts the service, under the contender's name, and waits for its first good answer."""
        port, path, ask = free_port(), contender.path.format(model=site.subject.model), contender.ask
        launch = replace(contender.launch(site, port), name=contender.name)
        bodies = {}
        if ask:
            for rows in sorted({CASES[name].rows for name in contender.cases} & questions.keys()):
                bodies[rows] = write_bodies(site.folder / f"{contender.name}-{rows}.jsonl", map(ask, questions[rows]))
        first = ask(questions[1][0]) if ask else None
        running = server.start(supervisor, launch, cores, path, first)
        return cls(contender, port, path, running, bodies)

    def settle(self) -> None:
        """Waits until what an earlier load left in the service's queue is answered: one more request stands behind it."""
        body = json.loads(self.bodies[1].read_text().partition("\n")[0]) if self.bodies else None
        server.ask(self.port, self.path, body)

    def measure(self, case: Case, turn: int, seconds: float, supervisor: Supervisor) -> Measured:
        """One load for `seconds`, after a second of the same to warm up."""
        self.load(case, WARM_UP_S)
        before, busy, own = self.running.usage, server.busy_s(), server.own_s(supervisor)
        figures = self.load(case, seconds)
        after = self.running.usage
        others = (server.busy_s() - busy) - (server.own_s(supervisor) - own)
        return Measured(
            contender=self.contender.name,
            case=case.name,
            turn=turn,
            load=figures,
            cpu_s_per_1000=(after.cpu_s - before.cpu_s) / max(1, figures.requests) * 1000,
            rss_mb=after.rss_mb,
            others_cores=max(0.0, others / figures.seconds),
        )

    def load(self, case: Case, seconds: float) -> LoadFigures:
        target = Target(self.port, self.path, self.bodies.get(case.rows))
        return open_loop(target, case.rate, seconds, case.connections) if case.rate else closed_loop(target, case.connections, seconds)
