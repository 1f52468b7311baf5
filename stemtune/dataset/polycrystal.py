"""A made-up polycrystal: where its grains lie in a scan, how their lattices are turned, who touches whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune.crystal import rotations
from stemtune.crystal.sampling import random_orientations
from stemtune.errors import UserError

VACUUM = -1  # grain number of scan positions beside the specimen
GRAIN_SPREAD_DEG = 0.5  # lattice rotation inside a grain, from its middle to its edge, in degrees


def grain_map(
    shape: tuple[int, int], grains: int, generator: torch.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the grain number of each position (rows, columns), `VACUUM` outside, and the grains' seeds (grains, 2).

    The particle is a rounded rectangle that leaves a margin of about a tenth. The seeds keep apart: each is the one
    of ten random positions that is farthest from those before it.
    """
    rows, columns = shape
    if grains < 1 or rows < 8 or columns < 8:
        raise UserError(f"a scan of {rows} x {columns} with {grains} grains is asked for; give at least 8 x 8 and 1")
    place = np.moveaxis(np.indices(shape), 0, -1).astype(float)
    reduced = np.abs((2 * place + 1) / np.array(shape) - 1)
    inside = (reduced**6).sum(-1) ** (1 / 6) < 0.9
    candidates = place[inside]
    if grains > len(candidates) // 4:
        raise UserError(f"{grains} grains do not fit into a scan of {rows} x {columns}; give fewer, or a larger scan")
    seeds = np.empty((0, 2))
    while len(seeds) < grains:
        tried = candidates[torch.randint(len(candidates), (10,), generator=generator).numpy()]
        nearest = np.linalg.norm(tried[:, None] - seeds, axis=2).min(axis=1, initial=np.inf)
        if nearest.max() > 0:
            seeds = np.concatenate((seeds, tried[[nearest.argmax()]]))
    grain = np.full(shape, VACUUM, dtype=np.int64)
    distance = np.linalg.norm(candidates[:, None] - seeds, axis=2)
    grain[inside] = distance.argmin(axis=1)
    return grain, seeds


@dataclass(frozen=True)
class Lattices:
    """How the lattice of each of G grains is turned.

    `seeds` (G, 2) are the scan positions of the grains' middles, `orientation` (G, 4) the orientations there,
    lab-to-crystal, `gradient` (G, 2, 3) the directions in which the lattices turn with the distance along rows and
    columns, and `reach` (G,) the distances from the middle to the farthest position of the grain.
    """

    seeds: npt.NDArray[np.float64]
    orientation: Tensor
    gradient: Tensor
    reach: npt.NDArray[np.float64]

    @classmethod
    def draw(cls, grain: npt.NDArray[np.int64], seeds: npt.NDArray[np.float64], generator: torch.Generator) -> Lattices:
        """Draw random lattices for the grains of a `grain_map`."""
        count = len(seeds)
        orientation = random_orientations(count, generator)
        gradient = torch.randn(count, 2, 3, dtype=torch.float64, generator=generator)
        gradient /= torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
        place, flat = _places(grain.shape), grain.reshape(-1)
        reach = [np.linalg.norm((place - seeds[k])[flat == k], axis=1).max(initial=1.0) for k in range(count)]
        return cls(seeds, orientation, gradient, np.array(reach))

    def over(self, grain: npt.NDArray[np.int64]) -> Tensor:
        """Return the orientation (positions, 4) of grain number `grain` (rows, columns) at each scan position.

        The lattice turns slightly with the distance to the middle of the grain. NaN where `grain` is `VACUUM`.
        """
        flat = grain.reshape(-1)
        number = torch.from_numpy(flat)
        offset = torch.from_numpy(_places(grain.shape) - self.seeds[flat])
        turn = torch.einsum("ni,nij->nj", offset / torch.from_numpy(self.reach[flat])[:, None], self.gradient[number])
        bend = rotations.from_axis_angle_deg(turn, GRAIN_SPREAD_DEG * torch.linalg.vector_norm(turn, dim=1))
        orientation = rotations.normalise(rotations.multiply(self.orientation[number], bend))
        return torch.where((number == VACUUM)[:, None], torch.nan, orientation)


def _places(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.indices(shape).reshape(2, -1).T


def neighbours(grain: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return up to two other grains (2, rows, columns) that touch each position, `VACUUM` where there is none."""
    padded = np.pad(grain, 1, constant_values=VACUUM)
    found = np.full((2, *grain.shape), VACUUM, dtype=np.int64)
    for down, right in ((0, 1), (1, 0), (1, 2), (2, 1)):
        beside = padded[down : down + grain.shape[0], right : right + grain.shape[1]]
        other = (grain != VACUUM) & (beside != VACUUM) & (beside != grain)
        first = other & (found[0] == VACUUM)
        found[1] = np.where(other & ~first & (found[1] == VACUUM) & (beside != found[0]), beside, found[1])
        found[0] = np.where(first, beside, found[0])
    return found
