"""`mlplatform bench serving --overload`: three times more requests than the service can answer, at a fixed rate.

Belongs here: how much it can answer, what it does under more, and what is asked of that. Does not belong here: other loads (`run`).

Requests of a hundred inputs, so that the generator stays far below one core while the service is far above its own. Those that are
refused count as such; latencies are of the accepted ones, from the moment each was due.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mlplatform.local.bench_serving import prediction_log
from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, OURS
from mlplatform.local.bench_serving.load import find_wrk
from mlplatform.local.bench_serving.racer import Racer
from mlplatform.local.bench_serving.run import Options, Track, open_track
from mlplatform.printing import print_json, say, table

FULL = CASES["100x64"]
TIMES = 3.0
GOODPUT = 0.8  # of the full load's answers that must still be given under three times as much
SLOWER = 2.0  # what the p99 of accepted requests may be, to that of the full load
_CONNECTIONS = 512  # the refused hold one for a moment, too


@dataclass(frozen=True)
class Found:
    """Of each round, in order: the closed loop that fills the service, half of its rate, three times its rate."""

    full: Sequence[Measured]
    half: Sequence[Measured]
    over: Sequence[Measured]

    @property
    def goodput(self) -> float:
        """Accepted requests under overload to those at full load: the median over rounds, each compared within itself."""
        return median(o.load.per_s / f.load.per_s for o, f in zip(self.over, self.full, strict=True))

    @property
    def slower(self) -> float:
        """p99 of accepted requests under overload to that at full load, likewise."""
        return median(o.load.p99_ms / f.load.p99_ms for o, f in zip(self.over, self.full, strict=True))

    @property
    def held(self) -> bool:
        refused = all(one.load.errors > 0 for one in self.over)
        return refused and self.goodput >= GOODPUT and self.slower <= SLOWER and not any(one.load.errors for one in self.half)


def run_overload(options: Options, as_json: bool) -> int:
    """Prints figures. Returns 0 if enough was answered, soon enough, and nothing was refused at half load."""
    find_wrk()
    with open_track(replace(options, cases=(FULL.name,))) as track:
        racer = track.start(CONTENDERS[OURS])
        rounds = [_round(track, racer, turn) for turn in range(options.rounds)]
    found = Found(*zip(*rounds, strict=True))
    told = _told(found)
    if as_json:
        print_json(told)
    else:
        table(f"{FULL.rows} inputs a request", told["loads"], empty="")
        table("Under three times the full load", told["targets"], empty="")
        say("[green]held[/green]" if found.held else "[red]not held[/red]", markup=True)
    return 0 if found.held else 1


def _round(track: Track, racer: Racer, turn: int) -> tuple[Measured, ...]:
    full = _measure(track, racer, FULL, turn)
    rates = {"half": full.load.per_s / 2, "over": full.load.per_s * TIMES}
    cases = [Case(name, name, FULL.rows, _CONNECTIONS, rate) for name, rate in rates.items()]
    return full, *(_measure(track, racer, case, turn) for case in cases)


def _measure(track: Track, racer: Racer, case: Case, turn: int) -> Measured:
    one = racer.measure(case, turn, track.options.seconds, track.supervisor)
    prediction_log.drained(racer.port)
    prediction_log.trim(track.redis, track.options.model)
    return one


def _told(found: Found) -> dict[str, Any]:
    loads = (("full: closed loop, c=64", found.full), ("half of that rate", found.half), ("three times that rate", found.over))
    return {
        "loads": [_row(title, turns) for title, turns in loads],
        "targets": [
            {"what": "accepted requests/s to full load", "figure": round(found.goodput, 2), "target": f"≥ {GOODPUT}"},
            {"what": "p99 of accepted requests to full load", "figure": round(found.slower, 2), "target": f"≤ {SLOWER}"},
        ],
        "held": found.held,
    }


def _row(title: str, turns: Sequence[Measured]) -> dict[str, Any]:
    return {
        "load": title,
        "accepted/s": round(median(m.load.per_s for m in turns)),
        "refused/s": round(median(m.load.errors / m.load.seconds for m in turns)),
        "p50 ms": round(median(m.load.p50_ms for m in turns), 1),
        "p99 ms": round(median(m.load.p99_ms for m in turns), 1),
    }
