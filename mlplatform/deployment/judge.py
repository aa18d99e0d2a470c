"""Is the canary worse than the champion? Judged from both arms' traffic at the same time, as often as one likes; pure.

Belongs here: which measures are compared, what a verdict is, and which step follows. Does not belong here: the statistics (`confidence`),
where the evidence comes from, carrying a step out (`orchestration`).

A canary's evidence comes in looks: what both arms did within one span of time. Looks are added up from the first to the last, so the
verdict follows from them alone, and a judge that was killed begins anew. For each measure three wealths are kept (e-processes, see
`confidence`): against "worse by no more than `harm`", against "worse by `margin` or more", and, for the loss, against "no better".
By Ville's inequality a wealth that starts at 1 ever exceeds 1/a with probability a at most, where what it bets against is true. So one may
look at any time, and stop at any time.

- *worse*: some measure's first wealth, or the guard rail's, has exceeded k/alpha, k the number of measures and the rail (Bonferroni).
- *not worse*: every measure that is asked for has exceeded 1/beta with its second (all must, so nothing is divided).
- *better*: not worse, and the third wealth of the loss has exceeded 1/alpha.
- *cannot tell*: all else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np

from mlplatform.deployment.confidence import (
    NOTHING,
    Arm,
    Bet,
    Floats,
    Sketch,
    Sums,
    add_look,
    add_mean,
    differences,
    edge_ms,
    interval,
    log_e,
    no_capital,
)
from mlplatform.release_policy import CanaryPolicy, Tolerance

Word = Literal["better", "not worse", "worse", "cannot tell"]
Measure = Literal["errors", "slow", "prediction", "loss", "calibration"]
MEASURES: tuple[Measure, ...] = ("errors", "slow", "prediction", "loss", "calibration")
_BINARY = frozenset({"errors", "slow"})
_BOTH_SIDES = frozenset({"prediction", "calibration"})  # a shift is harm in either direction
_OFF_CENTRE = frozenset({"calibration"})  # unless it is towards the centre, where the champion is the one that is off
_OF_LABELS = frozenset({"loss", "calibration"})
_FORGET = 0.8  # how much of what the champion did before still counts for the guess of what it will do
_FIRST_GUESS: Mapping[str, float] = {"errors": 0.01, "slow": 0.05, "prediction": 0.5, "loss": 0.2, "calibration": 0.5}
_NO_ARM = Arm.of(())
_NO_LATENCY = Sketch({})


@dataclass(frozen=True)
class ArmLook:
    """What one arm did within one look. `errors`: of the `requests`, those that failed or timed out. `predictions`, `losses` and
    `residuals` of single inputs, each in [0, 1] (see `CanaryPolicy`; a residual is (1 + label - prediction) / 2). Labels come late:
    `losses` and `residuals` are of predictions whose labels had to be there by now, in both arms of the same span of time."""

    requests: int = 0
    errors: int = 0
    latencies: Sketch = _NO_LATENCY
    predictions: Arm = _NO_ARM
    losses: Arm = _NO_ARM
    residuals: Arm = _NO_ARM


@dataclass(frozen=True)
class Look:
    """Both arms until `until`."""

    until: datetime
    champion: ArmLook
    canary: ArmLook


@dataclass(frozen=True)
class Finding:
    """One measure so far. `difference`: canary less champion, with the ends of a confidence sequence that holds at all times with
    probability 1 - alpha; NaN and the whole range before there is anything to compare."""

    measure: Measure
    canary_n: float
    champion_n: float
    difference: float
    low: float
    high: float
    state: Literal["worse", "safe", "open"]
    reason: str


@dataclass(frozen=True)
class Verdict:
    """`guard`: the guard rail is broken, which ends the canary whatever the measures say."""

    word: Word
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    looks: int
    guard: bool = False

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)

    def evidence(self) -> dict[str, Any]:
        """Flat and JSON-able, for a ledger."""
        told: dict[str, Any] = {"looks": self.looks, "guard": self.guard}
        for f in self.findings:
            told[f.measure] = f"{f.difference:+.4f} in [{f.low:+.4f}, {f.high:+.4f}], {f.canary_n:.0f} to {f.champion_n:.0f}: {f.state}"
        return told


@dataclass
class Track:
    """One measure's wealths over the looks; of one canary, or of many at once (`shape`), as the simulations do it."""

    tolerance: Tolerance
    binary: bool = False
    both_sides: bool = False
    off_centre: bool = False  # on either side, and only as far as the canary is further from 0.5 than the champion
    guess: float = 0.5
    shape: tuple[int, ...] = ()
    sums: Sums = NOTHING
    worse: Floats = field(init=False)  # largest log e-value so far
    safe: Floats = field(init=False)
    better: Floats = field(init=False)
    canary_n: Floats = field(init=False)
    champion_n: Floats = field(init=False)
    canary_total: Floats = field(init=False)
    champion_total: Floats = field(init=False)

    def __post_init__(self) -> None:
        harm, margin = self.tolerance.harm, self.tolerance.margin
        self._worse = [Bet("above", harm, binary=self.binary)]
        self._safe = [Bet("below", margin, binary=self.binary)]
        if self.both_sides:
            self._worse.append(Bet("below", -harm, binary=self.binary))
            self._safe.append(Bet("above", -margin, binary=self.binary))
        # Which side the two are on together, for `off_centre`: the mean of both arms' means, one for each bet above.
        self._side = {id(bet): no_capital(self.shape) for bet in (*self._worse, *self._safe)} if self.off_centre else {}
        self._better = [Bet("below", 0.0, binary=self.binary)]
        self._capital = {id(bet): no_capital(self.shape) for bet in (*self._worse, *self._safe, *self._better)}
        nothing = np.zeros(self.shape)
        self.worse, self.safe, self.better = nothing, nothing, nothing
        self.canary_n, self.champion_n = nothing, nothing
        self.canary_total, self.champion_total = nothing, nothing
        self._seen, self._total = nothing, nothing

    def add(self, canary: Arm, champion: Arm) -> None:
        """One more look."""
        centre = np.where(self._seen > 0, self._total / np.maximum(self._seen, 1e-12), self.guess)
        for bet in (*self._worse, *self._safe, *self._better):
            self._capital[id(bet)] = add_look(self._capital[id(bet)], bet, canary, champion, centre)
        if self.off_centre:
            self._add_side(canary, champion)
        # Harm on either side is harm: the mean of both wealths is one again. Safety is wanted on both: the lesser counts.
        self.worse = np.maximum(self.worse, _mean_e([self._log_e(bet, np.minimum) for bet in self._worse]))
        self.safe = np.maximum(self.safe, np.minimum.reduce([self._log_e(bet, _mean_of_two) for bet in self._safe]))
        self.better = np.maximum(self.better, log_e(self._capital[id(self._better[0])]))
        self._seen = _FORGET * self._seen + champion.n
        self._total = _FORGET * self._total + champion.total
        self.canary_n = self.canary_n + canary.n
        self.champion_n = self.champion_n + champion.n
        self.canary_total = self.canary_total + canary.total
        self.champion_total = self.champion_total + champion.total
        self.sums = self.sums + differences(canary, champion)

    def _add_side(self, canary: Arm, champion: Arm) -> None:
        """A canary is further from the centre than its champion, on the side s, where s times their difference and s times their sum are
        both positive. What befalls both arms cancels in the difference and not in the sum, so a look is one observation of the sum,
        whatever its size: of looks whose mean given the past is the same."""
        there = (canary.n > 0) & (champion.n > 0)
        middle = (canary.total / np.maximum(canary.n, 1) + champion.total / np.maximum(champion.n, 1)) / 2
        for bet in (*self._worse, *self._safe):
            self._side[id(bet)] = add_mean(self._side[id(bet)], bet.direction, 0.5 + bet.margin / 2, middle, there)

    def _log_e(self, bet: Bet, both: Callable[[Floats, Floats], Floats] = np.minimum) -> Floats:
        """The log wealth; of two, where the side counts too: "not worse" is refuted where both halves of it are (`np.minimum`), "worse"
        where one of its two is (`_mean_of_two`)."""
        found = log_e(self._capital[id(bet)])
        return both(found, log_e(self._side[id(bet)])) if id(bet) in self._side else found


def _mean_e(logs: Sequence[Floats]) -> Floats:
    return np.asarray(np.logaddexp.reduce(logs) - math.log(len(logs)))


def _mean_of_two(one: Floats, other: Floats) -> Floats:
    return _mean_e([one, other])


@dataclass
class Rail:
    """The guard rail's wealth against "the canary's share of errors is at most `above` higher than the champion's, in every look".

    A share 1/(t(t+1)) of it is put down at look t, less than 1 in all, so it is an e-process like the others; and what a canary did well
    for days need not be outweighed first by what it does now. Of one canary, or of many at once (`shape`).
    """

    above: float
    shape: tuple[int, ...] = ()
    e: Floats = field(init=False)  # largest log e-value so far

    def __post_init__(self) -> None:
        self._bet = Bet("above", self.above, binary=True)
        self._capital = np.full_like(no_capital(self.shape), -np.inf)
        self._looks = 0
        self.e = np.full(self.shape, -np.inf)

    def add(self, canary: Arm, champion: Arm) -> None:
        """One more look."""
        self._looks += 1
        stake = -math.log(self._looks * (self._looks + 1))
        self._capital = add_look(np.logaddexp(self._capital, stake), self._bet, canary, champion, _FIRST_GUESS["errors"])
        self.e = np.maximum(self.e, log_e(self._capital))


def track_of(policy: CanaryPolicy, measure: Measure, shape: tuple[int, ...] = ()) -> Track:
    """A measure's track before the first look."""
    guess = 1 - policy.slow_quantile if measure == "slow" else _FIRST_GUESS[measure]
    return Track(_tolerance(policy, measure), measure in _BINARY, measure in _BOTH_SIDES, measure in _OFF_CENTRE, guess, shape)


def worse_at(policy: CanaryPolicy) -> float:
    """The log e-value from which on a measure says worse, or the guard rail is broken."""
    return math.log((len(MEASURES) + 1) / policy.alpha)


def safe_at(policy: CanaryPolicy) -> float:
    return math.log(1 / policy.beta)


def judge(policy: CanaryPolicy, looks: Sequence[Look]) -> Verdict:
    """From all looks of one canary, oldest first."""
    tracks = {measure: track_of(policy, measure) for measure in MEASURES}
    rail = Rail(policy.max_error_excess)
    seen = Sketch({})  # the champion's latencies before a look: what is slow is fixed before one knows who will be
    for look in looks:
        compared = _compared(policy, look, seen)
        for measure, (canary, champion) in compared.items():
            tracks[measure].add(canary, champion)
        if look.canary.requests and look.champion.requests:  # a look without failures to compare takes no stake
            rail.add(*compared["errors"])
        seen = seen + look.champion.latencies
    findings = tuple(_finding(policy, measure, track) for measure, track in tracks.items())
    if broken := _broken(policy, rail, looks):
        return Verdict("worse", (broken,), findings, len(looks), guard=True)
    bad = [f.reason for f in findings if f.state == "worse"]
    if bad:
        return Verdict("worse", tuple(bad), findings, len(looks))
    wanted = [f for f in findings if policy.labels or f.measure not in _OF_LABELS]
    still = [f.measure for f in wanted if f.state == "open"]
    if still:
        return Verdict("cannot tell", (f"too little is known of {', '.join(still)}",), findings, len(looks))
    if float(tracks["loss"].better) >= math.log(1 / policy.alpha):
        return Verdict("better", ("its loss is lower, and nothing is worse",), findings, len(looks))
    return Verdict("not worse", ("every measure is within its margin",), findings, len(looks))


def _compared(policy: CanaryPolicy, look: Look, seen: Sketch) -> dict[Measure, tuple[Arm, Arm]]:
    canary, champion = look.canary, look.champion
    arms: dict[Measure, tuple[Arm, Arm]] = {
        "errors": (Arm.of_counts(canary.requests, canary.errors), Arm.of_counts(champion.requests, champion.errors)),
        "prediction": (canary.predictions, champion.predictions),
        "loss": (canary.losses, champion.losses),
        "calibration": (canary.residuals, champion.residuals),
    }
    if seen.n:
        edge = Sketch.bin_of(edge_ms(seen.quantile(policy.slow_quantile)) + policy.slow_slack_ms)
        arms["slow"] = (_slow(canary, edge), _slow(champion, edge))
    return arms


def _slow(arm: ArmLook, edge: int) -> Arm:
    return Arm.of_counts(arm.latencies.n, arm.latencies.above(edge))


def _broken(policy: CanaryPolicy, rail: Rail, looks: Sequence[Look]) -> str:
    """Why the canary ends at once; '' where it does not. What fails in both arms is no fault of the canary."""
    if float(rail.e) < worse_at(policy):
        return ""
    share, other = _share(looks[-1].canary), _share(looks[-1].champion)
    failed = f"{share:.1%} of the last look's {looks[-1].canary.requests} requests to the canary failed, {other:.1%} of the champion's"
    return f"{failed}: the guard rail is at {policy.max_error_excess:.0%} more, and it was proven to be above"


def _share(arm: ArmLook) -> float:
    return arm.errors / arm.requests if arm.requests else 0.0


def _finding(policy: CanaryPolicy, measure: Measure, track: Track) -> Finding:
    tolerance = track.tolerance
    low, high = interval(track.sums, policy.alpha / 2, 1.0)
    difference = float(track.sums.mean)
    worse, safe = float(track.worse), float(track.safe)
    state: Literal["worse", "safe", "open"] = "open"
    if worse >= worse_at(policy):
        state = "worse"
    elif safe >= safe_at(policy):
        state = "safe"
    n = float(track.canary_n), float(track.champion_n)
    told = f"{measure}: {difference:+.4f} to the champion, in [{low:+.4f}, {high:+.4f}], from {n[0]:.0f} and {n[1]:.0f}"
    limit = f"at most {tolerance.margin:g} is not worse" if state != "worse" else f"above {tolerance.harm:g} is worse"
    if track.off_centre and min(n) > 0:
        off = (float(total) / seen - 0.5 for total, seen in zip((track.canary_total, track.champion_total), n, strict=True))
        told += "; off by {:+.4f} and {:+.4f}".format(*off)
    reason = f"{told} ({limit})" if min(n) > 0 else f"{measure}: nothing to compare yet"
    return Finding(measure, *n, difference, low, high, state, reason)


def _tolerance(policy: CanaryPolicy, measure: Measure) -> Tolerance:
    found: Tolerance = getattr(policy, measure)
    return found


# --- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a canary is: its share now, since when, how many requests it answered at it; and when it began."""

    percent: float
    since: datetime
    requests: int
    began: datetime


@dataclass(frozen=True)
class Step:
    """What follows: another share (`advance`), nothing (`hold`), the alias `production` (`promote`), the end of a canary that is worse
    (`reject`) or of which nothing could be told in time (`end`)."""

    action: Literal["advance", "hold", "promote", "reject", "end"]
    percent: float
    reason: str


def next_step(policy: CanaryPolicy, progress: Progress, verdict: Verdict, now: datetime) -> Step:
    """A canary that is worse is rejected at once; one that is not advances, a step at a time, once it has had the step's requests and time.

    With `labels`, the first steps need only what is known without them: labels come hours later, and few reach a canary of one percent.
    """
    here = progress.percent
    if verdict.word == "worse":
        return Step("reject", 0.0, verdict.reason)
    told = now - progress.since >= policy.min_step and progress.requests >= policy.min_requests
    higher = [percent for percent in policy.steps if percent > here]
    if told and higher and verdict.word in ("better", "not worse", "cannot tell") and _answers_are_safe(verdict):
        return Step("advance", higher[0], f"{verdict.word}: {verdict.reason}; errors, latency and predictions are within their margins")
    if told and not higher and verdict.word in ("better", "not worse"):
        return Step("promote", 100.0, f"{verdict.word}: {verdict.reason}")
    if now - progress.began >= policy.max_duration and policy.at_the_end == "end":
        return Step("end", 0.0, f"nothing could be told within {policy.max_duration}: {verdict.reason}")
    return Step("hold", here, verdict.reason if told else f"{progress.requests} requests at this step; {verdict.reason}")


def _answers_are_safe(verdict: Verdict) -> bool:
    return all(f.state == "safe" for f in verdict.findings if f.measure not in _OF_LABELS)
