"""Maps for other programs: `.ctf`, the Channel Text File that Oxford's programs, MTEX, ATEX, DREAM.3D and orix read.

- The crystal axes are Oxford's, X || a*, Z || c, for every phase, and the header says so. They differ from ours (e1
  along a, e3 along c*) by 30 degrees about c in trigonal and hexagonal cells, by beta - 90 degrees about b in
  monoclinic ones, by something of both in triclinic ones, and not at all in the others. orix's reader takes them for
  its own axes, so its orientations of those cells are off by just that; MTEX's and ours do not.
- The lab axes are ours: x to the right, y up, as Oxford has them.
- The phase table has the true space group, the number of the Laue class, and the lattice with enough digits.
- Angles in degrees, lengths in µm; without a known step they count scan pixels, and the header says so.
- Not indexed is phase 0 with the error 3 (no solution). BC is 255 times the confidence, BS 255 times the fit; Bands and
  MAD, which are of Kikuchi bands, are 0.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from stemtune._version import __version__
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.frame_turns import to_frame
from stemtune.crystal_map.io.ang import TOLERANCE_DEG
from stemtune.crystal_map.io.ctf_reader import read_ctf
from stemtune.crystal_map.orientation_map import OrientationMap

_NO_SOLUTION = 3
_COLUMNS = ("Phase", "X", "Y", "Bands", "Error", "Euler1", "Euler2", "Euler3", "MAD", "BC", "BS")
_FORMAT = ("%d", "%.9g", "%.9g", "%d", "%d", "%.4f", "%.4f", "%.4f", "%.4f", "%d", "%d")


def write_ctf(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write the best orientation of every pixel as `.ctf` and check what our own reader reads back.

    Raises
    ------
    RuntimeError
        When the file does not read back as the same map.
    """
    target = Path(path)
    rows, columns = orientation_map.shape
    dy, dx = (value / 1000 for value in orientation_map.step_nm) if orientation_map.step_nm else (1.0, 1.0)
    row, column = np.divmod(np.arange(rows * columns), columns)
    indexed = orientation_map.indexed
    points = np.zeros((rows * columns, len(_COLUMNS)))
    points[:, 0] = orientation_map.phase + 1
    points[:, 1], points[:, 2] = column * dx, row * dy
    points[:, 4] = np.where(indexed, 0, _NO_SOLUTION)
    points[:, 5:8] = _euler(orientation_map)
    points[:, 9] = np.rint(255 * np.clip(orientation_map.confidence, 0, 1))
    points[:, 10] = np.where(indexed, np.rint(255 * np.clip(np.nan_to_num(orientation_map.fit), 0, 1)), 0)
    header = [*_header(orientation_map, dx, dy), "\t".join(_COLUMNS)]
    with target.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(header) + "\n")
        np.savetxt(file, points, fmt="\t".join(_FORMAT))
    _check(orientation_map, target)


def _header(orientation_map: OrientationMap, dx: float, dy: float) -> list[str]:
    unit = "um" if orientation_map.step_nm else "scan pixels (the step is not known)"
    rows, columns = orientation_map.shape
    kv = orientation_map.attrs.get("geometry", {}).get("kv", 0)
    microscope = {"Mag": 0, "Coverage": 100, "Device": 0, "KV": f"{kv:g}", "TiltAngle": 0, "TiltAxis": 0}
    facts = "\t".join(f"{name}\t{value}" for name, value in microscope.items())
    lines = [
        "Channel Text File",
        f"Prj\tmap of stemtune; crystal axes X||a*, Z||c (Oxford's), lab x right, y up; coordinates in {unit}",
        f"Author\tstemtune {__version__}",
        "JobMode\tGrid",
        f"XCells\t{columns}",
        f"YCells\t{rows}",
        f"XStep\t{dx:.9g}",
        f"YStep\t{dy:.9g}",
        *(f"AcqE{place}\t0" for place in (1, 2, 3)),
        f"Euler angles refer to Sample Coordinate system (CS0)!\t{facts}",
        f"Phases\t{len(orientation_map.phases)}",
    ]
    for phase in orientation_map.phases:
        edges = ";".join(f"{value:.6g}" for value in phase.lattice[:3])
        angles = ";".join(f"{value:.6g}" for value in phase.lattice[3:])
        laue = LAUE_CLASSES.index(phase.symmetry.laue) + 1
        name = " ".join(phase.name.split()) or "unnamed"
        lines.append(f"{edges}\t{angles}\t{name}\t{laue}\t{phase.space_group}\t\t\tby stemtune")
    return lines


def _euler(orientation_map: OrientationMap) -> np.ndarray:
    """Return Bunge's angles (n, 3) in degrees in Oxford's axes; 0 where not indexed."""
    euler = np.zeros((len(orientation_map.phase), 3))
    for index, phase in enumerate(orientation_map.phases):
        own = orientation_map.phase == index
        turned = to_frame(orientation_map.orientation[own], "oxford", phase.lattice, phase.symmetry.laue)
        euler[own] = to_euler_deg(torch.from_numpy(turned)).numpy()
    return euler


def _check(orientation_map: OrientationMap, path: Path) -> None:
    """Make sure that the file reads back as the same map, with our reader, for orix's leaves Oxford's axes out."""
    read = read_ctf(path)
    if read.shape != orientation_map.shape or not np.array_equal(read.phase, orientation_map.phase):
        raise RuntimeError(f"{path} reads back with another shape or other phases")
    for index, phase in enumerate(orientation_map.phases):
        said, own = read.phases[index], orientation_map.phase == index
        if said.symmetry is None or said.symmetry.laue != phase.symmetry.laue or said.space_group != phase.space_group:
            raise RuntimeError(f"{path} reads back with another symmetry of {phase.name}: {said}")
        off = disorientation_deg(
            torch.from_numpy(orientation_map.orientation[own]), torch.from_numpy(read.orientation[own]), phase.symmetry
        )
        if own.any() and float(off.max()) > TOLERANCE_DEG:
            raise RuntimeError(f"{path} reads back with orientations {float(off.max()):.3f} deg away")
