"""An orientation map made by another program, read into our conventions; its phases are what the file says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.symmetry import Symmetry

NOT_INDEXED = -1
"""Phase of a pixel that has no orientation."""


@dataclass(frozen=True)
class ForeignPhase:
    """What a map file says of a phase; it knows no atoms.

    Parameters
    ----------
    name
        As the file has it.
    symmetry
        Laue class and setting; None where the file does not say.
    lattice
        Å and degrees; rhombohedral cells rewritten on hexagonal axes. None where the file does not say.
    space_group
        Number in the International Tables; None where the file does not say.
    point_group
        As the file has it, "43" or "m-3m" for instance.
    """

    name: str
    symmetry: Symmetry | None = None
    lattice: Lattice | None = None
    space_group: int | None = None
    point_group: str = ""

    def __str__(self) -> str:
        known = [] if self.symmetry is None else [f"Laue class {self.symmetry.laue}"]
        if self.space_group:
            known.append(f"space group {self.space_group}")
        if self.lattice is not None:
            known.append(in_words(self.lattice))
        return f"'{self.name}'" + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class ForeignMap:
    """Orientations on a scan of `shape` rows and columns; pixels run row by row, n = rows x columns.

    Parameters
    ----------
    shape
        Rows and columns.
    orientation
        Unit quaternions (n, 4), lab-to-crystal, scalar first, in our lab and crystal frames; NaN where not indexed.
    phase
        Index (n,) into `phases`; -1 where not indexed.
    phases
        The phases that the file lists.
    scores
        The file's own scores (n,) under its own names (CI, IQ, fit, MAD, BC, index, reliability); NaN where it has
        no point.
    confidence
        One of them (n,), or made of one, so that larger is better; None where there is nothing of the kind.
    step_nm
        Distance between rows and between columns in nm; None when it is not known.
    frame
        The frame it was read in, a key of `frames.FRAMES`.
    program
        What wrote the file, as far as its header says.
    notes
        What the user ought to know: contradictions, guesses. One sentence each.
    """

    shape: tuple[int, int]
    orientation: npt.NDArray[np.float64]
    phase: npt.NDArray[np.int16]
    phases: list[ForeignPhase]
    scores: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    confidence: npt.NDArray[np.float32] | None = None
    step_nm: tuple[float, float] | None = None
    frame: str = "orix"
    program: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def indexed(self) -> npt.NDArray[np.bool_]:
        """Which pixels (n,) have an orientation."""
        return self.phase >= 0


def in_words(lattice: Lattice) -> str:
    """Return the lattice parameters as people write them, "a=2.878 c=14.190 Å, 90 90 120"."""
    a, b, c = lattice[:3]
    edges = [f"a={a:.3f}"]
    if abs(b - a) > 5e-4:
        edges.append(f"b={b:.3f}")
    if abs(c - a) > 5e-4:
        edges.append(f"c={c:.3f}")
    return f"{' '.join(edges)} Å, {' '.join(f'{angle:g}' for angle in lattice[3:])}"


def on_hexagonal_axes(lattice: Lattice) -> Lattice:
    """Return a rhombohedral lattice (three equal edges and angles, not 90 degrees) on hexagonal axes, others as is."""
    edges = max(lattice[:3]) - min(lattice[:3]) < 1e-3 * lattice.a
    angles = max(lattice[3:]) - min(lattice[3:]) < 0.05
    if not edges or not angles or abs(lattice.alpha - 90) < 0.05:
        return lattice
    angle = math.radians(lattice.alpha)
    a = 2 * lattice.a * math.sin(angle / 2)
    return Lattice(a, a, lattice.a * math.sqrt(3 + 6 * math.cos(angle)), 90.0, 90.0, 120.0)


def symmetry_of(laue: str, lattice: Lattice | None, space_group: int | None = None) -> Symmetry:
    """Return the symmetry of a Laue class; the space group, else the angles say which axis of 2/m is unique."""
    if space_group:
        return Symmetry.of_space_group(space_group)
    if laue == "2/m":
        gamma = lattice is not None and abs(lattice.gamma - 90) > 0.02
        alpha = lattice is not None and abs(lattice.alpha - 90) > 0.02
        return Symmetry.of_proper("2" if gamma else "211" if alpha else "121")
    return Symmetry.of_laue(laue)


_POINT_GROUPS = {
    "-1": ("1", "-1"),
    "2/m": ("2", "m", "2/m", "121", "112", "211", "1m1", "11m", "m11"),
    "mmm": ("222", "mm2", "mmm", "22", "2mm", "m2m"),
    "4/m": ("4", "-4", "4/m"),
    "4/mmm": ("422", "4mm", "-42m", "-4m2", "4/mmm", "42"),
    "-3": ("3", "-3"),
    "-3m": ("32", "321", "312", "3m", "3m1", "31m", "-3m", "-3m1", "-31m"),
    "6/m": ("6", "-6", "6/m"),
    "6/mmm": ("622", "6mm", "-6m2", "-62m", "6/mmm", "62"),
    "m-3": ("23", "m-3", "m3"),
    "m-3m": ("432", "-43m", "m-3m", "m3m", "43"),
}
_LAUE = {group: laue for laue in LAUE_CLASSES for group in _POINT_GROUPS[laue]}


def laue_of(point_group: str) -> str | None:
    """Return the Laue class of a point group, as the International Tables or EDAX write it; None where unknown."""
    return _LAUE.get(point_group.strip().replace(" ", ""))
