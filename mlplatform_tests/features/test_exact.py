"""Exact sums against fractions and `math.fsum`, which is correctly rounded too."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlplatform.features import exact

TINY, HUGE = math.ulp(0.0), sys.float_info.max
finite = st.floats(allow_nan=False, allow_infinity=False)
# Values whose sums cancel, tie and meet at the ends of the range.
edges = st.sampled_from([0.0, -0.0, TINY, -TINY, sys.float_info.min, HUGE, -HUGE, 1.0, -1.0, 2.0**53, 2.0**-53, 2.0**-52, 1 + 2.0**-52])
narrow = st.integers(-(2**20), 2**20).map(lambda k: k / 1024)
powers = st.builds(lambda sign, e: sign * 2.0**e, st.sampled_from([-1, 1]), st.integers(-1074, 1023))
lists = st.one_of(*(st.lists(kind, min_size=1, max_size=30) for kind in (finite, edges, narrow, powers, edges | finite | powers)))


def nearest(values: list[float]) -> float:
    """The float nearest to the exact sum: Python divides whole numbers with one rounding, ties to even."""
    whole = sum(map(Fraction, values), Fraction(0))
    try:
        return whole.numerator / whole.denominator
    except OverflowError:
        return math.inf if whole > 0 else -math.inf


def total(values: NDArray[np.float64]) -> float:
    return float(exact.prefix_sums(values).between(np.array([0]), np.array([len(values)]))[0])


def slices(values: list[float]) -> tuple[list[int], list[int]]:
    """The begins and ends of every slice, the empty ones too."""
    pairs = [(i, j) for i in range(len(values) + 1) for j in range(i, len(values) + 1)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def bits(values: object) -> list[int]:
    return np.asarray(values, dtype=np.float64).view(np.uint64).tolist()


@settings(max_examples=400)
@given(lists)
def test_every_slice_is_the_float_nearest_to_its_exact_sum(values: list[float]) -> None:
    begins, ends = slices(values)
    got = exact.prefix_sums(np.array(values)).between(np.array(begins), np.array(ends))
    expected = [nearest(values[i:j]) for i, j in zip(begins, ends, strict=True)]
    assert bits(got) == bits(expected)


@given(st.lists(finite, min_size=1, max_size=40))
def test_the_total_is_the_one_of_fsum(values: list[float]) -> None:
    try:
        expected = math.fsum(values)
    except OverflowError:  # fsum gives up where a partial sum overflows, even if the sum itself does not
        expected = nearest(values)
    assert bits(total(np.array(values))) == bits(expected + 0.0)


@given(lists, st.randoms(use_true_random=False), st.integers(0, 30))
def test_neither_order_nor_grouping_nor_start_matters(values: list[float], rnd: object, begin: int) -> None:
    shuffled = rnd.sample(values, len(values))  # type: ignore[attr-defined]
    assert bits(total(np.array(values))) == bits(total(np.array(shuffled)))
    begin = min(begin, len(values))
    whole, end = exact.prefix_sums(np.array(values)), np.array([len(values)])
    part = exact.prefix_sums(np.array(values[begin:]))
    assert bits(whole.between(np.array([begin]), end)) == bits(part.between(np.array([0]), end - begin))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([-0.0, -0.0], 0.0),
        ([TINY, -TINY], 0.0),
        ([1e308, 1e308, -1e308], 1e308),
        ([HUGE, HUGE], math.inf),
        ([-HUGE, -HUGE], -math.inf),
        ([HUGE, TINY, -HUGE], TINY),
        ([2.0**53, 1.0], 2.0**53),  # a tie goes to the even neighbour …
        ([2.0**53, 1.0, 2.0], 2.0**53 + 4),
        ([2.0**53, 1.0, TINY], 2.0**53 + 2),  # … and the least bit more breaks it
        ([2.0**53, 1.0, -TINY], 2.0**53),
        ([-(2.0**53), -1.0, -TINY], -(2.0**53) - 2),
        ([0.1] * 10, 1.0),
    ],
)
def test_edges_of_rounding(values: list[float], expected: float) -> None:
    assert bits(total(np.array(values, dtype=np.float64))) == bits(expected)


def test_many_values_of_one_size_stay_in_one_word_and_mixed_sizes_do_not() -> None:
    minutes = np.arange(-30_000, 300_000) / 4
    assert len(exact.prefix_sums(minutes).limbs) == 1
    thirds = np.random.default_rng(1).normal(size=20_000) / 3
    assert len(exact.prefix_sums(thirds).limbs) > 1
    assert total(thirds) == math.fsum(thirds)
