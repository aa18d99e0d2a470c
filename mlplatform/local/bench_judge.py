"""`mlplatform bench judge`: how often the judge of canaries is wrong, and how soon it is right; simulated, seeded.

Belongs here: traffic made up for both arms, and what is asked of the judge. Does not belong here: judging: this calls
`deployment.judge`'s own tracks, for a thousand canaries at once.

A canary is looked at after every batch. Two things are measured: how many canaries that are no worse are called worse within all looks
(asked: at most alpha), and how many requests it takes until one that is worse is called so, beside a test of one look at a sample chosen
beforehand (asked: at most 1.5 times as many, in the median, as that test needs for the power the judge has by then).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from mlplatform.deployment.confidence import Arm, Sketch
from mlplatform.deployment.judge import MEASURES, Measure, Rail, Track, safe_at, track_of, worse_at
from mlplatform.printing import print_json, say, table
from mlplatform.release_policy import CanaryPolicy

Floats = npt.NDArray[np.float64]
Arms = Mapping[Measure, tuple[Arm, Arm]]  # canary, champion; each of shape (canaries,)

_BATCH = 100  # requests of each arm between two looks
_FEWEST = 5  # of regressions that show at once
_LONGEST = 10
_REGRESSIONS = (0.005, 0.01, 0.02, 0.05)
_POWER = 0.8
_RATIO = 1.5
_ERRORS, _BRIER = 0.02, 0.18  # the champion's shares of failed requests; its mean loss


@dataclass(frozen=True)
class World:
    """What both arms have in common. `drift`: levels move over the looks, in both arms alike; `tail`: latencies of Pareto's distribution
    with that exponent, whose variance is infinite below 2; 0: lognormal. `delay`: looks until labels are there."""

    name: str
    drift: bool = False
    tail: float = 0.0
    delay: int = 0


WORLDS = (
    World("identical"),
    World("heavy-tailed latencies", tail=1.2),
    World("drift in both arms", drift=True),
    World("labels 30 looks late", delay=30),
    World("all three", drift=True, tail=1.2, delay=30),
)


@dataclass(frozen=True)
class Size:
    canaries: int = 1000
    looks: int = 150


QUICK = Size(canaries=200, looks=40)


def run_bench_judge(quick: bool, seed: int, as_json: bool) -> int:
    """Prints figures. Returns 0 if nobody's canary was wronged more often than alpha, and regressions are found soon enough."""
    size, policy = QUICK if quick else Size(), CanaryPolicy()
    rng = np.random.default_rng(seed)
    wrong = [_false_rollbacks(policy, world, size, rng) for world in _told(WORLDS, "identical arms", as_json)]
    found = [row for measure in ("errors", "loss") for row in _regressions(policy, measure, size, rng, as_json)]
    little = _too_little(policy, size, rng)
    held = all(row["held"] for row in (*wrong, *found, little))
    if as_json:
        print_json({"alpha": policy.alpha, "canaries": size.canaries, "false_rollbacks": wrong, "regressions": found, "little": little})
    else:
        table(f"{size.canaries} canaries like their champion, {size.looks} looks of {_BATCH} requests an arm", wrong, empty="")
        table(f"Regressions, until {_POWER:.0%} of the canaries are called worse", found, empty="")
        table("Five looks of ten requests", [little], empty="")
        say("[green]held[/green]" if held else "[red]not held[/red]", markup=True)
    return 0 if held else 1


def _told(worlds: tuple[World, ...], what: str, quiet: bool) -> Iterator[World]:
    for number, world in enumerate(worlds, 1):
        if not quiet:
            say(f"{what}, {number} of {len(worlds)}: {world.name}")
        yield world


# --- canaries that are no worse ------------------------------------------------------------------------------------------


def _false_rollbacks(policy: CanaryPolicy, world: World, size: Size, rng: np.random.Generator) -> dict[str, Any]:
    shape = (size.canaries,)
    tracks = {measure: track_of(policy, measure, shape) for measure in MEASURES}
    rail = Rail(policy.max_error_excess, shape)
    peeking = _Peeking(shape)
    worse = np.zeros(shape, dtype=bool)
    for arms in _looks(world, size, policy, rng):
        for measure, (canary, champion) in arms.items():
            tracks[measure].add(canary, champion)
        rail.add(*arms["errors"])
        peeking.add(*arms["errors"])
        worse |= (rail.e >= worse_at(policy)) | np.any([track.worse >= worse_at(policy) for track in tracks.values()], axis=0)
    safe = np.mean([track.safe >= safe_at(policy) for track in tracks.values()], axis=0)
    share = float(worse.mean())
    return {
        "world": world.name,
        "called worse": share,
        "limit": policy.alpha,
        "measures safe at the end": round(float(safe.mean()), 2),
        "z-test at each look": round(float(peeking.refused.mean()), 3),
        "held": share <= policy.alpha,
    }


def _looks(world: World, size: Size, policy: CanaryPolicy, rng: np.random.Generator) -> Iterator[Arms]:
    """Both arms drawn alike, look by look."""
    shape = (size.canaries,)
    waiting: list[tuple[Arm, Arm, Arm, Arm]] = []
    seen = [Sketch({})] * size.canaries
    for look in range(size.looks):
        wave = 0.5 + 0.5 * math.sin(look / 7) if world.drift else 0.0
        errors = [Arm.of_counts(np.full(shape, float(_BATCH)), rng.binomial(_BATCH, _ERRORS + 0.2 * wave**4, shape)) for _ in range(2)]
        drawn = [_labelled(0.27 + 0.4 * wave, shape, rng) for _ in range(2)]
        waiting.append((drawn[0][1], drawn[1][1], drawn[0][2], drawn[1][2]))
        arms: dict[Measure, tuple[Arm, Arm]] = {"errors": (errors[0], errors[1]), "prediction": (drawn[0][0], drawn[1][0])}
        if look >= world.delay:
            loss, theirs, residual, other = waiting[look - world.delay]
            arms |= {"loss": (loss, theirs), "calibration": (residual, other)}
        latencies = [_latencies(world, 1 + 2 * wave, (size.canaries, _BATCH), rng) for _ in range(2)]
        if look:
            edges = [sketch.quantile(policy.slow_quantile) for sketch in seen]
            arms["slow"] = (_above(latencies[0], edges), _above(latencies[1], edges))
        # The quantile of so many looks hardly moves any more; a sketch of a few is as good an edge as one of all.
        seen = [old + Sketch.of(row) if look < 10 else old for old, row in zip(seen, latencies[1], strict=True)]
        yield arms


def _labelled(rate: float, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Arm, Arm, Arm]:
    """Predictions, Brier losses and residuals of a batch of a calibrated model."""
    predicted = rng.beta(4 * rate, 4 * (1 - rate), (*shape, _BATCH))
    label = rng.random(predicted.shape) < predicted
    return _arm(predicted), _arm((label - predicted) ** 2), _arm((1 + label - predicted) / 2)


def _latencies(world: World, slow: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    drawn = 2.0 * (1 + rng.pareto(world.tail, shape)) if world.tail else rng.lognormal(1.0, 0.5, shape)
    return np.asarray(slow * drawn)


def _above(latencies: Floats, edges: list[int]) -> Arm:
    counts = [Sketch.of(row).above(edge) for row, edge in zip(latencies, edges, strict=True)]
    return Arm.of_counts(np.full(len(counts), float(latencies.shape[1])), np.array(counts, dtype=float))


def _arm(values: Floats) -> Arm:
    """Sums over the last axis."""
    return Arm(np.full(values.shape[:-1], float(values.shape[-1])), values.sum(axis=-1), (values**2).sum(axis=-1))


class _Peeking:
    """What one should not do: a z-test for two shares at 1 %, anew after every batch."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._n = self._hits = self._other = np.zeros(shape)
        self.refused = np.zeros(shape, dtype=bool)

    def add(self, canary: Arm, champion: Arm) -> None:
        self._n, self._hits, self._other = self._n + canary.n, self._hits + canary.total, self._other + champion.total
        pooled = (self._hits + self._other) / (2 * self._n)
        spread = np.sqrt(np.maximum(pooled * (1 - pooled) * 2 / self._n, 1e-12))
        self.refused |= (self._hits - self._other) / self._n / spread > NormalDist().inv_cdf(0.99)


# --- canaries that are worse ---------------------------------------------------------------------------------------------


def _regressions(policy: CanaryPolicy, measure: Measure, size: Size, rng: np.random.Generator, quiet: bool) -> Iterator[dict[str, Any]]:
    draw, spread = _DRAWN[measure]
    for points in _REGRESSIONS:
        if not quiet:
            say(f"{measure} worse by {100 * points:g} points")
        track = track_of(policy, measure, (size.canaries,))
        level = policy.alpha / (len(MEASURES) + 1)  # as `worse_at` shares it out
        fixed = _fixed_sample(level, _POWER, points, spread(points))
        at = _called(track, worse_at(policy), size, fixed, partial(_both, draw, points, size, rng))
        ordered = np.sort(at)
        needed = float(ordered[math.ceil(_POWER * len(ordered)) - 1])
        median = float(np.median(at))
        ratio = median / fixed
        yield {
            "measure": measure,
            "points": 100 * points,
            "median requests": _whole(median),
            f"for {_POWER:.0%}": _whole(needed),
            "one look needs": round(fixed),
            "median to it": round(ratio, 2),
            f"{_POWER:.0%} to it": round(needed / fixed, 2),
            "limit": _RATIO,
            "held": ratio <= _RATIO,
        }


def _called(track: Track, limit: float, size: Size, fixed: float, draw: Callable[[int], tuple[Arm, Arm]]) -> Floats:
    """How many requests of the canary each needed to be called worse, of `_LONGEST` times what one look needs; infinite where it was not.
    There are some fifty looks within what one look needs."""
    at = np.full(size.canaries, np.inf)
    requests, n = 0, max(_FEWEST, round(fixed / 50))
    while requests < _LONGEST * fixed and np.isfinite(at).mean() < _POWER:
        track.add(*draw(n))
        requests += n
        at = np.where(np.isinf(at) & (track.worse >= limit), float(requests), at)
    return at


def _both(draw: "_Draw", more: float, size: Size, rng: np.random.Generator, n: int) -> tuple[Arm, Arm]:
    return draw(more, n, size, rng), draw(0.0, n, size, rng)


def _failures(more: float, n: int, size: Size, rng: np.random.Generator) -> Arm:
    return Arm.of_counts(np.full(size.canaries, float(n)), rng.binomial(n, _ERRORS + more, size.canaries).astype(float))


def _losses(more: float, n: int, size: Size, rng: np.random.Generator) -> Arm:
    """Brier losses as a forecaster has them: of a beta distribution."""
    return _arm(rng.beta(_BRIER + more, 1 - _BRIER - more, (size.canaries, n)))


def _failures_spread(points: float) -> float:
    worse = _ERRORS + points
    return _ERRORS * (1 - _ERRORS) + worse * (1 - worse)


def _losses_spread(points: float) -> float:
    means = (_BRIER, _BRIER + points)
    return sum(mean * (1 - mean) / 2 for mean in means)


_Draw = Callable[[float, int, Size, np.random.Generator], Arm]
_DRAWN: Mapping[Measure, tuple[_Draw, Callable[[float], float]]] = {
    "errors": (_failures, _failures_spread),
    "loss": (_losses, _losses_spread),
}


def _fixed_sample(level: float, power: float, points: float, variance: float) -> float:
    """Observations of each arm for a one-sided z-test; `variance`: both arms' together (Cohen 1988, "Statistical Power Analysis")."""
    z = NormalDist().inv_cdf
    return (z(1 - level) + z(power)) ** 2 * variance / points**2


def _whole(value: float) -> int | None:
    return round(value) if math.isfinite(value) else None


def _too_little(policy: CanaryPolicy, size: Size, rng: np.random.Generator) -> dict[str, Any]:
    tracks = {measure: track_of(policy, measure, (size.canaries,)) for measure in ("errors", "loss")}
    for _ in range(5):
        tracks["errors"].add(_failures(0.02, 10, size, rng), _failures(0.0, 10, size, rng))
        tracks["loss"].add(_losses(0.02, 10, size, rng), _losses(0.0, 10, size, rng))
    worse = np.any([track.worse >= worse_at(policy) for track in tracks.values()], axis=0)
    safe = np.all([track.safe >= safe_at(policy) for track in tracks.values()], axis=0)
    share = float((~worse & ~safe).mean())
    return {"cannot tell": share, "limit": 0.95, "held": share >= 0.95}
