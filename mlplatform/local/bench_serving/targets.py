"""What the prediction service must reach, and whether it did.

Belongs here: limits and what each is measured by. Does not belong here: measuring, showing.

A figure that was not taken (its case or peer was left out, the machine has too few cores) is not judged: it neither holds nor fails.

"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from mlplatform.local.bench_serving.cases import CASES, Measured
from mlplatform.local.bench_serving.contenders import FASTAPI, MLSERVER, OURS, TUTORIAL
from mlplatform.local.bench_serving.prediction_log import LogBalance


@dataclass(frozen=True)
class Judged:
    """One target beside its figure (None: not taken, and `why`)."""

    what: str
    figure: float | None
    limit: float
    at_least: bool
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


@dataclass(frozen=True)
class Taken:
    """Everything one run has measured. `scale`: requests/s of two processes to one; None where cores were too few for two. `scale_how`:
    how it was measured where they had no cores of their own, or why it was not."""

    measured: Sequence[Measured]
    ready_s: dict[str, list[float]]
    wrong: dict[str, int]
    balance: LogBalance
    scale: float | None
    scale_how: str

    def of(self, contender: str, case: str) -> list[Measured]:
        """In the order of the rounds."""
        return [m for m in self.measured if (m.contender, m.case) == (contender, case)]

    def ratio(self, peer: str, case: str = "1x64") -> float | None:
        """Ours to the peer's requests/s: the median over rounds, each compared within itself."""
        pairs = list(zip(self.of(OURS, case), self.of(peer, case), strict=False))
        return median(mine.load.per_s / theirs.load.per_s for mine, theirs in pairs if theirs.load.per_s) if pairs else None

    def cpu_ratio(self, peer: str, case: str) -> float | None:
        """The peer's processor time for a request to ours, taken likewise: what a busy machine blurs least."""
        pairs = list(zip(self.of(OURS, case), self.of(peer, case), strict=False))
        return median(theirs.cpu_s_per_1000 / mine.cpu_s_per_1000 for mine, theirs in pairs if mine.cpu_s_per_1000) if pairs else None


# What the ratio to each peer must reach: one process, 64 connections, single rows.
RATIOS = {MLSERVER: 12.0, TUTORIAL: 100.0, FASTAPI: 1.0}
P99_MS, OPEN_P99_MS, CPU_S_PER_1000 = 8.0, 3.0, 0.05
PREDICTIONS_PER_S, SCALE, READY_S, RSS_MB = 120_000.0, 1.6, 3.0, 400.0


def judge(taken: Taken, made_up: bool = True) -> list[Judged]:
    """`made_up`: the made-up model was served, for which the limits of speed and memory are set; others differ in size and library."""
    return [*(_speed(taken) if made_up else ()), *(_process(taken) if made_up else ()), *_truth(taken)]


def _speed(taken: Taken) -> Iterator[Judged]:
    for peer, limit in RATIOS.items():
        yield Judged(f"requests/s to {peer}, 1 row, c=64", taken.ratio(peer), limit, at_least=True, why="not in this run")
    singles, many, opened = (taken.of(OURS, case) for case in ("1x64", "100x64", "open"))
    yield Judged("p99 ms, 1 row, c=64", _median([m.load.p99_ms for m in singles]), P99_MS, at_least=False, why="not in this run")
    cpu = _median([m.cpu_s_per_1000 for m in singles])
    yield Judged("CPU s per 1,000 requests, 1 row, c=64", cpu, CPU_S_PER_1000, at_least=False, why="not in this run")
    late = _median([m.load.p99_ms for m in opened])
    yield Judged("p99 ms, 1,000 requests/s whatever comes back", late, OPEN_P99_MS, at_least=False, why="not in this run")
    rows = CASES["100x64"].rows
    predictions = _median([m.load.per_s * rows for m in many])
    yield Judged("predictions/s, 100 rows, c=64", predictions, PREDICTIONS_PER_S, at_least=True, why="not in this run")


def _process(taken: Taken) -> Iterator[Judged]:
    how = f", {taken.scale_how}" if taken.scale is not None and taken.scale_how else ""
    yield Judged(f"requests/s of two processes to one{how}", taken.scale, SCALE, at_least=True, why=taken.scale_how)
    yield Judged("s until ready", _median(taken.ready_s[OURS]), READY_S, at_least=False)
    yield Judged("MB of the process", max((m.rss_mb for m in taken.measured if m.contender == OURS), default=None), RSS_MB, at_least=False)


def _truth(taken: Taken) -> Iterator[Judged]:
    errors = sum(m.load.errors for m in taken.measured if m.contender == OURS)
    yield Judged("failed requests", errors, 0, at_least=False)
    yield Judged("predictions unlike Booster.predict", taken.wrong[OURS], 0, at_least=False)
    yield Judged("log records unaccounted for", taken.balance.missing, 0, at_least=False)


def _median(figures: Sequence[float]) -> float | None:
    return median(figures) if figures else None
