"""Exact sums: float64 values of a column as Python integers at one power-of-two scale.

Belongs here: the conversion there and back. Does not belong here: what is summed (`stream_entity`).

A float64 is an integer times a power of two, so with a common scale 2**bits every sum is an integer, whatever the order
of additions and subtractions; dividing it by 2**bits gives the float64 next to the mathematically exact sum, because
Python's division of integers rounds correctly. The scale grows with the data: 0 bits while all values are whole numbers, at most
1,088 (the smallest float64 is 2**-1074).
"""

import math

import numpy as np
import polars as pl

from mlplatform.features.plan import FeatureError

STEP = 64  # bits the scale grows by at a time, so that it seldom grows
_MANTISSA = 53


def bits_needed(values: pl.Series) -> int:
    """The bits, a multiple of STEP, at which every value is a whole number. Nulls count as nothing.

    Raises FeatureError for an infinite value: no sum with it is a number.
    """
    known = values.drop_nulls().to_numpy()
    if not np.isfinite(known).all():
        raise FeatureError(f"column {values.name} has an infinite value: it cannot be aggregated")
    if (known == np.rint(known)).all():
        return 0
    mantissas, exponents = _parts(known[known != 0])
    lowest = mantissas & -mantissas  # the lowest bit set
    fraction = -(exponents + np.frexp(lowest.astype(np.float64))[1] - 1)
    return -(-int(fraction.max()) // STEP) * STEP


def to_integers(values: pl.Series, bits: int) -> list[int | None]:
    """The values times 2**bits, exactly; null stays None. `bits` must be at least `bits_needed`."""
    numbers = values.to_numpy()
    known = ~np.isnan(numbers)
    numbers = np.where(known, numbers, 0.0)
    if bits == 0 and (np.abs(numbers) < 2.0**_MANTISSA).all():
        integers = numbers.astype(np.int64).tolist()
    else:
        mantissas, exponents = _parts(numbers)
        shifts = (exponents + bits).tolist()
        integers = [m << s if s >= 0 else m >> -s for m, s in zip(mantissas.tolist(), shifts, strict=True)]
    if known.all():
        return list(integers)
    return [i if k else None for i, k in zip(integers, known.tolist(), strict=True)]


def to_float(integer: int, one: int) -> float:
    """The float64 nearest to integer / one, `one` being 2**bits; infinite where it is beyond the largest float64."""
    try:
        return integer / one
    except OverflowError:
        return math.copysign(math.inf, integer)


def _parts(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers m and exponents e with number = m * 2**e."""
    fractions, exponents = np.frexp(numbers)
    return np.ldexp(fractions, _MANTISSA).astype(np.int64), exponents.astype(np.int64) - _MANTISSA
