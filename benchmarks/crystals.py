"""One crystal of each Laue class to measure by: structures from the literature; two, of -1 and -3, are made up."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.point_groups import LAUE_CLASSES


class _Crystal(NamedTuple):
    name: str
    number: int  # of the space group
    group: str  # Hermann-Mauguin
    cell: tuple[float, float, float, float, float, float]  # Å, degrees
    atoms: tuple[tuple[str, float, float, float], ...]


_THIRD = 1 / 3
_CRYSTALS = {
    "-1": _Crystal(
        "triclinic",
        2,
        "P -1",
        (5.1, 6.3, 7.4, 78.0, 84.0, 71.0),
        (("Fe", 0.12, 0.23, 0.31), ("Ni", 0.61, 0.78, 0.14), ("O", 0.37, 0.55, 0.82), ("O", 0.86, 0.33, 0.55)),
    ),
    "2/m": _Crystal(
        "Li2MnO3",
        12,
        "C 1 2/m 1",
        (4.937, 8.532, 5.030, 90, 109.46, 90),
        (
            ("Mn", 0, 0.1670, 0),
            ("Li", 0, 0.5, 0),
            ("Li", 0, 0, 0.5),
            ("Li", 0, 0.6606, 0.5),
            ("O", 0.2189, 0, 0.2273),
            ("O", 0.2540, 0.3212, 0.2233),
        ),
    ),
    "mmm": _Crystal(
        "Fe3C",
        62,
        "P n m a",
        (5.091, 6.743, 4.526, 90, 90, 90),
        (("Fe", 0.1816, 0.0666, 0.8374), ("Fe", 0.0367, 0.25, 0.8402), ("C", 0.8769, 0.25, 0.4444)),
    ),
    "4/m": _Crystal("Ni4Mo", 87, "I 4/m", (5.720, 5.720, 3.564, 90, 90, 90), (("Ni", 0.2, 0.4, 0), ("Mo", 0, 0, 0))),
    "4/mmm": _Crystal(
        "TiO2", 136, "P 42/m n m", (4.594, 4.594, 2.959, 90, 90, 90), (("Ti", 0, 0, 0), ("O", 0.3053, 0.3053, 0))
    ),
    "-3": _Crystal("trigonal", 147, "P -3", (5.2, 5.2, 4.6, 90, 90, 120), (("Ni", 0, 0, 0), ("S", 0.36, 0.09, 0.27))),
    "6/m": _Crystal(
        "LaCl3",
        176,
        "P 63/m",
        (7.483, 7.483, 4.364, 90, 90, 120),
        (("La", _THIRD, 2 * _THIRD, 0.25), ("Cl", 0.3874, 0.3016, 0.25)),
    ),
    "6/mmm": _Crystal("Mg", 194, "P 63/m m c", (3.209, 3.209, 5.211, 90, 90, 120), (("Mg", _THIRD, 2 * _THIRD, 0.25),)),
    "m-3": _Crystal(
        "FeS2", 205, "P a -3", (5.418, 5.418, 5.418, 90, 90, 90), (("Fe", 0, 0, 0), ("S", 0.3848, 0.3848, 0.3848))
    ),
    "m-3m": _Crystal("Ni", 225, "F m -3 m", (3.524, 3.524, 3.524, 90, 90, 90), (("Ni", 0, 0, 0),)),
}

MEASURED = ("m-3m", "6/mmm", "4/mmm", "-3m", "2/m")
"""The Laue classes that `python -m benchmarks label` measures by default."""

CLASSES = LAUE_CLASSES
"""All Laue classes, each with a crystal."""


@cache
def crystal(laue: str) -> Phase:
    """Return the crystal of the Laue class `laue`."""
    return linio2() if laue == "-3m" else Phase.from_cif_text(_cif(_CRYSTALS[laue]), f"the crystal of {laue}")


def _cif(described: _Crystal) -> str:
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    return "\n".join(
        (
            f"data_{described.group.replace(' ', '')}",
            f"_chemical_name_common '{described.name}'",
            f"_symmetry_space_group_name_H-M '{described.group}'",
            f"_symmetry_Int_Tables_number {described.number}",
            *(f"_cell_{name} {value:g}" for name, value in zip(names, described.cell, strict=True)),
            "loop_\n_atom_site_label\n_atom_site_type_symbol",
            "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n_atom_site_occupancy",
            *(f"{el}{i} {el} {x:.6f} {y:.6f} {z:.6f} 1" for i, (el, x, y, z) in enumerate(described.atoms, 1)),
            "",
        )
    )
