"""Points onto rows and columns, whatever order, decimals and gaps they come with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemtune.crystal_map.grid import GridHeader, grid_of
from stemtune.errors import UserError


def coordinates(rows: int, columns: int, dy: float, dx: float) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.divmod(np.arange(rows * columns), columns)
    return column * dx, row * dy


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 5), st.booleans()
)
def test_any_order_and_any_steps(rows: int, columns: int, dy: float, dx: float, seed: int, corner: bool) -> None:
    x, y = coordinates(rows, columns, dy, dx)
    order = np.random.default_rng(seed).permutation(rows * columns)
    grid = grid_of(x[order] + 7 * dx * corner, y[order] - 3 * dy * corner, GridHeader(), "it")
    assert grid.shape == (rows, columns)
    np.testing.assert_array_equal(grid.pixel, order)
    if rows > 1 and columns > 1:
        assert grid.steps == pytest.approx((dy, dx), rel=1e-6)
    assert grid.notes == []


@pytest.mark.parametrize("first_shifted", [False, True])
@pytest.mark.parametrize("shorter", [False, True])
def test_hexagonal(first_shifted: bool, shorter: bool) -> None:
    x, y, place = [], [], []
    for row in range(6):
        shifted = (row % 2 == 1) != first_shifted
        for column in range(5 - (shifted and shorter)):
            x.append(2.0 * (column + 0.5 * shifted))
            y.append(np.sqrt(3) * row)
            place.append(row * 5 + column)
    grid = grid_of(np.array(x), np.array(y), GridHeader(), "it")
    assert grid.shape == (6, 5)
    np.testing.assert_array_equal(grid.pixel, place)
    assert grid.steps == pytest.approx((np.sqrt(3), 2.0))
    assert len(grid.notes) == 1 and "hexagonal" in grid.notes[0]


def test_holes_are_kept_and_said() -> None:
    x, y = coordinates(6, 5, 1.0, 1.0)
    kept = np.delete(np.arange(30), [7, 8, 21])
    grid = grid_of(x[kept], y[kept], GridHeader(6, 5, 30, (1.0, 1.0)), "it")
    np.testing.assert_array_equal(grid.pixel, kept)
    assert any("3 of its 6 x 5" in note for note in grid.notes)


@pytest.mark.parametrize("header", [GridHeader(6, 5, 30), GridHeader()])
@pytest.mark.parametrize("points", [28, 26])
def test_cut_off(header: GridHeader, points: int) -> None:
    x, y = coordinates(6, 5, 1.0, 1.0)
    with pytest.raises(UserError, match="cut off"):
        grid_of(x[:points], y[:points], header, "it")


def test_no_grid() -> None:
    x, y = np.random.default_rng(1).uniform(0, 10, (2, 50))
    with pytest.raises(UserError, match="no grid"):
        grid_of(x, y, GridHeader(), "it")
    with pytest.raises(UserError, match="several at one place"):
        grid_of(np.zeros(4), np.zeros(4), GridHeader(), "it")
    with pytest.raises(UserError, match="without coordinates"):
        grid_of(np.array([0, np.nan]), np.zeros(2), GridHeader(), "it")
