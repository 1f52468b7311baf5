"""Orientations that a crystal is easily mistaken for: the pseudo-cubic variants of layered oxides."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from stemtune.crystal import rotations
from stemtune.crystal.symmetry import Symmetry, disorientation_deg, reduce_to_fundamental_zone


class _Crystal(Protocol):
    @property
    def space_group(self) -> int | None: ...
    @property
    def lattice(self) -> Any: ...
    @property
    def symmetry(self) -> Symmetry: ...


def pseudo_variants(phase: _Crystal, tolerance: float = 0.02) -> list[tuple[str, Tensor]]:
    """Return the orientations that a layered oxide is easily mistaken for, as (name, quaternion v), `v * g` for `g`.

    The layered oxides (R-3m, hexagonal axes) are rock salt with its cations sorted into layers along one of the four
    cubic <111>. With c/a near 2√6 (within `tolerance`) the oxygen lattice stays nearly cubic, and so do the strong
    reflections:

    - "90": the layers lie along another <111> of the same oxygen lattice (90 degrees about a cubic axis; c is then 70.5
      degrees away), three variants;
    - "60 about c": the oxygen stacking is reversed, the spinel twin;
    - "70.5": both at once (70.5 degrees about a cubic <110> across c), three variants.

    Taken over all symmetry equivalents of `g` the seven are a closed set: which of "90 #1" to "90 #3" is which depends
    on the representative of `g`, that it is one of them does not. For any other phase there are none.
    """
    ideal = 2 * math.sqrt(6)
    if phase.space_group not in (155, 160, 166) or phase.symmetry.proper != "32":
        return []
    if abs(phase.lattice.c / phase.lattice.a / ideal - 1) > tolerance:
        return []
    # Columns are e1, e2, e3 of the crystal in the cubic setting: c on [111], and (104) on a cubic axis, since 104
    # obeys -h+k+l=3n. The azimuth of 104 is 30 degrees from a.
    third = torch.tensor([1, 1, 1], dtype=torch.float64) / math.sqrt(3)
    towards_104 = torch.tensor([2, -1, -1], dtype=torch.float64) / math.sqrt(6)
    across = torch.linalg.cross(third, towards_104)
    first = math.sqrt(0.75) * towards_104 - 0.5 * across
    to_cubic = rotations.from_matrix(torch.stack((first, torch.linalg.cross(third, first), third), dim=-1))
    cubic = rotations.multiply(
        rotations.multiply(rotations.inverse(to_cubic), Symmetry.of_laue("m-3m").operations), to_cubic
    )
    axis_c = torch.tensor([0, 0, 1], dtype=torch.float64)
    twin = rotations.from_axis_angle_deg(axis_c, 60.0)
    along_c = torch.stack((phase.symmetry.operations[0], twin))
    variants = [("60 about c", twin)]
    for name, family in (("70.5", rotations.multiply(twin, cubic)), ("90", cubic)):
        known = along_c
        for v in family:
            if float(disorientation_deg(v, known, phase.symmetry).min()) > 1:
                known = torch.cat((known, v[None]))
                variants.append((f"{name} #{len(known) - 2}", reduce_to_fundamental_zone(v, phase.symmetry)))
    return variants
