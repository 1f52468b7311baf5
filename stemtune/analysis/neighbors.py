"""Disorientations between pixels of a map that stand near each other, and between no others.

Grains, boundaries, kernel averages and clean-up all ask how far neighbours are apart. The angles are worked out for
lists of pairs, a part at a time, so that memory stays small whatever the size of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from stemtune._parallel import map_over_threads
from stemtune.crystal.symmetry import Symmetry, closeness
from stemtune.crystal_map.orientation_map import OrientationMap

Angles = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.intp]

SIDES = ((0, 1), (1, 0))
"""Steps (rows, columns) to the neighbours that share an edge with a pixel; each pair once."""

CORNERS = ((1, 1), (1, -1))
"""Steps to those that share a corner only."""

_PART = 1 << 15  # pairs at a time: their scores stay in the processor's cache


def around(radius: int) -> list[tuple[int, int]]:
    """Return the steps to all neighbours in the square of 2 `radius` + 1 pixels edge, each pair once."""
    reach = range(-radius, radius + 1)
    return [(down, right) for down in reach for right in reach if (down, right) > (0, 0)]


def pairs(shape: tuple[int, int], step: tuple[int, int]) -> tuple[Pixels, Pixels]:
    """Return all pixels that have a neighbour at `step`, and that neighbour: flat indices, row by row."""
    rows, columns = shape
    down, right = step
    first = np.arange(rows * columns).reshape(shape)[: max(rows - down, 0), max(0, -right) : columns - max(0, right)]
    flat: Pixels = first.ravel()
    return flat, flat + (down * columns + right)


class Neighbourhood:
    """Answers how far pixels of a map of `shape` rows and columns are apart."""

    def __init__(self, orientation_map: OrientationMap) -> None:
        self.shape = orientation_map.shape
        self.symmetries = [phase.symmetry for phase in orientation_map.phases]
        self.phase = orientation_map.phase
        self._g = torch.from_numpy(np.ascontiguousarray(orientation_map.orientation))
        self._known: dict[tuple[int, int], Angles] = {}

    def apart(self, first: Pixels, second: Pixels) -> Angles:
        """Return the disorientation (m,) in degrees of pairs of pixels, flat indices (m,).

        NaN where one of the two is not indexed, infinity where their phases differ.
        """
        here, there = self.phase[first], self.phase[second]
        if len(self.symmetries) == 1 and bool((here >= 0).all()) and bool((there >= 0).all()):
            return pair_angles(self._g, first, self._g, second, self.symmetries[0])
        angles = np.where((here >= 0) & (there >= 0), np.inf, np.nan).astype(np.float32)
        for index, symmetry in enumerate(self.symmetries):
            own = np.flatnonzero((here == index) & (there == index))
            angles[own] = pair_angles(self._g, first[own], self._g, second[own], symmetry)
        return angles

    def at(self, step: tuple[int, int]) -> Angles:
        """Return the disorientations of all `pairs` at `step`, in their order; worked out once."""
        if step not in self._known:
            self._known[step] = self.apart(*pairs(self.shape, step))
        return self._known[step]


def pair_angles(
    first_g: torch.Tensor, first: Pixels, second_g: torch.Tensor, second: Pixels, symmetry: Symmetry
) -> Angles:
    """Return the disorientations (m,) of `first_g[first]` and `second_g[second]` in degrees, good to 1e-5."""
    found = np.empty(len(first), dtype=np.float32)

    def work(part: slice) -> None:
        one, other = torch.from_numpy(first[part]), torch.from_numpy(second[part])
        cosine = closeness(first_g[one], second_g[other], symmetry)
        found[part] = (2 * cosine.clamp_(max=1.0).acos_()).rad2deg_().numpy()

    in_parts(len(first), work)
    return found


def in_parts(count: int, work: Callable[[slice], None]) -> None:
    """Have `work` done on parts of `count` things, on all cores."""
    map_over_threads(work, list(_parts(count)))


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _PART):
        yield slice(start, min(start + _PART, count))
