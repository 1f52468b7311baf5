"""Lattice parameters and their vectors; rhombohedral cells rewritten on hexagonal axes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Lattice(NamedTuple):
    """Lattice parameters: lengths in Å, angles in degrees."""

    a: float
    b: float
    c: float
    alpha: float
    beta: float
    gamma: float

    def __str__(self) -> str:
        """Return the parameters as people write them, "a=2.878 c=14.190 Å, 90 90 120"."""
        named = zip("abc", self[:3], strict=True)
        edges = [f"{name}={edge:.3f}" for name, edge in named if name == "a" or abs(edge - self.a) > 5e-4]
        return f"{' '.join(edges)} Å, {' '.join(f'{angle:g}' for angle in self[3:])}"

    def matrix(self) -> Tensor:
        """Return the lattice vectors a, b and c as rows (3, 3), in the crystal frame: e1 along a, e3 along c*."""
        cos_a, cos_b, cos_c = (math.cos(math.radians(angle)) for angle in self[3:])
        sin_c = math.sin(math.radians(self.gamma))
        y = (cos_a - cos_b * cos_c) / sin_c
        z = math.sqrt(max(0.0, 1 - cos_b**2 - y**2))
        b, c = [self.b * cos_c, self.b * sin_c, 0], [self.c * cos_b, self.c * y, self.c * z]
        return torch.tensor([[self.a, 0, 0], b, c], dtype=torch.float64)

    @property
    def is_rhombohedral(self) -> bool:
        """Whether the cell has three equal edges and three equal angles that are not 90 degrees."""
        edges = max(self[:3]) - min(self[:3]) < 1e-3 * self.a
        angles = max(self[3:]) - min(self[3:]) < 0.05
        return edges and angles and abs(self.alpha - 90) > 0.05

    def on_hexagonal_axes(self) -> Lattice:
        """Return a rhombohedral lattice on hexagonal axes (obverse setting), any other as it is."""
        if not self.is_rhombohedral:
            return self
        angle = math.radians(self.alpha)
        a = 2 * self.a * math.sin(angle / 2)
        return Lattice(a, a, self.a * math.sqrt(3 + 6 * math.cos(angle)), 90.0, 90.0, 120.0)
