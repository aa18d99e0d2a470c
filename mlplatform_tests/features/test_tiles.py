"""The arithmetic of tiles against sums over slices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.features import tiles


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=70),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_a_window_of_n_tiles_sums_the_last_n_tiles(values: list[int], spans: list[int]) -> None:
    grid = np.array([values], dtype=np.float64)
    merged = tiles.windows(grid, spans, np.add, 0.0)
    for span in spans:
        expected = [sum(values[max(0, k - span + 1) : k + 1]) for k in range(len(values))]
        assert merged[span][0].tolist() == expected


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=60), st.integers(1, 30), st.data())
def test_the_bits_of_a_window_do_not_depend_on_where_the_grid_begins(values: list[float], span: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(values) - 1))
    whole = tiles.windows(np.array([values]), [span], np.add, 0.0)[span][0]
    part = tiles.windows(np.array([values[begin:]]), [span], np.add, 0.0)[span][0]
    reachable = slice(min(span - 1, len(part)), None)
    assert part[reachable].tobytes() == whole[begin:][reachable].tobytes()


def test_cells_without_events_are_zero_for_sums_and_infinite_for_extremes() -> None:
    cells, values = np.array([1, 1, 4]), np.array([2.0, -3.0, 7.0])
    assert tiles.sum_tiles(cells, values, (2, 3)).tolist() == [[0, -1, 0], [0, 7, 0]]
    assert tiles.extreme_tiles(cells, values, (2, 3), smallest=True).tolist() == [[np.inf, -3, np.inf], [np.inf, 7, np.inf]]
    assert tiles.extreme_tiles(cells, values, (2, 3), smallest=False).tolist() == [[-np.inf, 2, -np.inf], [-np.inf, 7, -np.inf]]


def test_no_events_at_all_still_give_a_grid_of_floats() -> None:
    grid = tiles.sum_tiles(np.array([], dtype=np.int64), np.array([]), (1, 4))
    assert grid.dtype == np.float64
    assert grid.tolist() == [[0, 0, 0, 0]]
