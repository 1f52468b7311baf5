"""Which of the known crystals a phase of a map made elsewhere is.

A map file knows no atoms, and a store keeps CIF texts, so each phase that the map uses has to be one of the crystals
given: of the same Laue class, with lattice parameters within 3 % and angles within 2 degrees. Where several are, the
one with the map's space group counts, then the one with the nearest lattice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stemtune.crystal.phase import Phase
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError

EDGE_TOLERANCE = 0.03
ANGLE_TOLERANCE_DEG = 2.0


def with_crystals(orientation_map: OrientationMap, phases: Sequence[Phase], source: str) -> OrientationMap:
    """Return the map with its phases replaced by those of `phases` that they are; `source` names it in errors.

    Raises `UserError` when nothing in the map is indexed, or a phase with points is none of `phases` or several alike.
    """
    if not orientation_map.indexed.any():
        raise UserError(f"{source} has no indexed point, so it labels nothing")
    index = np.full(len(orientation_map.phase), NOT_INDEXED, dtype=np.int16)
    for place, theirs in enumerate(orientation_map.phases):
        own = orientation_map.phase == place
        if own.any():
            index[own] = _matching(theirs, phases, source)
    return dataclasses.replace(orientation_map, phase=index, phases=list(phases))


def _matching(theirs: Phase | PhaseDescription, phases: Sequence[Phase], source: str) -> int:
    """Return the index of the crystal that is `theirs`."""
    fits = [(_differs(theirs, ours), place) for place, ours in enumerate(phases) if _fits(theirs, ours)]
    if not fits:
        known = "; ".join(map(str, phases))
        raise UserError(f"{source} has the phase {theirs}, which is none of {known}; give its --cif too")
    best = min(fits)
    alike = [place for differs, place in fits if differs == best[0]]
    if len(alike) > 1:
        names = " and ".join(f"'{phases[place].name}'" for place in alike)
        raise UserError(f"{source} has the phase {theirs}, which may be {names}; give only the --cif of the right one")
    return best[1]


def _fits(theirs: Phase | PhaseDescription, ours: Phase) -> bool:
    stated = theirs.symmetry if isinstance(theirs, Phase) else theirs.stated
    if stated is not None and stated.laue != ours.symmetry.laue:
        return False
    if theirs.lattice is None:
        return True
    edges = [abs(a / b - 1) for a, b in zip(theirs.lattice[:3], ours.lattice[:3], strict=True)]
    angles = [abs(a - b) for a, b in zip(theirs.lattice[3:], ours.lattice[3:], strict=True)]
    return max(edges) < EDGE_TOLERANCE and max(angles) < ANGLE_TOLERANCE_DEG


def _differs(theirs: Phase | PhaseDescription, ours: Phase) -> tuple[bool, float]:
    """Return whether the space groups differ, and by how much the lattices do."""
    lattice = theirs.lattice
    apart = 0.0 if lattice is None else max(abs(a / b - 1) for a, b in zip(lattice, ours.lattice, strict=True))
    return (theirs.space_group is not None and theirs.space_group != ours.space_group, round(apart, 6))
