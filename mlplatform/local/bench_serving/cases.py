"""Which loads are put on a service, and one measurement of one.

Belongs here: names and shapes. Does not belong here: making the load (`load`), judging (`targets`).
"""

from dataclasses import dataclass

from mlplatform.local.bench_serving.load import LoadFigures


@dataclass(frozen=True)
class Case:
    """`rows` inputs a request, in a closed loop over `connections`; with a `rate`, arriving at so many a second over at most so many."""

    name: str
    title: str
    rows: int
    connections: int
    rate: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case("1x1", "1 row, c=1", 1, 1),
        Case("1x16", "1 row, c=16", 1, 16),
        Case("1x64", "1 row, c=64", 1, 64),
        Case("100x64", "100 rows, c=64", 100, 64),
        Case("open", "1 row, 1,000 a second", 1, 64, rate=1000.0),
    )
}


@dataclass(frozen=True)
class Measured:
    """One contender under one case in one round. `others_cores`: cores that others on the machine kept busy meanwhile."""

    contender: str
    case: str
    turn: int
    load: LoadFigures
    cpu_s_per_1000: float
    rss_mb: float
    others_cores: float
