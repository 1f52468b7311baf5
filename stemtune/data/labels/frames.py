"""Frames: which axes another program's orientations refer to, and how they are turned into ours.

An orientation turns a lab frame into a crystal frame, and programs choose both differently. Ours are orix's: lab x to
the right on the detector, y up, z towards the electron source; crystal e1 along a, e3 along c*. With M, whose columns
are the file's crystal axes in ours, and T, whose rows are the file's lab axes in ours, `g = M * g_file * T`.

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

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune.crystal.phase import Lattice
from stemtune.crystal.rotations import from_matrix, inverse, multiply
from stemtune.errors import UserError, did_you_mean

_RIGHT, _UP, _OUT = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
_LEFT, _DOWN = (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)


class Frame(NamedTuple):
    """One program's frames.

    Attributes
    ----------
    lab
        The file's lab axes x, y, z in our lab frame.
    crystal
        "a": e1 along a, e3 along c*. "a*": e1 along a*, e3 along c. "edax": as "a*" for monoclinic cells, else "a".
    about
        What it is, for the help.
    """

    lab: tuple[tuple[float, float, float], ...]
    crystal: str
    about: str


FRAMES = {
    "orix": Frame((_RIGHT, _UP, _OUT), "a", "ours and orix's: x right, y up, e1 along a; nothing is turned"),
    "oxford": Frame((_RIGHT, _UP, _OUT), "a*", ".ctf: x right, y up; crystal axes X || a*, Z || c"),
    "edax1": Frame((_DOWN, _RIGHT, _OUT), "edax", "EDAX, setting 1: x down, y right"),
    "edax2": Frame((_UP, _LEFT, _OUT), "edax", "EDAX, setting 2, its default: x up, y left"),
    "edax3": Frame((_RIGHT, _UP, _OUT), "edax", "EDAX, setting 3: x right, y up"),
    "edax4": Frame((_LEFT, _DOWN, _OUT), "edax", "EDAX, setting 4: x left, y down"),
    "astar": Frame((_DOWN, _RIGHT, _OUT), "edax", "NanoMEGAS ASTAR .ang: x down, y right"),
    "py4dstem": Frame((_DOWN, _RIGHT, _OUT), "a", "py4DSTEM: x along the first array axis (down), y right"),
    "py4dstem-ang": Frame(
        (_DOWN, _RIGHT, _OUT),
        "a",
        ".ang of py4DSTEM's save_ang_file: half a turn about y on both sides of its matrix, rows and columns swapped",
    ),
}
"""What --frame takes, beside "auto"."""

AUTO = "auto"
SWAPPED = ("py4dstem-ang",)
"""Frames of files whose rows are the scan's columns."""


def checked_frame(name: str) -> str:
    """Return `name` if it is "auto" or a key of `FRAMES`."""
    if name != AUTO and name not in FRAMES:
        known = (AUTO, *FRAMES)
        raise UserError(f"--frame {name}: no frame is called that{did_you_mean(name, known)}: {', '.join(known)}")
    return name


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
