"""Frames: which axes another program's orientations refer to, and how they are turned into ours.

An orientation turns a lab frame into a crystal frame, and programs choose both differently. Ours are orix's: lab x to
the right on the detector, y up, z towards the electron source; crystal e1 along a, e3 along c*. With M, whose columns
are the file's crystal axes in ours, and T, whose rows are the file's lab axes in ours, `g = M * g_file * T`. The names
of the frames and their axes are in `stemtune.crystal_map.frames`.

"Right" and "down" are those of the map, whose rows run down. Whether the scan is turned against the detector is no
matter of the file's frame; stemtune takes it as not turned.

References
----------
MTEX: `loadEBSD_ctf` (crystal axes of `.ctf`: X || a*, Z || c; half a turn about x between Euler angles and map),
`loadEBSD_ang` (EDAX's settings 1 to 4; monoclinic cells with X || a*, all others X || a), `loadEBSD_ACOM` (ASTAR as
setting 1), issue 241 (trigonal `.ctf`: 30 degrees about c between a and a*). DREAM.3D's "Import Oxford Instr. Ebsd
Data" says the same of hexagonal `.ctf`.
"""

from __future__ import annotations

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
    crystal, lab = _turns(frame, lattice, laue)
    return np.asarray(multiply(multiply(crystal, g), lab).numpy())


def to_frame(
    orientation: npt.NDArray[np.float64], frame: str, lattice: Lattice | None, laue: str | None
) -> npt.NDArray[np.float64]:
    """Return orientations (n, 4) of one phase, given in our frames, in `frame`; undoes `from_frame`."""
    crystal, lab = _turns(frame, lattice, laue)
    g = torch.from_numpy(np.ascontiguousarray(orientation, dtype=np.float64))
    g = multiply(multiply(inverse(crystal), g), inverse(lab))
    if frame == "py4dstem-ang":
        half = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        g = multiply(multiply(half, g), half)
    return np.asarray(g.numpy())


def _turns(name: str, lattice: Lattice | None, laue: str | None) -> tuple[Tensor, Tensor]:
    """Return M and T as quaternions (4,)."""
    frame = FRAMES[name]
    starred = frame.crystal == "a*" or (frame.crystal == "edax" and laue == "2/m")
    matrix = torch.eye(3, dtype=torch.float64)
    if starred and lattice is not None:
        matrix = starred_axes(lattice)
    return from_matrix(matrix), from_matrix(torch.tensor(frame.lab, dtype=torch.float64))


def starred_axes(lattice: Lattice) -> Tensor:
    """Return (3, 3): in columns the axes X || a*, Z || c, and Y across both, in our crystal frame."""
    cell = lattice.matrix()
    first = torch.linalg.inv(cell)[:, 0]  # a* is across b and c
    first, third = first / torch.linalg.vector_norm(first), cell[2] / torch.linalg.vector_norm(cell[2])
    return torch.stack((first, torch.linalg.cross(third, first), third), dim=1)
