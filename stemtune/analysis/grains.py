"""Grains of a map: which pixels belong together, what each grain is like, and how the lattice turns inside it.

Two pixels belong to one grain when a path leads from one to the other on which neighbours differ by less than a
threshold. A patch that is too small to be a grain (a wrong pixel, a spike) counts as a gap, as pixels that are not
indexed do; a grain goes on beyond a gap of a few pixels along a row or a column when both sides agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stemtune.analysis.neighbors import (
    CORNERS,
    SIDES,
    Angles,
    Neighbourhood,
    Pixels,
    around,
    in_parts,
    pair_angles,
    pairs,
)
from stemtune.config import GrainsConfig
from stemtune.crystal.rotations import mean_of_outer, to_euler_deg
from stemtune.crystal.symmetry import Symmetry, nearest_equivalent, reduce_to_fundamental_zone
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError

NO_GRAIN = -1
"""Grain number of pixels that belong to none."""

_ROUNDS = 3
_OUTER = [(i, j) for i in range(4) for j in range(i, 4)]


@dataclass(frozen=True)
class GrainTable:
    """One entry per grain; grain number k is at index k of every column.

    `phase` (k,) index of the grain's phase; `pixels`, `area` in nm² and `diameter` in nm of the disc of that area, px²
    and px where the map's step is not known; `row`, `column` of the centre of mass; `orientation` (k, 4), the mean in
    the fundamental zone, lab-to-crystal; `spread_deg`, the grain orientation spread (GOS), mean disorientation of its
    pixels from that mean; `confidence`, the mean; `at_edge`, whether the edge of the map cuts the grain.
    """

    phase: npt.NDArray[np.int16]
    pixels: npt.NDArray[np.int64]
    area: npt.NDArray[np.float64]
    diameter: npt.NDArray[np.float64]
    row: npt.NDArray[np.float64]
    column: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    spread_deg: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]
    at_edge: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.phase)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return every column, by name, in the order of the class."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def euler_deg(self) -> npt.NDArray[np.float64]:
        """Bunge's Euler angles (k, 3) of the mean orientations, in degrees."""
        angles: npt.NDArray[np.float64] = to_euler_deg(torch.from_numpy(self.orientation)).numpy()
        return angles


@dataclass(frozen=True)
class Grains:
    """The grains of a map of n pixels.

    `number` (n,) grain of each pixel, from 0, in the order in which they appear row by row, -1 for none; `table`, what
    each is like; `kam_deg` (n,) kernel average misorientation, mean disorientation from the neighbours, NaN where there
    is none; `grod_deg` (n,) grain reference orientation deviation, disorientation from the grain's mean, NaN outside of
    grains.
    """

    number: npt.NDArray[np.int32]
    table: GrainTable
    kam_deg: npt.NDArray[np.float32]
    grod_deg: npt.NDArray[np.float32]


def find_grains(
    orientation_map: OrientationMap, settings: GrainsConfig, neighbourhood: Neighbourhood | None = None
) -> Grains:
    """Return the grains of `orientation_map`; `neighbourhood`, of the same map, spares the angles that it knows."""
    near = neighbourhood or Neighbourhood(orientation_map)
    number = segment(near, settings)
    table, grod = _described(orientation_map, number)
    return Grains(number, table, kernel_average(near, settings.kam_radius, settings.kam_limit), grod)


def segment(near: Neighbourhood, settings: GrainsConfig) -> npt.NDArray[np.int32]:
    """Return the grain number (n,) of each pixel; -1 for none."""
    if settings.connectivity not in (4, 8):
        raise UserError(f"`grains.connectivity` is {settings.connectivity}, but must be 4 or 8")
    steps = SIDES + (CORNERS if settings.connectivity == 8 else ())
    joined = [_joined(near, step, settings.threshold) for step in steps]
    usable = near.phase >= 0
    patch = _components(usable, [*joined, *_across(near, usable, settings)])
    count = np.bincount(patch[usable], minlength=len(patch))
    usable = usable & (count[patch] >= settings.min_size)
    # The small patches are gaps from now on. What is left of each large one may be in pieces, as it was before.
    kept = [(first[both], second[both]) for first, second in joined for both in [usable[first] & usable[second]]]
    patch = _components(usable, [*kept, *_across(near, usable, settings)])
    count = np.bincount(patch[usable], minlength=len(patch))
    usable = usable & (count[patch] >= settings.min_size)
    number = np.full(len(usable), NO_GRAIN, dtype=np.int32)
    found, place, inverse = np.unique(patch[usable], return_index=True, return_inverse=True)
    rank = np.empty(len(found), dtype=np.int32)
    rank[np.argsort(place)] = np.arange(len(found))
    number[usable] = rank[inverse]
    return number


def patches(near: Neighbourhood, threshold: float) -> npt.NDArray[np.int32]:
    """Return the patch number (n,) of each pixel: patches are of neighbours, corners too, that agree to `threshold`."""
    joined = [_joined(near, step, threshold) for step in SIDES + CORNERS]
    return _components(near.phase >= 0, joined)


def _joined(near: Neighbourhood, step: tuple[int, int], threshold: float) -> tuple[Pixels, Pixels]:
    first, second = pairs(near.shape, step)
    close = near.at(step) < threshold
    return first[close], second[close]


def _across(
    near: Neighbourhood, usable: npt.NDArray[np.bool_], settings: GrainsConfig
) -> Iterator[tuple[Pixels, Pixels]]:
    """Yield pairs of pixels that agree across a gap of up to `settings.max_gap` pixels along a row or a column."""
    for down, right in SIDES:
        stride = down * near.shape[1] + right
        for width in range(1, settings.max_gap + 1):
            first, second = pairs(near.shape, (down * (width + 1), right * (width + 1)))
            open_ = usable[first] & usable[second]
            for between in range(1, width + 1):
                open_ &= ~usable[first + between * stride]
            first, second = first[open_], second[open_]
            close = near.apart(first, second) < settings.threshold
            yield first[close], second[close]


def _components(usable: npt.NDArray[np.bool_], joined: list[tuple[Pixels, Pixels]]) -> npt.NDArray[np.int32]:
    first, second = (np.concatenate(ends) for ends in zip(*joined, strict=True))
    links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(usable), len(usable)))
    patch: npt.NDArray[np.int32] = connected_components(links, directed=False)[1]
    return patch


def _described(
    orientation_map: OrientationMap, number: npt.NDArray[np.int32]
) -> tuple[GrainTable, npt.NDArray[np.float32]]:
    """Return the table of the grains, and how far each pixel (n,) is from the mean of its grain."""
    inside = np.flatnonzero(number >= 0)
    grain, count = number[inside].astype(np.intp), int(number.max(initial=NO_GRAIN)) + 1
    pixels = np.bincount(grain, minlength=count)
    first = np.full(count, len(number))
    np.minimum.at(first, grain, inside)
    phase = orientation_map.phase[first] if count else np.empty(0, dtype=np.int16)
    mean, apart = np.empty((count, 4)), np.empty(len(inside), dtype=np.float32)
    orientation = torch.from_numpy(orientation_map.orientation[inside])
    for index, known in enumerate(orientation_map.phases):
        own, rows = np.flatnonzero(phase == index), np.flatnonzero(phase[grain] == index)
        place = np.zeros(count, dtype=np.intp)
        place[own] = np.arange(len(own))
        member = place[grain[rows]]
        found = mean_orientations(orientation[rows], member, len(own), known.symmetry)
        mean[own] = found.numpy()
        apart[rows] = pair_angles(found, member, orientation, rows, known.symmetry)

    def average(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.bincount(grain, values, minlength=count) / np.maximum(pixels, 1)

    height, width = orientation_map.shape
    row, column = np.divmod(inside, width)
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    edge = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    area = pixels.astype(np.float64) * (dy * dx)
    grod = np.full(len(number), np.nan, dtype=np.float32)
    grod[inside] = apart
    table = GrainTable(
        phase=phase,
        pixels=pixels,
        area=area,
        diameter=2 * np.sqrt(area / math.pi),
        row=average(row),
        column=average(column),
        orientation=mean,
        spread_deg=average(apart),
        confidence=average(orientation_map.confidence[inside]),
        at_edge=np.bincount(grain, edge, minlength=count) > 0,
    )
    return table, grod


def mean_orientations(g: torch.Tensor, member: Pixels, count: int, symmetry: Symmetry) -> torch.Tensor:
    """Return the mean orientations (count, 4) of the groups `member` (n,) of `g` (n, 4), reduced.

    As `crystal.symmetry.mean_orientation`, for many groups at once: each orientation is replaced by its equivalent
    nearest to a running mean, which starts at the group's first, and the mean is the eigenvector of the sum of outer
    products (F. L. Markley et al., J. Guid. Control Dyn. 30, 2007, 1193).
    """
    first = np.full(count, len(member))
    np.minimum.at(first, member, np.arange(len(member)))
    centre = g[torch.from_numpy(first)]
    outer = np.empty((len(_OUTER), len(member)))
    for _ in range(_ROUNDS):

        def work(part: slice, centre: torch.Tensor = centre) -> None:
            near = nearest_equivalent(g[part], centre[torch.from_numpy(member[part])], symmetry)
            for place, (i, j) in enumerate(_OUTER):
                outer[place, part] = (near[:, i] * near[:, j]).numpy()

        in_parts(len(member), work)
        total = np.empty((count, 4, 4))
        for place, (i, j) in enumerate(_OUTER):
            total[:, i, j] = total[:, j, i] = np.bincount(member, outer[place], minlength=count)
        centre = mean_of_outer(torch.from_numpy(total))
    return reduce_to_fundamental_zone(centre, symmetry)


def kernel_average(near: Neighbourhood, radius: int, limit_deg: float) -> npt.NDArray[np.float32]:
    """Return the mean disorientation (n,) of each pixel from its neighbours, of those below `limit_deg`.

    Neighbours are all pixels in a square of 2 `radius` + 1 pixels edge; NaN where none is indexed and near enough.
    """
    count = near.shape[0] * near.shape[1]
    total, number = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    for step in around(radius):
        first, second = pairs(near.shape, step)
        angle: Angles = near.at(step)
        counts = (angle < limit_deg).astype(np.float32)
        angle = np.where(counts > 0, angle, 0)
        for end in (first, second):  # each pixel is at most once at either end
            total[end] += angle
            number[end] += counts
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / number, np.nan).astype(np.float32)
