"""Minima of slices of an array, each in constant time.

Belongs here: a sparse table (Bender and Farach-Colton 2000, "The LCA Problem Revisited", section 3), which covers a slice
by two overlapping blocks whose length is a power of two. Does not belong here: which slices there are (`slices`).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def minima(values: Floats, begins: Integers, ends: Integers) -> Floats:
    """The smallest of `values[begins[i]:ends[i]]` for each i; NaN over no values.

    Holds one level of the table at a time: memory grows with the values and the slices, not with their lengths.
    """
    lengths = ends - begins
    found = np.full(len(begins), np.nan)
    levels = np.frexp(lengths.astype(np.float64))[1] - 1  # -1 where the slice is empty
    block, width = values, 1
    for level in range(int(levels.max(initial=-1)) + 1):
        here = np.flatnonzero(levels == level)
        found[here] = np.minimum(block[begins[here]], block[ends[here] - width])
        block = np.minimum(block[:-width], block[width:])
        width *= 2
    return found
