"""Reading a CIF, with diffpy: the cell, the symmetry operations as written, and every atom of the cell."""

from __future__ import annotations

import math
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from stemtune.errors import UserError

_SAME_SITE = 2e-3  # fractional; nearer positions are one atom: a coordinate such as 0.333 lies this far off its site


@dataclass(frozen=True)
class CifCrystal:
    """What a CIF says: `lattice` (six numbers), M atoms of the whole cell, and the operations' `rotations` (n, 3, 3).

    `rotations` act on fractional coordinates; `u_iso` (M,) is 0 where the CIF gives no displacement; `space_group`
    is 0 where it names none.
    """

    name: str
    space_group: int
    lattice: tuple[float, float, float, float, float, float]
    elements: tuple[str, ...]
    fractional: Tensor
    occupancy: Tensor
    u_iso: Tensor
    rotations: Tensor


def parse_cif(text: str, source: str) -> CifCrystal:
    """Return the first structure in the text of a CIF, expanded to the whole cell; `source` names it in errors."""
    from diffpy.structure.parsers.p_cif import P_cif

    reader = P_cif(eps=_SAME_SITE)
    try:
        with redirect_stdout(StringIO()):  # PyCifRW prints what it does not understand
            structure = reader.parse(text)
    except Exception as problem:  # diffpy and PyCifRW raise a dozen kinds
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise UserError(f"{source} does not parse as a CIF: {reason}") from None
    if structure is None or len(structure) == 0:
        raise UserError(f"{source} has no atoms (no _atom_site_label loop with coordinates)")
    block = next(reader.ciffile[name] for name in reader.ciffile.keys() if "_atom_site_label" in reader.ciffile[name])  # noqa: SIM118
    lattice = structure.lattice
    if "_cell_length_a" not in block or lattice.volume < 1:
        raise UserError(f"{source} has no unit cell (_cell_length_a and its kin)")
    for key in ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z"):
        if key not in block or not set(block[key]).isdisjoint({"?", "."}):
            raise UserError(f"{source} has an atom without coordinates ({key})")
    operations = _operations(block, reader)
    atoms = _expand(reader.asymmetric_unit, operations)
    elements = tuple(_symbol(atom.element or atom.label) for atom, _ in atoms)
    fractional = torch.tensor([list(map(float, place)) for _, place in atoms], dtype=torch.float64)
    return CifCrystal(
        name=_name(block, elements),
        space_group=_space_group(block, reader),
        lattice=(lattice.a, lattice.b, lattice.c, lattice.alpha, lattice.beta, lattice.gamma),
        elements=elements,
        fractional=fractional % 1.0,
        occupancy=torch.tensor([float(atom.occupancy) for atom, _ in atoms], dtype=torch.float64),
        u_iso=torch.tensor([float(atom.Uisoequiv) for atom, _ in atoms], dtype=torch.float64),
        rotations=torch.unique(torch.tensor([op.R.tolist() for op in operations], dtype=torch.float64), dim=0),
    )


def _operations(block: Any, reader: Any) -> list[Any]:
    """Return the operations that the file lists, else those of its space group.

    The list counts even where diffpy prefers the group of the given number, since that may have another origin.
    """
    from diffpy.structure.parsers.p_cif import getSymOp

    for key in ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz"):
        if key in block:
            listed = block[key]
            return [getSymOp(text) for text in ([listed] if isinstance(listed, str) else listed)]
    return list(reader.spacegroup.iter_symops())


def _expand(asymmetric: list[Any], operations: list[Any]) -> list[tuple[Any, Any]]:
    """Return every atom of the cell as (atom of the asymmetric unit, its position)."""
    from diffpy.structure.spacegroups import SpaceGroup
    from diffpy.structure.symmetryutilities import ExpandAsymmetricUnit

    group = SpaceGroup(short_name="CIF", crystal_system="TRICLINIC", symop_list=operations)
    expanded = ExpandAsymmetricUnit(group, [atom.xyz for atom in asymmetric], eps=_SAME_SITE).expandedpos
    return [(atom, place) for atom, places in zip(asymmetric, expanded, strict=True) for place in places]


def _symbol(text: str) -> str:
    """Return the chemical symbol at the start of "Ni2+" or "O-2"; deuterium scatters electrons as hydrogen."""
    letters = re.match(r"[A-Za-z]+", text.strip())
    symbol = letters.group().capitalize() if letters else text
    return "H" if symbol == "D" else symbol


def _space_group(block: Any, reader: Any) -> int:
    """Return the number in the International Tables, 0 where neither the file nor its operations say."""
    for key in ("_space_group_IT_number", "_symmetry_Int_Tables_number"):
        digits = re.match(r"\d+", str(block.get(key, "")).strip())
        if digits and 1 <= int(digits.group()) <= 230:
            return int(digits.group())
    number = getattr(reader.spacegroup, "number", None)
    return int(number) % 1000 if number else 0  # diffpy adds thousands for further settings of a group


def _name(block: Any, elements: tuple[str, ...]) -> str:
    for key in ("_chemical_formula_structural", "_chemical_name_mineral", "_chemical_name_common"):
        given = str(block.get(key, "")).strip().strip("'")
        if given and given not in ("?", "."):
            return given.replace(" ", "") if key.endswith("structural") else given
    counts = {element: elements.count(element) for element in sorted(set(elements))}
    units = math.gcd(*counts.values())
    return "".join(element + (str(count // units) if count > units else "") for element, count in counts.items())
