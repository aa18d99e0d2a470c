"""The statistics against brute force: every factor multiplied out, every value counted, many simulated canaries."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.deployment import confidence as c

RNG = np.random.default_rng(5)


def multiplied_out(bet: c.Bet, canary, champion, centre: float) -> np.ndarray:
    """The log product over single observations, for each bet of the mixture, as the module's docstring has it."""
    sign = 1.0 if bet.direction == "above" else -1.0
    ours, theirs = centre + bet.margin, centre
    risk = (ours, 1 - theirs) if sign > 0 else (1 - ours, theirs)
    ratio = len(canary) / len(champion)
    most = c._BOLDEST / max(risk[0], risk[1] * ratio)
    found = []
    for size in c._BETS:
        part = min(size, most)
        found.append(
            sum(math.log(1 + sign * part * (x - ours)) for x in canary)
            + sum(math.log(1 - sign * part * ratio * (y - theirs)) for y in champion)
        )
    return np.array(found)


@pytest.mark.parametrize("direction", ["above", "below"])
def test_of_yes_and_no_the_wealth_is_the_product_of_all_factors(direction) -> None:
    bet = c.Bet(direction, 0.02, binary=True)
    canary, champion = RNG.random(40) < 0.3, RNG.random(25) < 0.2
    wealth = c.add_look(c.no_capital(), bet, c.Arm.of(canary), c.Arm.of(champion), 0.2)
    assert wealth == pytest.approx(multiplied_out(bet, canary, champion, 0.2))


@pytest.mark.parametrize("direction", ["above", "below"])
def test_of_other_values_sums_give_at_most_the_product(direction) -> None:
    bet = c.Bet(direction, 0.05)
    canary, champion = RNG.beta(2, 5, 40), RNG.beta(2, 5, 60)
    wealth = c.add_look(c.no_capital(), bet, c.Arm.of(canary), c.Arm.of(champion), 0.3)
    exact = multiplied_out(bet, canary, champion, 0.3)
    assert (wealth <= exact + 1e-9).all()
    assert wealth[:5] == pytest.approx(exact[:5], abs=0.01)  # small bets lose next to nothing


def test_an_arm_without_observations_changes_nothing() -> None:
    wealth = c.add_look(c.no_capital(), c.Bet("above"), c.Arm.of(()), c.Arm.of([0.5]), 0.5)
    assert (wealth == 0).all()


def refused(p_canary, p_champion, looks: int, canaries: int = 2000) -> tuple[float, float]:
    """How often one of many looks refuses "no worse" at 5 %: by the wealth, and by a z-test that is made anew at each look."""
    bet, wealth = c.Bet("above", binary=True), c.no_capital((canaries,))
    betting = peeking = np.zeros(canaries, dtype=bool)
    n = hits = other = np.zeros(canaries)
    for look in range(looks):
        x, y = (RNG.binomial(50, p(look), canaries).astype(float) for p in (p_canary, p_champion))
        wealth = c.add_look(wealth, bet, c.Arm.of_counts(np.full(canaries, 50.0), x), c.Arm.of_counts(np.full(canaries, 50.0), y), 0.1)
        betting = betting | (c.log_e(wealth) >= math.log(20))
        n, hits, other = n + 50, hits + x, other + y
        pooled = (hits + other) / (2 * n)
        peeking = peeking | ((hits - other) / n > 1.645 * np.sqrt(pooled * (1 - pooled) * 2 / n + 1e-12))
    return float(betting.mean()), float(peeking.mean())


def test_looking_at_any_time_wrongs_no_more_than_alpha_and_a_z_test_does() -> None:
    betting, peeking = refused(lambda _: 0.1, lambda _: 0.1, looks=60)
    assert betting <= 0.05
    assert peeking > 0.15


def test_a_drift_common_to_both_arms_is_none_and_a_difference_is_found() -> None:
    def wave(look: int) -> float:
        return 0.05 + 0.4 * abs(math.sin(look / 5))

    assert refused(wave, wave, looks=60)[0] <= 0.05
    assert refused(lambda look: wave(look) + 0.1, wave, looks=60)[0] > 0.95


def test_the_interval_holds_the_difference_at_all_looks_together() -> None:
    missed = 0
    for _ in range(100):
        sums, out = c.NOTHING, False
        for _ in range(15):
            sums = sums + c.differences(c.Arm.of(RNG.beta(2, 3, 30)), c.Arm.of(RNG.beta(2, 4, 70)))
            low, high = c.interval(sums, 0.05, 1.0)
            out |= not low <= 2 / 5 - 2 / 6 <= high
        missed += out
    assert missed <= 15  # at most 10 in the mean


def test_the_differences_of_one_look_have_the_variance_of_random_groups() -> None:
    canary, champion = RNG.random(6), RNG.random(20)
    sums = c.differences(c.Arm.of(canary), c.Arm.of(champion))
    squares = []
    for _ in range(20_000):
        groups = np.array_split(RNG.permutation(champion), 6)
        squares.append(np.sum((RNG.permutation(canary) - [g.mean() for g in groups]) ** 2))
    assert float(sums.mean) == pytest.approx(canary.mean() - champion.mean())
    assert float(sums.squares) == pytest.approx(np.mean(squares), rel=0.02)


def test_before_anything_is_known_the_interval_is_the_whole_range() -> None:
    assert c.interval(c.NOTHING, 0.05, 1.0) == (-1.0, 1.0)


@given(st.lists(st.floats(0.06, 1e6), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_sketch_knows_quantiles_to_two_percent_and_adds_up(latencies, q) -> None:
    sketch = c.Sketch.of(latencies)
    true = sorted(latencies)[math.ceil(q * len(latencies)) - 1]
    assert true <= c.edge_ms(sketch.quantile(q)) * (1 + 1e-9)
    assert c.edge_ms(sketch.quantile(q)) <= true * 1.021
    half = len(latencies) // 2
    assert c.Sketch.of(latencies[:half]) + c.Sketch.of(latencies[half:]) == sketch


def test_what_is_no_latency_is_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        c.Sketch.of([-1.0])
    with pytest.raises(ValueError, match="no quantile"):
        c.Sketch({}).quantile(0.5)
