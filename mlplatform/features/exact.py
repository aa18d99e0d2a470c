"""Exact sums of floats: the float64 nearest to the mathematically exact sum, whatever the order, grouping or start of the read.

Belongs here: the arithmetic, on NumPy arrays. Does not belong here: frames, windows, what a missing value means.

Every float64 is a whole number times a power of two. The values at hand are written as whole multiples of one such power,
in one int64 where every sum provably fits, else in limbs of 32 bits. Prefix sums of whole numbers are exact, so the sum of
a slice is the difference of two of them, and the only rounding is the last one: to the nearest float64, ties to even, ±inf
beyond the largest (as IEEE 754 rounds). The idea of one wide fixed-point number is Kulisch's long accumulator (Kulisch and
Miranker 1981, "Computer Arithmetic in Theory and Practice"); here it is only as wide as the values need.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_LIMB = 32
_MASK = (1 << _LIMB) - 1
_MANTISSA = 53
# A sum of at most this size, in multiples of the common power of two, is kept in one int64; half of what would fit, because
# the bound is itself a rounded sum.
_ONE_WORD = 2.0**62


@dataclass(frozen=True)
class PrefixSums:
    """Sums of the first 0, 1, … n values: `limbs[j, k]` counts multiples of `2**(exponent + 32 j)`. Made by `prefix_sums`."""

    limbs: Integers
    exponent: int

    def between(self, begins: Integers, ends: Integers) -> Floats:
        """The rounded exact sum of the values `begins[i] … ends[i] - 1` for each i; 0.0 (never -0.0) over no values."""
        if len(self.limbs) == 1:
            return _scaled((self.limbs[0, ends] - self.limbs[0, begins]).astype(np.float64), self.exponent)
        return _rounded(self.limbs[:, ends] - self.limbs[:, begins], self.exponent)


def prefix_sums(values: Floats) -> PrefixSums:
    """Prefix sums of finite values (fewer than 2**30 of them)."""
    numbers, exponents = _integers(values)
    nonzero = numbers != 0
    exponent = int(exponents[nonzero].min()) if nonzero.any() else 0
    shifts = np.where(nonzero, exponents - exponent, 0)
    with np.errstate(over="ignore"):
        if np.ldexp(np.abs(numbers).astype(np.float64), shifts).sum() <= _ONE_WORD:
            return PrefixSums(_accumulated((numbers << shifts)[np.newaxis]), exponent)
    return PrefixSums(_accumulated(_limbs(numbers, shifts)), exponent)


def _integers(values: Floats) -> tuple[Integers, Integers]:
    """Odd numbers (or 0) and exponents with `values == numbers * 2**exponents`."""
    fractions, exponents = np.frexp(values)
    numbers = np.ldexp(fractions, _MANTISSA).astype(np.int64)
    # The lowest set bit, a power of two, tells how many zeros the number ends in.
    zeros = np.frexp((numbers & -numbers).astype(np.float64))[1].astype(np.int64) - 1
    zeros = np.where(numbers == 0, 0, zeros)
    return numbers >> zeros, exponents.astype(np.int64) - _MANTISSA + zeros


def _limbs(numbers: Integers, shifts: Integers) -> Integers:
    """`numbers << shifts` in signed limbs of 32 bits, lowest first: shape (limbs, values)."""
    first, offset = shifts // _LIMB, shifts % _LIMB
    sign, size = np.sign(numbers), np.abs(numbers)
    low, high = (size & _MASK) << offset, (size >> _LIMB) << offset  # below 2**63 and 2**52
    limbs = np.zeros((int(first.max()) + 3, len(numbers)), np.int64)
    at = np.arange(len(numbers))
    limbs[first, at] = sign * (low & _MASK)
    limbs[first + 1, at] = sign * ((low >> _LIMB) + (high & _MASK))
    limbs[first + 2, at] = sign * (high >> _LIMB)
    return limbs


def _accumulated(limbs: Integers) -> Integers:
    sums = np.zeros((limbs.shape[0], limbs.shape[1] + 1), np.int64)
    np.cumsum(limbs, axis=1, out=sums[:, 1:])
    return sums


def _rounded(limbs: Integers, exponent: int) -> Floats:
    """The float64 nearest to `sum(limbs[j] * 2**(exponent + 32 j))` in each column."""
    digits = _carried(limbs)
    negative = digits[-1] < 0
    digits[:, negative] = _carried(-digits[:, negative])[:-1]
    at = np.arange(digits.shape[1])
    nonzero = digits != 0
    top = len(digits) - 1 - np.argmax(nonzero[::-1], axis=0)
    first, second, third = (np.where(top >= k, digits[np.maximum(top - k, 0), at], 0) for k in range(3))
    # Only the last addition rounds: both its terms are exact. Of the digits below the third it is enough to know whether
    # one is not zero, in a bit of its own: it decides what would otherwise be a tie.
    sticky = (top >= 3) & (np.cumsum(nonzero, axis=0)[np.maximum(top - 3, 0), at] > 0)
    head = first << 21 | second >> 11
    tail = ((second & 0x7FF) << _LIMB | third) << 1 | sticky
    size = head.astype(np.float64) * 2.0**44 + tail.astype(np.float64)
    return _scaled(np.where(negative, -size, size), exponent + _LIMB * (top - 2) - 1)


def _carried(limbs: Integers) -> Integers:
    """The same number with every limb but the last in [0, 2**32); the last carries the sign."""
    digits = np.empty((len(limbs) + 1, limbs.shape[1]), np.int64)
    carry = np.zeros(limbs.shape[1], np.int64)
    for j, limb in enumerate(limbs):
        carry = carry + limb
        digits[j] = carry & _MASK
        carry >>= _LIMB
    digits[-1] = carry
    return digits


def _scaled(values: Floats, exponents: Integers | int) -> Floats:
    """`values * 2**exponents`; beyond the largest float ±inf."""
    with np.errstate(over="ignore"):
        return np.ldexp(values, exponents)
