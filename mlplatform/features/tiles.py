"""Tiles: partial aggregates per entity and hop, merged into windows.

Belongs here: the arithmetic on NumPy grids of shape (entities, tiles). Does not belong here: frames, plans, time zones.

Tile k holds the events of `((k-1)·hop, k·hop]`, so a window `(T-w, T]` whose T and w are multiples of the hop is exactly
w/hop tiles. Windows are merged by doubling (blocks of 1, 2, 4 … tiles, each ending at its position): the order of the
additions depends on the window alone, never on where the grid begins, so a year's backfill and a single tick give the
same bits, and nothing is ever subtracted. The idea of tiled aggregation is Chronon's and Tecton's
(https://chronon.ai/Tiled_Architecture.html).
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Combine = Callable[[Floats, Floats], Floats]


def sum_tiles(cells: NDArray[np.int64], values: Floats, shape: tuple[int, int]) -> Floats:
    """Sum of `values` per cell (flat index into `shape`), added in the order given; 0 where there are none."""
    # Without values bincount would give integers.
    return np.bincount(cells, weights=values, minlength=shape[0] * shape[1]).astype(np.float64, copy=False).reshape(shape)


def extreme_tiles(cells: NDArray[np.int64], values: Floats, shape: tuple[int, int], *, smallest: bool) -> Floats:
    """Minimum (or maximum) of `values` per cell; +inf (-inf) where there are none."""
    grid = np.full(shape[0] * shape[1], np.inf if smallest else -np.inf)
    (np.minimum if smallest else np.maximum).at(grid, cells, values)
    return grid.reshape(shape)


def windows(tiles: Floats, spans: Iterable[int], combine: Combine, identity: float) -> dict[int, Floats]:
    """For each span n, a grid whose column k combines the tiles k-n+1 … k. Tiles before the grid count as `identity`.

    Costs about 2·log2(n) passes over the grid for all spans together.
    """
    wanted = sorted(set(spans))
    merged: dict[int, Floats] = {}
    taken = dict.fromkeys(wanted, 0)
    block, width = tiles, 1
    while width <= wanted[-1]:
        for span in wanted:
            if span & width:
                piece = _delayed(block, taken[span], identity)
                merged[span] = combine(piece, merged[span]) if span in merged else piece
                taken[span] += width
        if 2 * width <= wanted[-1]:
            block = combine(_delayed(block, width, identity), block)
        width *= 2
    return merged


def _delayed(grid: Floats, tiles: int, identity: float) -> Floats:
    """The grid moved `tiles` columns to the right."""
    if tiles == 0:
        return grid
    moved = np.full_like(grid, identity)
    moved[:, tiles:] = grid[:, :-tiles]
    return moved
