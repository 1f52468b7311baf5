"""Orientations to draw from: uniformly at random, or on a grid of beam directions and in-plane angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stemtune.crystal import rotations
from stemtune.crystal.symmetry import Symmetry

# Fundamental sector of each proper group: first azimuth, width in azimuth, largest polar angle (degrees). Those of the
# cubic groups are cut from the sector of a subgroup.
_SECTORS: dict[str, tuple[float, float, float]] = {
    "1": (0, 360, 180),
    "2": (0, 180, 180),
    "121": (0, 360, 90),
    "211": (0, 360, 90),
    "222": (0, 180, 90),
    "4": (0, 90, 180),
    "422": (0, 90, 90),
    "3": (0, 120, 180),
    "32": (0, 120, 90),
    "312": (-30, 120, 90),
    "6": (0, 60, 180),
    "622": (0, 60, 90),
    "23": (-90, 180, 90),
    "432": (0, 90, 90),
}


def random_orientations(n: int, generator: torch.Generator | int | None = None) -> Tensor:
    """Return `n` orientations (n, 4), float64, uniform over all rotations; a number as generator seeds a new one."""
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    device = generator.device if generator is not None else None
    drawn = torch.randn(n, 4, dtype=torch.float64, generator=generator, device=device)
    return rotations.normalise(drawn)


def beam_directions(step_deg: float, symmetry: Symmetry) -> Tensor:
    """Return crystal directions (D, 3), unit vectors, that a beam can have, one from each set of equivalents.

    The proper group counts, not the Laue group: a direction and its mirror image give different (mirrored) patterns.
    The directions stand on rings a step apart in the fundamental sector of orix, with an equal number of degrees
    between neighbours on a ring, so that each stands for about `step_deg` squared, D is about 41253 / (step_deg² ·
    order), and no direction is further than about 0.8 steps from one of them or its equivalents; 32 gives 1719
    directions at 2 degrees.
    """
    start, width, height = _SECTORS[symmetry.proper]
    rings = max(1, round(height / step_deg))
    found = []
    for ring in range(rings):
        polar = math.radians((ring + 0.5) * height / rings)
        count = max(1, round(width * math.sin(polar) / step_deg))
        turn = torch.arange(count, dtype=torch.float64) + (0.25 if ring % 2 else 0.75)
        azimuth = torch.deg2rad(start + turn * width / count)
        level = torch.full_like(azimuth, math.cos(polar))
        found.append(torch.stack((math.sin(polar) * azimuth.cos(), math.sin(polar) * azimuth.sin(), level), dim=-1))
    directions = torch.cat(found)
    x, y, z = directions.unbind(-1)
    if symmetry.proper == "432":
        return directions[z >= torch.maximum(x, y)]
    if symmetry.proper == "23":
        return directions[y.abs() <= torch.minimum(x, z)]
    return directions


def orientation_from_beam(directions: Tensor, inplane_deg: Tensor) -> Tensor:
    """Return the orientations (D, A, 4) that look along `directions` (D, 3) with in-plane angles (A,) in degrees.

    `g * z` is the direction. At in-plane angle 0 the crystal is turned the shortest way from having e3 along the lab
    z axis; an orientation with in-plane angle `a` has the pattern of angle 0 turned by +a about the beam
    (anticlockwise, x towards y): `g_a = g_0 * Rz(-a)`.
    """
    unit = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    x, y, z = unit.unbind(-1)
    shortest = torch.stack((1 + z, -y, x, torch.zeros_like(x)), dim=-1)
    about_x = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=unit.dtype, device=unit.device)
    tilt = rotations.normalise(torch.where((1 + z)[:, None] < 1e-9, about_x, shortest))
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=unit.dtype, device=unit.device)
    turn = rotations.from_axis_angle_deg(axis, -inplane_deg.to(unit))
    return rotations.multiply(tilt[:, None], turn)
