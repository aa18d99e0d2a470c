"""Evidence that may be looked at at any time: e-processes and confidence sequences; pure, over sums that can be added up.

Belongs here: test statistics and their bounds. Does not belong here: which metric, which margin, what follows (`judge`).

**Two arms, one look.** n1 observations x of the canary and n0 observations y of the champion, in [low, high], with means mu1 and mu0
given the past. For any centre c and bets l1, l0 >= 0 that were fixed before the look, with n1 l1 = n0 l0,

    prod(1 + l1 (x - m - c)) * prod(1 - l0 (y - c))

has an expectation of at most 1 wherever mu1 - mu0 <= m: the means of its factors are at most 1 + l1 d and 1 - l0 d with one and the same
d, and (1 + l1 d)^n1 (1 - l0 d)^n0 <= 1 by the inequality of the means. So the product over looks is a supermartingale, whatever
the level of each look is: **a drift common to both arms cancels**. It is the bet of Waudby-Smith and Ramdas 2024 ("Estimating means
of bounded random variables by betting", Section 4) on two samples; for yes and no it is the e-variable of Turner, Ly and Gruenwald 2024
("Generic e-variables for exact sequential k-sample tests that allow for optional stopping", Theorem 1). A mean over fixed bets stays one
(Robbins 1970), and by Ville's inequality (1939) it ever exceeds 1/alpha with probability alpha at most.

**Sums are enough.** For yes and no the product is one of counts. Otherwise log(1 + l x) >= l x - psi(l) x^2 for x >= -1, l in [0, 1),
psi(l) = -log(1 - l) - l (Fan, Grama and Liu 2015, "Exponential inequalities for martingales with applications", Section 4) bounds it from
below by number, sum and sum of squares, which costs power and no validity.

**What is assumed**: within one look and arm the observations are independent with one mean, given the past; anything may change from
look to look. No distribution is assumed, nothing is asymptotic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

# Bets from far too small to nearly everything, spread evenly over their logarithm: a mixture pays for what it does not know with the
# logarithm of how many it spreads over, and a bet within some 40 % of the best one earns nearly as much.
# They are per length of the interval; a rare error makes large ones right, so they go beyond 1, down to what a look allows.
_BETS = np.geomspace(0.003, 20.0, 48)
_BOLDEST = 0.95  # of the largest bet that cannot lose everything
_FRACTIONS = np.geomspace(0.002, 0.95, 48)
_PSI = -np.log1p(-_FRACTIONS) - _FRACTIONS
Direction = Literal["above", "below"]


@dataclass(frozen=True)
class Arm:
    """One arm's observations in one look: number, sum and sum of squares. Scalars, or arrays of one shape for many canaries at once."""

    n: Floats
    total: Floats
    squares: Floats

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> "Arm":
        x = np.asarray(values, dtype=np.float64)
        return cls(np.float64(x.size), x.sum(), (x * x).sum())  # type: ignore[arg-type]  # a scalar is an array of no dimension

    @classmethod
    def of_counts(cls, n: float | npt.ArrayLike, hits: float | npt.ArrayLike) -> "Arm":
        """Of yes and no: `hits` of `n`."""
        h = np.asarray(hits, dtype=np.float64)
        return cls(np.asarray(n, dtype=np.float64), h, h)


@dataclass(frozen=True)
class Bet:
    """What is bet against: "canary - champion is at most `margin`" (`above`), or "at least" (`below`); observations in [low, high]."""

    direction: Direction
    margin: float = 0.0
    low: float = 0.0
    high: float = 1.0
    binary: bool = False  # every observation is `low` or `high` = 0 or 1: the product is exact


def no_capital(shape: tuple[int, ...] = ()) -> Floats:
    """The log capital of every bet before the first look; shape (*shape, bets)."""
    return np.zeros((*shape, _BETS.size))


def add_look(capital: Floats, bet: Bet, canary: Arm, champion: Arm, centre: npt.ArrayLike) -> Floats:
    """The log capital of every bet after one more look; unchanged where an arm has no observation.

    `centre`: the champion's mean as guessed before the look. A bad guess costs power, never validity.
    """
    sign = 1.0 if bet.direction == "above" else -1.0
    length = bet.high - bet.low
    inside = 1e-4 * length  # a centre on the edge would leave no bet
    theirs = np.clip(np.asarray(centre, dtype=np.float64), bet.low + inside, bet.high - inside)
    ours = np.clip(theirs + bet.margin, bet.low + inside, bet.high - inside)
    theirs = ours - bet.margin  # one d for both arms: where the edge moved one centre, it moves both
    at_risk = (ours - bet.low, bet.high - theirs) if sign > 0 else (bet.high - ours, theirs - bet.low)
    at_risk = (at_risk[0], np.maximum(at_risk[1], inside))
    there = (canary.n > 0) & (champion.n > 0)
    ratio = np.where(there, canary.n, 0.0) / np.where(there, champion.n, 1.0)
    most = _BOLDEST / np.maximum(at_risk[0], at_risk[1] * ratio)
    bets = np.minimum(_BETS / length, most[..., None])
    gained = _gain(canary, ours, sign * bets, at_risk[0], bet.binary)
    gained = gained + _gain(champion, theirs, -sign * bets * ratio[..., None], at_risk[1], bet.binary)
    return np.asarray(capital + np.where(there[..., None], gained, 0.0))


def _gain(arm: Arm, centre: Floats, bets: Floats, at_risk: Floats, binary: bool) -> Floats:
    """Sum of log(1 + bet (x - centre)) over an arm, or a lower bound of it. `bets` has one axis more than the rest, at the end."""
    n, total, c, risk = (np.asarray(v)[..., None] for v in (arm.n, arm.total, centre, at_risk))
    if binary:
        return np.asarray(total * np.log1p(bets * (1 - c)) + (n - total) * np.log1p(-bets * c))
    squares = np.maximum(np.asarray(arm.squares)[..., None] - 2 * c * total + n * c * c, 0.0)
    part = np.abs(bets) * risk
    return np.asarray(bets * (total - n * c) - (-np.log1p(-part) - part) * squares / risk**2)


def add_mean(capital: Floats, direction: Direction, limit: float, value: npt.ArrayLike, there: npt.ArrayLike) -> Floats:
    """The log capital of every bet after one more observation in [0, 1], betting against "its mean given the past is at most `limit`"
    (`above`) or "at least" (`below`); unchanged where it is not `there`."""
    sign = 1.0 if direction == "above" else -1.0
    centre = min(max(limit, 1e-4), 1 - 1e-4)
    most = _BOLDEST / (centre if sign > 0 else 1 - centre)
    bets = np.minimum(_BETS, most)
    gap = np.where(there, np.asarray(value, dtype=np.float64) - centre, 0.0)
    return np.asarray(capital + np.log1p(sign * bets * gap[..., None]))


def log_e(capital: Floats) -> Floats:
    """The log e-value: of the mean capital over all bets."""
    top = capital.max(axis=-1)
    return np.asarray(top + np.log(np.exp(capital - top[..., None]).mean(axis=-1)))


# --- intervals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Of differences canary - champion over all looks: number, sum, sum of squares. They add up, in any order of the looks."""

    n: Floats
    total: Floats
    squares: Floats

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Floats:
        """NaN where there is nothing yet."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.n > 0, self.total / self.n, np.nan)

    def mirrored(self) -> "Sums":
        return Sums(self.n, -self.total, self.squares)

    def to_list(self) -> list[float]:
        return [float(self.n), float(self.total), float(self.squares)]

    @classmethod
    def from_list(cls, given: Sequence[float]) -> "Sums":
        return cls(*(np.asarray(v, dtype=np.float64) for v in given))


NOTHING = Sums.from_list((0.0, 0.0, 0.0))


def differences(canary: Arm, champion: Arm) -> Sums:
    """The differences of one look: each of the smaller arm's n observations less the mean of a group of the other arm's.

    Which falls into which group is nobody's business, so the sums are means over all groupings. By Jensen's inequality the e-value of the
    mean sums is at most the mean of the groupings' e-values, and a mean of e-values is one. Nothing to compare where an arm has no
    observation.

    With n <= N observations, the larger arm's groups hold floor(N/n) or one more; the mean of k of N values drawn without return
    has variance s^2 (1/k - 1/N), s^2 with N - 1 in the denominator (Cochran 1977, "Sampling Techniques", Theorem 2.2).
    """
    n = np.minimum(canary.n, champion.n)
    there = n > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = canary.total / canary.n - champion.total / champion.n
        spread = _spread(canary, n) + _spread(champion, n)
        squares = n * (gap * gap + spread)
    return Sums(n, np.where(there, n * gap, 0.0), np.where(there, squares, 0.0))


def _spread(arm: Arm, groups: Floats) -> Floats:
    """Variance of the mean of a random group, over all groupings of the arm into `groups` groups of nearly one size."""
    mean = arm.total / arm.n
    variance = np.maximum(arm.squares / arm.n - mean * mean, 0.0) * np.where(arm.n > 1, arm.n / np.maximum(arm.n - 1, 1), 0.0)
    size = np.floor(arm.n / groups)
    larger = arm.n - size * groups
    inverse = ((groups - larger) / size + larger / (size + 1)) / groups
    return np.asarray(variance * (inverse - 1 / arm.n))


def sums_log_e(sums: Sums, mean: npt.ArrayLike, length: float) -> Floats:
    """Log e-value against "the mean difference is at most `mean`", observations in an interval of `length`. Shape of the sums.

    The same bound of the bet on differences, of all looks at once: weaker than `add_look`, which knows the champion's level, but it
    takes any `mean` afterwards, as an interval needs.
    """
    m = np.asarray(mean, dtype=np.float64)
    scale = length + np.maximum(m, 0.0)  # the least D - m can be, taken positive
    x = (sums.total - sums.n * m) / scale
    square = np.maximum(sums.squares - 2 * m * sums.total + sums.n * m * m, 0.0) / scale**2
    exponents = np.multiply.outer(x, _FRACTIONS) - np.multiply.outer(square, _PSI)
    top = exponents.max(axis=-1)
    return np.asarray(top + np.log(np.exp(exponents - top[..., None]).mean(axis=-1)))


def lower_bound(sums: Sums, alpha: float, length: float) -> float:
    """The lower end of the confidence sequence at `alpha` for this side alone; -length where nothing is known."""
    if float(sums.n) <= 0:
        return -length
    low, high, refuse = -length, float(sums.mean), math.log(1 / alpha)
    if float(sums_log_e(sums, low, length)) < refuse:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sums_log_e(sums, middle, length)) >= refuse else (low, middle)
    return low


def interval(sums: Sums, alpha: float, length: float) -> tuple[float, float]:
    """(lower, upper), each side missing the mean difference at any time with probability `alpha` at most: 1 - 2 alpha together."""
    return lower_bound(sums, alpha, length), -lower_bound(sums.mirrored(), alpha, length)


# --- counts ------------------------------------------------------------------------------------------------------------


def dirichlet_log_e(counts: Sequence[float], shares: Sequence[float], concentration: float = 100.0) -> float:
    """Log e-value against "each unit falls to arm i with probability shares[i]": a Dirichlet mixture of multinomials.

    Lindon and Malek 2022, "Anytime-valid inference for multinomial count data", Theorem 1. `concentration`: how near the null the
    mixture looks, in units; any value is valid, a larger one finds small mismatches sooner and large ones later. Raises ValueError for
    shares that are not positive or not 1 in all.
    """
    if len(counts) != len(shares) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"one positive share per count, 1 in all: got {tuple(shares)} for {len(counts)} counts")
    n = sum(counts)
    found = math.lgamma(concentration) - math.lgamma(concentration + n)
    for count, share in zip(counts, shares, strict=True):
        found += math.lgamma(concentration * share + count) - math.lgamma(concentration * share) - count * math.log(share)
    return found


# --- quantiles --------------------------------------------------------------------------------------------------------

_STEP = 1.02
_LOWEST_MS = 0.05


def edge_ms(index: int) -> float:
    """The upper edge of bin `index` in milliseconds: bins grow by 2 %."""
    return float(_LOWEST_MS * _STEP**index)


@dataclass(frozen=True)
class Sketch:
    """Latencies counted in bins that grow by 2 %: (edge_ms(i - 1), edge_ms(i)] is bin i, 0 holds all below. They add up exactly."""

    counts: Mapping[int, int]

    @classmethod
    def of(cls, latencies_ms: Sequence[float] | Floats) -> "Sketch":
        """Raises ValueError for a latency that is negative or no number; infinity (no answer at all) goes to the last bin."""
        x = np.asarray(latencies_ms, dtype=np.float64)
        if np.isnan(x).any() or (x < 0).any():
            raise ValueError("a latency is a number of milliseconds, not negative")
        bins = np.ceil(np.log(np.clip(x, _LOWEST_MS, 1e9) / _LOWEST_MS) / math.log(_STEP) - 1e-9).astype(int)
        index, count = np.unique(bins, return_counts=True)
        return cls(dict(zip(index.tolist(), count.tolist(), strict=True)))

    def __add__(self, other: "Sketch") -> "Sketch":
        return Sketch({i: self.counts.get(i, 0) + other.counts.get(i, 0) for i in sorted({*self.counts, *other.counts})})

    @property
    def n(self) -> int:
        return sum(self.counts.values())

    @staticmethod
    def bin_of(latency_ms: float) -> int:
        """The bin of one latency."""
        return math.ceil(math.log(max(latency_ms, _LOWEST_MS) / _LOWEST_MS) / math.log(_STEP) - 1e-9)

    def above(self, index: int) -> int:
        """How many are longer than `edge_ms(index)`."""
        return sum(count for i, count in self.counts.items() if i > index)

    def quantile(self, q: float) -> int:
        """The first bin that has at least the share `q` at or below its upper edge. Raises ValueError where it is empty."""
        if not self.n:
            raise ValueError("no latency, no quantile")
        below = 0
        for i in sorted(self.counts):
            below += self.counts[i]
            if below >= q * self.n:
                break
        return i
