"""A crystal phase: its cell, atoms and symmetry from a CIF, and the reflections it has.

Crystal coordinates are Cartesian with e1 along a and e3 along c*, lengths in Å, reciprocal lengths in 1/Å without
2 pi. Rhombohedral cells are rewritten on hexagonal axes (obverse setting), so that the three-fold axis is e3.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune._files import existing
from stemtune.crystal.cif import CifCrystal, parse_cif
from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import FIRST_CENTROSYMMETRIC
from stemtune.crystal.scattering import is_known, scattering_factors
from stemtune.crystal.symmetry import Symmetry
from stemtune.errors import UserError

DEFAULT_U_ISO = 0.005
"""Mean square displacement in Å² of atoms for which the CIF gives none, or gives 0: B = 8 pi² U = 0.39 Å², typical
of oxides and metals at room temperature."""

_SAME_PLACE_ANGSTROM = 0.01  # atoms nearer to each other stand at one place
_ABSENT = 1e-4  # reflections with |F| below this part of the strongest count as absent: it is rounding of coordinates


class Reflections(NamedTuple):
    """Reflections that are not systematically absent, sorted by length, without 000.

    `hkl` (N, 3) int64; `g` (N, 3) float64 in 1/Å, crystal frame; `structure_factor` (N,) complex128 in Å.
    """

    hkl: Tensor
    g: Tensor
    structure_factor: Tensor


@dataclass(frozen=True)
class Phase:
    """One crystal structure; equal to another if their CIF text is.

    `name` is a formula or a name, for people; `space_group` the number in the International Tables; `symmetry` that of
    its diffraction, from the symmetry operations of the CIF, so that unusual settings count as they stand. Of each of M
    atoms of the whole cell there are the chemical symbol, the position `fractional` (M, 3), the occupancy (M,) and the
    mean square displacement `u_iso` (M,) in Å², float64; anisotropic ones count with their mean. `cif` is the text that
    it was made from.
    """

    name: str = field(compare=False)
    space_group: int = field(compare=False)
    symmetry: Symmetry = field(compare=False)
    lattice: Lattice = field(compare=False)
    elements: tuple[str, ...] = field(compare=False, repr=False)
    fractional: Tensor = field(compare=False, repr=False)
    occupancy: Tensor = field(compare=False, repr=False)
    u_iso: Tensor = field(compare=False, repr=False)
    cif: str = field(repr=False)

    @staticmethod
    def from_cif(path: str | os.PathLike[str]) -> Phase:
        """Read the first structure of a CIF.

        Raises a `UserError` where the file is absent, does not parse, or holds no usable structure.
        """
        found = existing(path, "the CIF")
        try:
            text = found.read_text(encoding="utf-8", errors="replace")
        except OSError as problem:
            raise UserError(f"cannot read the CIF '{path}': {problem.strerror or problem}") from None
        return Phase.from_cif_text(text, f"the CIF '{path}'")

    @staticmethod
    def from_cif_text(text: str, source: str = "the CIF text") -> Phase:
        """Read the first structure of a CIF's text; `source` names it in errors."""
        crystal = parse_cif(text, source)
        unknown = [element for element in crystal.elements if not is_known(element)]
        if unknown:
            raise UserError(f"{source} has an atom of unknown element '{unknown[0]}'; give its _atom_site_type_symbol")
        return _from_crystal(crystal, text, source)

    def __str__(self) -> str:
        return f"'{self.name}' (Laue class {self.symmetry.laue}, space group {self.space_group}, {self.lattice})"

    @property
    def volume(self) -> float:
        """Volume of the cell in Å³."""
        return float(torch.linalg.det(self.lattice.matrix()))

    @property
    def reciprocal_matrix(self) -> Tensor:
        """(3, 3) float64 with `g = hkl @ reciprocal_matrix` in 1/Å: rows a*, b*, c* in the crystal frame."""
        inverse: Tensor = torch.linalg.inv(self.lattice.matrix())
        return inverse.T

    @cached_property
    def is_centrosymmetric(self) -> bool:
        """Whether a point of the cell turns the structure into itself when everything is inverted about it."""
        kind = torch.tensor([self.elements.index(element) for element in self.elements])
        first = (kind == torch.bincount(kind).where(torch.bincount(kind) > 0, len(kind) + 1).argmin()).nonzero()[:, 0]
        for partner in first:
            inverted = self.fractional[first[0]] + self.fractional[partner] - self.fractional
            apart = inverted[:, None] - self.fractional
            length = torch.linalg.vector_norm((apart - apart.round()) @ self.lattice.matrix(), dim=-1)
            alike = (kind[:, None] == kind) & ((self.occupancy[:, None] - self.occupancy).abs() < 1e-3)
            if bool(((length < _SAME_PLACE_ANGSTROM) & alike).any(1).all()):
                return True
        return False

    def structure_factors(self, hkl: Tensor) -> Tensor:
        """Return the kinematic structure factors (N,) complex128 in Å of any `hkl` (N, 3).

        F = sum over atoms of occupancy · f(g) · exp(-2 pi² U g²) · exp(2 pi i hkl·x), f as in `scattering`.
        """
        sums = []
        for part in torch.split(hkl.to(torch.float64), 4096):
            g_squared = (part @ self.reciprocal_matrix).square().sum(-1)
            damped = torch.exp(-2 * math.pi**2 * g_squared[:, None] * self.u_iso)
            amplitude = self.occupancy * scattering_factors(self.elements, g_squared) * damped
            phase = 2 * math.pi * part @ self.fractional.T
            sums.append(torch.complex((amplitude * phase.cos()).sum(-1), (amplitude * phase.sin()).sum(-1)))
        return torch.cat(sums)

    def reflections(self, max_inv_angstrom: float) -> Reflections:
        """Return the reflections with |g| up to `max_inv_angstrom` (1/Å) that are not absent; none below 0."""
        reach = max(0.0, max_inv_angstrom) * (1 + 1e-9)
        largest = [int(reach * edge) for edge in self.lattice[:3]]  # |h| = |g · a| <= |g| a
        hkl = torch.cartesian_prod(*(torch.arange(-n, n + 1) for n in largest))
        g = hkl.to(torch.float64) @ self.reciprocal_matrix
        length = torch.linalg.vector_norm(g, dim=-1)
        inside = (length <= max_inv_angstrom * (1 + 1e-12)) & (length > 0)
        hkl, g, length = hkl[inside], g[inside], length[inside]
        order = torch.argsort(length, stable=True)
        hkl, g = hkl[order], g[order]
        if not len(hkl):
            return Reflections(hkl, g, torch.zeros(0, dtype=torch.complex128))
        factor = self.structure_factors(hkl)
        present = factor.abs() > _ABSENT * factor.abs().max()
        return Reflections(hkl[present], g[present], factor[present])


def _from_crystal(crystal: CifCrystal, text: str, source: str) -> Phase:
    """Give the parsed crystal its symmetry, on hexagonal axes if it is rhombohedral, and its displacements."""
    lattice, fractional, operations = Lattice(*crystal.lattice), crystal.fractional, crystal.rotations
    atoms = torch.arange(len(fractional))
    if lattice.is_rhombohedral and len(operations) % 3 == 0:
        lattice, fractional, operations, atoms = _on_hexagonal_axes(lattice, fractional, operations)
    columns = lattice.matrix().T
    symmetry = Symmetry.of_matrices(columns @ operations @ torch.linalg.inv(columns))
    if symmetry is None:
        raise UserError(
            f"{source}: its symmetry operations do not fit its cell, or its axes are not a standard setting; "
            "write it in the setting of the International Tables"
        )
    u_iso = torch.where(crystal.u_iso > 0, crystal.u_iso, DEFAULT_U_ISO)
    return Phase(
        name=crystal.name,
        space_group=crystal.space_group or FIRST_CENTROSYMMETRIC[symmetry.laue],
        symmetry=symmetry,
        lattice=lattice,
        elements=tuple(crystal.elements[int(atom)] for atom in atoms),
        fractional=fractional,
        occupancy=crystal.occupancy[atoms],
        u_iso=u_iso[atoms],
        cif=text,
    )


def _on_hexagonal_axes(
    lattice: Lattice, fractional: Tensor, operations: Tensor
) -> tuple[Lattice, Tensor, Tensor, Tensor]:
    """Return lattice, atoms (3 M, 3), operations and the original index of each atom, in the obverse setting."""
    # Columns are the hexagonal axes in rhombohedral ones: a - b, b - c, a + b + c.
    axes = torch.tensor([[1, 0, 1], [-1, 1, 1], [0, -1, 1]], dtype=torch.float64)
    back = torch.linalg.inv(axes)
    centring = torch.tensor([[0, 0, 0], [2, 1, 1], [1, 2, 2]], dtype=torch.float64) / 3
    positions = ((fractional @ back.T)[:, None] + centring).flatten(0, 1) % 1.0
    index = torch.arange(len(fractional)).repeat_interleave(3)
    return lattice.on_hexagonal_axes(), positions, back @ operations @ axes, index


@cache
@torch.inference_mode(False)  # kept for training too, whoever asks first
def linio2() -> Phase:
    """Return LiNiO2 (R-3m, hexagonal axes, 12 atoms per cell), from the CIF that ships with the package."""
    text = resources.files("stemtune.crystal").joinpath("linio2.cif").read_text(encoding="utf-8")
    return Phase.from_cif_text(text, "the shipped linio2.cif")


def phase_from(spec: str | os.PathLike[str]) -> Phase:
    """Return the phase called `spec`: the path of a CIF, or "" or "linio2" for the shipped LiNiO2."""
    if str(spec).lower() in ("", "linio2") and not Path(spec).is_file():
        return linio2()
    return Phase.from_cif(spec)
