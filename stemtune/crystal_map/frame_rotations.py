"""Frames: which axes an orientation refers to, and how it is turned from one program's to ours.

An orientation turns a lab frame into a crystal frame, and programs choose both differently. Ours are orix's: lab x to
the right on the detector, y up, z towards the electron source; crystal e1 along a, e3 along c*. With M, whose columns
are the file's crystal axes in ours, and T, whose rows are the file's lab axes in ours, `g = M * g_file * T`.

The lab frame of a pattern is the detector's, that of a map is the scan's: x along a scan line towards larger columns,
y towards smaller rows. The scan is turned against the pattern by the store's `scan_rotation_deg`, the angle from the
pattern's x to the scan's x, anticlockwise: a direction v of the scan is Rz(angle) v in the pattern, so the orientation
that takes the scan's frame to the crystal's is g * Rz(angle).

References
----------
MTEX: `loadEBSD_ctf` (crystal axes of `.ctf`: X || a*, Z || c; half a turn about x between Euler angles and map),
`loadEBSD_ang` (EDAX's settings 1 to 4; monoclinic cells with X || a*, all others X || a), `loadEBSD_ACOM` (ASTAR as
setting 1), issue 241 (trigonal `.ctf`: 30 degrees about c between a and a*). DREAM.3D's "Import Oxford Instr. Ebsd
Data" says the same of hexagonal `.ctf`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.rotations import from_matrix, inverse, multiply
from stemtune.crystal_map.frames import FRAMES


def from_frame(
    orientation: npt.NDArray[np.float64], frame: str, lattice: Lattice | None, laue: str | None
) -> npt.NDArray[np.float64]:
    """Return orientations (n, 4) of one phase, given in `frame`, in our frames; NaN stays NaN."""
    g = torch.from_numpy(np.ascontiguousarray(orientation, dtype=np.float64))
    if frame == "py4dstem-ang":  # scipy's extrinsic angles read as Bunge's: a half turn about y on both sides
        half = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        g = multiply(multiply(half, g), half)
    crystal, lab = _axes_as_quaternions(frame, lattice, laue)
    return np.asarray(multiply(multiply(crystal, g), lab).numpy())


def to_frame(
    orientation: npt.NDArray[np.float64], frame: str, lattice: Lattice | None, laue: str | None
) -> npt.NDArray[np.float64]:
    """Return orientations (n, 4) of one phase, given in our frames, in `frame`; undoes `from_frame`."""
    crystal, lab = _axes_as_quaternions(frame, lattice, laue)
    g = torch.from_numpy(np.ascontiguousarray(orientation, dtype=np.float64))
    g = multiply(multiply(inverse(crystal), g), inverse(lab))
    if frame == "py4dstem-ang":
        half = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        g = multiply(multiply(half, g), half)
    return np.asarray(g.numpy())


def _axes_as_quaternions(name: str, lattice: Lattice | None, laue: str | None) -> tuple[Tensor, Tensor]:
    """Return M and T as quaternions (4,)."""
    frame = FRAMES[name]
    starred = frame.crystal == "a*" or (frame.crystal == "edax" and laue == "2/m")
    matrix = torch.eye(3, dtype=torch.float64)
    if starred and lattice is not None:
        matrix = starred_axes(lattice)
    return from_matrix(matrix), from_matrix(torch.tensor(frame.lab, dtype=torch.float64))


def starred_axes(lattice: Lattice) -> Tensor:
    """Return (3, 3): in columns the axes X || a*, Z || c, and Y normal to both, in our crystal frame."""
    cell = lattice.matrix()
    first = torch.linalg.inv(cell)[:, 0]  # a* is across b and c
    first, third = first / torch.linalg.vector_norm(first), cell[2] / torch.linalg.vector_norm(cell[2])
    return torch.stack((first, torch.linalg.cross(third, first), third), dim=1)


def scan_rotation_deg(attrs: Mapping[str, Any]) -> float:
    """Return the angle in the attributes of a store or map; 0 where there is none."""
    return float(attrs.get("scan_rotation_deg") or 0.0)


def to_scan_frame(orientation: npt.NDArray[np.float64], rotation_deg: float) -> npt.NDArray[np.float64]:
    """Return `orientation` (..., 4) of the pattern's frame in the scan's frame; NaN stays NaN."""
    if rotation_deg == 0:
        return orientation
    half = math.radians(rotation_deg) / 2
    about_beam = torch.tensor([math.cos(half), 0.0, 0.0, math.sin(half)], dtype=torch.float64)
    turned: npt.NDArray[np.float64] = multiply(torch.from_numpy(np.ascontiguousarray(orientation)), about_beam).numpy()
    return turned


def to_pattern_frame(orientation: npt.NDArray[np.float64], rotation_deg: float) -> npt.NDArray[np.float64]:
    """Return `orientation` (..., 4) of the scan's frame in the pattern's frame."""
    return to_scan_frame(orientation, -rotation_deg)
