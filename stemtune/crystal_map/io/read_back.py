"""Every map file is read back after it was written: one that would mislead its reader is never left behind."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.orientation_map import OrientationMap

TOLERANCE_DEG = 0.05
"""Largest disorientation between a map and what is read back from its file."""


def check_same(written: OrientationMap, read: OrientationMap, name: str) -> None:
    """Make sure that `read`, what the file `name` reads back as, is the map `written` to `TOLERANCE_DEG`.

    Raises
    ------
    RuntimeError
        Naming the first thing that differs.
    """
    if len(read.phase) != len(written.phase):
        raise RuntimeError(f"{name} reads back with {len(read.phase)} of {len(written.phase)} pixels")
    if not np.array_equal(read.indexed, written.indexed):
        raise RuntimeError(f"{name} reads back with other pixels not indexed")
    for index, phase in enumerate(written.phases):
        own = written.phase == index
        if not own.any():
            continue
        off = disorientation_deg(_tensor(written.orientation[own]), _tensor(read.orientation[own]), phase.symmetry)
        if float(off.max()) > TOLERANCE_DEG:
            raise RuntimeError(f"{name} reads back with orientations {float(off.max()):.3f} deg away")
        other = read.phases[int(read.phase[own][0])]
        if other.symmetry.laue != phase.symmetry.laue or other.space_group not in (None, phase.space_group):
            raise RuntimeError(f"{name} reads back with another symmetry of {phase.name}: {other}")


def _tensor(quaternions: npt.NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(quaternions, dtype=np.float64))
