"""Pole figures: where the normals of a family of lattice planes point in the lab, and how often.

Projection: Lambert's, equal in area, of the hemisphere towards the electron source, x to the right and y up. Density in
multiples of a random distribution, so that 1 is no texture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import inverse, normalise, rotate

HALF_WIDTH_DEG = 6.0
"""Angle from a pole at which it counts half: how far the density is smoothed."""

_CELLS = 61  # across the disc; the centres of cells are at most 3 degrees apart
_MOST = 20_000  # pixels that are looked at
_HEXAGONAL = ((0, 0, 1), (1, 0, 0), (1, 1, 0))
_FAMILIES = {
    **dict.fromkeys(("-3", "-3m", "6/m", "6/mmm"), _HEXAGONAL),
    **dict.fromkeys(("m-3", "m-3m"), ((1, 0, 0), (1, 1, 0), (1, 1, 1))),
    **dict.fromkeys(("4/m", "4/mmm"), ((0, 0, 1), (1, 0, 0), (1, 1, 0))),
    **dict.fromkeys(("-1", "2/m", "mmm"), ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
}


class PoleFigure(NamedTuple):
    """The density (k, k) of one family of poles, row 0 at the lowest y; NaN outside of the disc."""

    indices: tuple[int, ...]
    density: npt.NDArray[np.float64]


def pole_figures(orientation: npt.NDArray[np.float64], phase: Phase) -> list[PoleFigure]:
    """Return the pole figures of three low-index families of `phase` from orientations (n, 4), lab-to-crystal.

    Of many, evenly chosen ones are looked at. Indices of hexagonal and trigonal phases are given as (h k i l).
    """
    chosen = orientation[:: max(1, -(-len(orientation) // _MOST))]
    four = _FAMILIES[phase.symmetry.laue] is _HEXAGONAL
    return [
        PoleFigure((hkl[0], hkl[1], -hkl[0] - hkl[1], hkl[2]) if four else hkl, density(poles(chosen, phase, hkl)))
        for hkl in _FAMILIES[phase.symmetry.laue]
    ]


def poles(orientation: npt.NDArray[np.float64], phase: Phase, hkl: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return the unit normals (n m, 3), in the lab, of all planes equivalent to `hkl` for each orientation (n, 4)."""
    normal = normalise(torch.tensor(hkl, dtype=torch.float64) @ phase.reciprocal_matrix.double())
    family = rotate(phase.symmetry.operations, normal)
    g = torch.from_numpy(np.ascontiguousarray(orientation))
    lab: npt.NDArray[np.float64] = rotate(inverse(g)[:, None], family).reshape(-1, 3).numpy()
    return lab


def lambert(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return where directions (n, 3), or their opposites, lie on the disc of radius 1: (n, 2)."""
    up = np.where(vectors[:, 2:] < 0, -vectors, vectors)
    disc: npt.NDArray[np.float64] = up[:, :2] / np.sqrt(1 + up[:, 2:])
    return disc


def on_sphere(disc: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the directions (n, 3) of the upper hemisphere at places (n, 2) of the disc; inverse of `lambert`."""
    square = (disc**2).sum(axis=1, keepdims=True)
    return np.concatenate((disc * np.sqrt(np.clip(2 - square, 0, None)), 1 - square), axis=1)


def density(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the density (k, k) of axes (n, 3) in multiples of a random distribution, NaN outside of the disc."""
    centre = (np.arange(_CELLS) + 0.5) * 2 / _CELLS - 1
    x, y = (grid.ravel() for grid in np.meshgrid(centre, centre))
    inside = np.hypot(x, y) <= 1
    places = np.clip(((lambert(vectors) + 1) / 2 * _CELLS).astype(int), 0, _CELLS - 1)
    counts = np.bincount(places[:, 1] * _CELLS + places[:, 0], minlength=_CELLS**2).astype(np.float64)
    cells = on_sphere(np.column_stack((x, y))[inside])
    # Cells that the rim cuts hold poles, but their middle may be outside: these go to the nearest cell inside.
    outer = np.flatnonzero(~inside & (counts > 0))
    nearest = ((x[outer, None] - x[inside]) ** 2 + (y[outer, None] - y[inside]) ** 2).argmin(axis=1)
    weight = counts[inside] + np.bincount(nearest, counts[outer], minlength=int(inside.sum()))
    sharpness = np.log(2) / (1 - np.cos(np.deg2rad(HALF_WIDTH_DEG)))
    kernel = np.exp(sharpness * (np.abs(cells @ cells.T) - 1))
    smooth = kernel @ weight / kernel.sum(axis=1)
    result: Any = np.full(_CELLS**2, np.nan)
    result[inside] = smooth / max(float(smooth.mean()), 1e-300)
    return np.asarray(result.reshape(_CELLS, _CELLS))
