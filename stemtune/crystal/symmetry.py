"""The eleven Laue classes: which orientations a diffraction pattern cannot tell apart, and how far apart two are.

Diffraction adds a centre of symmetry, so a crystal counts with its Laue class; the proper rotations of that class
act on orientations from the left, `g ~ s * g`. Disorientation is the smallest angle over that group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from stemtune.crystal import rotations
from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import LAUE_CLASSES, PROPER_GROUPS, PROPER_OF_LAUE, proper_of_space_group
from stemtune.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Symmetry:
    """The symmetry of a crystal as diffraction sees it.

    `laue` is the Laue class, one of `LAUE_CLASSES`; `proper` its group of proper rotations: "2" has its axis along e3,
    "121" along e2, "211" along e1; the two-fold axes of "32" lie along e1 (a), those of "312" along e2. `operations`
    (n, 4) are float64 unit quaternions, the identity first.
    """

    laue: str
    proper: str
    operations: Tensor = field(compare=False, repr=False)

    @staticmethod
    def of_laue(name: str) -> Symmetry:
        """Return the Laue class `name` in orix's setting: 2/m about e3, the two-fold axes of -3m along a."""
        if name not in PROPER_OF_LAUE:
            raise UserError(f"no Laue class is called '{name}'{did_you_mean(name, LAUE_CLASSES)}")
        return Symmetry.of_proper(PROPER_OF_LAUE[name])

    @staticmethod
    def of_proper(name: str) -> Symmetry:
        """Return the Laue class with the proper group `name`, which also fixes the setting ("121" and "312")."""
        if name not in PROPER_GROUPS:
            raise UserError(f"no proper point group is called '{name}'{did_you_mean(name, PROPER_GROUPS)}")
        return Symmetry(PROPER_GROUPS[name][0], name, _closure(name))

    @staticmethod
    def of_space_group(number: int) -> Symmetry:
        """Return the symmetry of a space group in its standard setting with e1 along a and e3 along c*.

        Monoclinic groups have their unique axis along b, that is e2. orix's `get_point_group` puts it along e3,
        and takes 321 for 312.
        """
        if not 1 <= number <= 230:
            raise UserError(f"the space group number is {number}, but must be in [1, 230]")
        return Symmetry.of_proper(proper_of_space_group(number))

    @staticmethod
    def of_map_phase(laue: str, lattice: Lattice | None, space_group: int | None = None) -> Symmetry:
        """Return the symmetry that a map file states; of 2/m the space group, else the angles tell the unique axis."""
        if space_group:
            return Symmetry.of_space_group(space_group)
        if laue == "2/m":
            gamma = lattice is not None and abs(lattice.gamma - 90) > 0.02
            alpha = lattice is not None and abs(lattice.alpha - 90) > 0.02
            return Symmetry.of_proper("2" if gamma else "211" if alpha else "121")
        return Symmetry.of_laue(laue)

    @staticmethod
    def of_matrices(matrices: Tensor, tolerance: float = 0.02) -> Symmetry | None:
        """Return the symmetry whose proper rotations are `matrices` (n, 3, 3), in the crystal frame.

        Improper operations count with their inverted twin. None where no setting known here fits, each operation to
        within `tolerance` (a sine).
        """
        proper = matrices * torch.linalg.det(matrices).sign()[:, None, None]
        for name in PROPER_GROUPS:
            known = rotations.to_matrix(_closure(name))
            apart = (proper[:, None] - known).abs().amax((-1, -2))
            if bool((apart.amin(0) < tolerance).all()) and bool((apart.amin(1) < tolerance).all()):
                return Symmetry.of_proper(name)
        return None

    @property
    def order(self) -> int:
        """The number of proper rotations."""
        return len(self.operations)

    def operations_like(self, q: Tensor) -> Tensor:
        """Return the operations (n, 4) in the number format and on the device of `q`."""
        return _operations_on(self.proper, q.dtype, q.device)

    def to_orix(self) -> Any:
        """Return the Laue class as an orix `Symmetry`, for its colour keys and files. orix has no -3m of 312."""
        from orix.quaternion import symmetry as named

        turn = {"121": named.C2y, "211": named.C2x, "312": named.D3y}.get(self.proper)
        if turn is not None:
            group = named.Symmetry.from_generators(turn, named.Ci)
            group.name = self.laue
            return group
        return next(group for group in named._groups if group.name == self.laue)


@cache
@torch.inference_mode(False)  # kept for training too, whoever asks first
def _closure(name: str) -> Tensor:
    """Return all operations (n, 4) of a proper group, the identity first, by multiplying until nothing is new."""
    generators = [
        rotations.from_axis_angle_deg(torch.tensor(axis, dtype=torch.float64), 360 / order)
        for order, axis in PROPER_GROUPS[name][1]
    ]
    found = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    fresh = found
    while len(fresh):
        grown: list[Tensor] = []
        for q, generator in product(fresh, generators):
            candidate = _exact(rotations.multiply(generator, q))
            known = torch.stack([*found, *grown])
            if float((known @ candidate).abs().max()) < 0.999:
                grown.append(candidate)
        fresh = torch.stack(grown) if grown else found[:0]
        found = torch.cat((found, fresh))
    return found


@cache
@torch.inference_mode(False)  # kept for training too, whoever asks first
def _operations_on(proper: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the operations on `device`, copied there once: a copy for every step of training would stall a GPU."""
    return _closure(proper).to(dtype=dtype, device=device)


def _exact(q: Tensor) -> Tensor:
    """Snap components to the few values that occur in point groups, and make the first non-zero one positive."""
    values = torch.tensor([0, 0.5, math.sqrt(0.5), math.sqrt(0.75), 1], dtype=q.dtype)
    snapped = q.sign() * values[(q.abs()[:, None] - values).abs().argmin(-1)]
    return snapped * snapped[snapped != 0][0].sign()


def _scalar_parts(q: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the scalar part (..., n) of `s * q` for each operation `s`, without making the products.

    In full precision even inside autocast, which would round a matrix product to three digits.
    """
    with torch.autocast(q.device.type, enabled=False):
        return q @ rotations.inverse(symmetry.operations_like(q)).T


def _smallest(q: Tensor, symmetry: Symmetry) -> Tensor:
    """Return that of the rotations `s * q` (..., 4) which turns least; among equals, the first operation's."""
    with torch.no_grad():
        scalar = _scalar_parts(q, symmetry).abs()
        close = scalar >= scalar.amax(-1, keepdim=True) - 16 * torch.finfo(q.dtype).eps
        best = close.to(torch.uint8).argmax(-1)
    return rotations.multiply(symmetry.operations_like(q)[best], q)


def disorientation_deg(g1: Tensor, g2: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the smallest angle in degrees (...) between symmetry equivalents of `g1` and `g2` (..., 4).

    One product per pair: `inverse(s1 g1) * s2 g2` turns as much as `s * g2 * inverse(g1)` with `s = inverse(s1) s2`,
    so one sum over the group serves both sides. Accurate to rounding near 0, with a finite gradient there; NaN where
    an orientation is NaN. Crystals of the same phase only.
    """
    return rotations.angle_deg(_smallest(rotations.multiply(g2, rotations.inverse(g1)), symmetry))


def closeness(g1: Tensor, g2: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the cosine (...) of half the disorientation between `g1` and `g2` (..., 4), for many pairs fast.

    Its arccosine is good to 1e-5 degrees in float64; `disorientation_deg` is exact near 0 and differentiable.
    """
    return _scalar_parts(rotations.multiply(g2, rotations.inverse(g1)), symmetry).abs_().amax(-1)


def nearest_equivalent(g: Tensor, to: Tensor, symmetry: Symmetry) -> Tensor:
    """Return that symmetry equivalent of `g` (..., 4) which is nearest to `to` (..., 4)."""
    return rotations.multiply(_smallest(rotations.multiply(g, rotations.inverse(to)), symmetry), to)


def reduce_to_fundamental_zone(g: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the symmetry equivalent of `g` (..., 4) with the smallest rotation angle and scalar part >= 0.

    On the surface of the zone, where several equivalents turn equally far, `g` is kept if it is one of them.
    """
    reduced = _smallest(g, symmetry)
    return torch.where(reduced[..., :1] < 0, -reduced, reduced)


def beam180(g: Tensor) -> Tensor:
    """Return the twin of `g` (..., 4) turned by 180 degrees about the beam, `g * Rz(180)`.

    Friedel's law gives both the same pattern as long as only the zero-order Laue zone is excited: the pattern is
    turned by 180 degrees, and reflections g and -g are equally strong.
    """
    q0, q1, q2, q3 = g.unbind(-1)
    return torch.stack((-q3, q2, -q1, q0), dim=-1)


def disorientation_beam180_deg(g1: Tensor, g2: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the disorientation in degrees (...) modulo the beam-180 ambiguity: the lesser of `g2` and its twin."""
    return torch.minimum(disorientation_deg(g1, g2, symmetry), disorientation_deg(g1, beam180(g2), symmetry))


def mean_orientation(g: Tensor, symmetry: Symmetry, weight: Tensor | None = None) -> Tensor:
    """Return the mean (4,) of the orientations `g` (n, 4) of one grain, reduced to the fundamental zone.

    Each is replaced by its equivalent nearest to a running mean that starts at the orientation of the largest weight
    (or the first), which is right while the grain spreads less than half the smallest angle between equivalents.
    """
    start = 0 if weight is None else int(weight.argmax())
    centre = g[start]
    for _ in range(3):
        centre = rotations.mean(nearest_equivalent(g, centre, symmetry), weight)
    return reduce_to_fundamental_zone(centre, symmetry)
