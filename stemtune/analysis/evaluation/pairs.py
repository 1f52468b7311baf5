"""Orientations compared pair by pair, each pair by the symmetry of its phase: the one loop over phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.phase import Phase
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import beam180, disorientation_beam180_deg, disorientation_deg
from stemtune.crystal_map.orientation_map import OrientationMap, PhaseDescription

RIGHT_DEG = 5.0
"""An orientation within this angle of the truth counts as right in the tables."""

Phases = Sequence[Phase | PhaseDescription]


def same_laue(orientation_map: OrientationMap, other: OrientationMap) -> npt.NDArray[np.bool_]:
    """Return the pixels (n,) that both maps index as the same Laue class."""
    known = orientation_map.indexed & np.isfinite(other.orientation).all(axis=1)
    return np.asarray(known & (orientation_map.laue == other.laue))


def disorientations_deg(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    phase: npt.NDArray[np.integer],
    phases: Phases,
    *,
    modulo_beam180: bool = False,
) -> npt.NDArray[np.float64]:
    """Return the disorientation (n,) of `first` and `second` (n, 4), pixels of `phase` (n,); NaN where that is -1."""
    measure = disorientation_beam180_deg if modulo_beam180 else disorientation_deg
    angles = np.full(len(phase), np.nan)
    for number, own in _by_phase(phase, phases):
        one, other = (torch.from_numpy(np.ascontiguousarray(values[own])) for values in (first, second))
        angles[own] = measure(one, other, phases[number].symmetry).numpy()
    return angles


def confusion(
    right: npt.NDArray[np.float64], given: npt.NDArray[np.float64], phase: npt.NDArray[np.integer], phases: Phases
) -> dict[str, float]:
    """Return the shares of right answers, of beam-180 twins, of each family of pseudo-symmetric variants, and `other`.

    Parameters
    ----------
    right, given
        Orientations (n, 4) of the truth and of the answers.
    phase
        Index (n,) into `phases`; pixels of -1 are left out.
    """
    counts: dict[str, int] = {"right": 0, "beam180": 0}
    for number, own in _by_phase(phase, phases):
        one, other = (torch.from_numpy(np.ascontiguousarray(values[own])) for values in (right, given))
        for name, count in count_families(one, other, phases[number]).items():
            counts[name] = counts.get(name, 0) + count
    total = int((phase >= 0).sum())
    counts["other"] = total - sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def count_families(right: torch.Tensor, given: torch.Tensor, phase: Phase | PhaseDescription) -> dict[str, int]:
    """Count, among answers (n, 4), the right ones, the twins and each family of variants, every answer once."""
    symmetry = phase.symmetry
    left = torch.ones(len(given), dtype=torch.bool)
    counts: dict[str, int] = {}

    def count(name: str, expected: torch.Tensor) -> None:
        hit = left & (disorientation_deg(expected, given, symmetry) < RIGHT_DEG)
        counts[name] = counts.get(name, 0) + int(hit.sum())
        left[hit] = False

    count("right", right)
    count("beam180", beam180(right))
    for name, variant in pseudo_variants(phase):
        family = name.split(" #")[0]
        for start in (right, beam180(right)):
            count(family, multiply(variant.to(start), start))
    return counts


def _by_phase(phase: npt.NDArray[np.integer], phases: Phases) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Yield each phase that pixels have, with those pixels."""
    for number in range(len(phases)):
        own = phase == number
        if own.any():
            yield number, own
