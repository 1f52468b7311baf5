"""A crystal of each of the eleven Laue classes, with cells on which programs disagree."""

from __future__ import annotations

from functools import cache

from stemtune.crystal.phase import Phase

CELLS = {
    "-1": (2, (4.1, 5.3, 6.7, 78, 99, 112)),
    "2/m": (12, (9.541, 17.74, 5.295, 90, 103.67, 90)),
    "mmm": (62, (10.332, 6.01, 4.692, 90, 90, 90)),
    "4/m": (87, (5.24, 5.24, 11.38, 90, 90, 90)),
    "4/mmm": (136, (4.594, 4.594, 2.959, 90, 90, 90)),
    "-3": (148, (4.807, 4.807, 16.0, 90, 90, 120)),
    "-3m": (166, (2.878, 2.878, 14.19, 90, 90, 120)),
    "6/m": (176, (9.418, 9.418, 6.884, 90, 90, 120)),
    "6/mmm": (194, (3.209, 3.209, 5.211, 90, 90, 120)),
    "m-3": (205, (5.417, 5.417, 5.417, 90, 90, 90)),
    "m-3m": (225, (3.52, 3.52, 3.52, 90, 90, 90)),
}
"""Space group and cell of each Laue class."""


@cache
def crystal(laue: str, name: str = "") -> Phase:
    """Return a crystal with one atom in the origin of the class's space group."""
    group, cell = CELLS[laue]
    keys = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = [f"data_{laue.replace('/', '_')}", f"_chemical_name_common '{name or 'class ' + laue}'"]
    lines += [f"_cell_{key} {value}" for key, value in zip(keys, cell, strict=True)]
    lines += [f"_space_group_IT_number {group}", "loop_", "_atom_site_label", "_atom_site_type_symbol"]
    lines += [f"_atom_site_fract_{axis}" for axis in "xyz"] + ["X1 Fe 0 0 0"]
    phase = Phase.from_cif_text("\n".join(lines) + "\n")
    assert (phase.symmetry.laue, phase.space_group) == (laue, group)
    return phase
