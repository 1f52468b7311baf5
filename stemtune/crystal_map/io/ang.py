"""Maps for other programs: the `.ang` file of EDAX TSL, which MTEX, orix, DREAM.3D and OIM read.

What `.ang` cannot hold, and what is done about it:

- It knows point groups but no space groups: the symmetry is written as the rotation group of the Laue class (32 for
  -3m; of monoclinic cells EDAX's code for the unique axis, 20 for b), the true space group stands in a comment and in
  `map.h5`.
- Coordinates are µm by convention, and readers take them as µm whatever was meant. They are written in µm, with
  enough digits that a step of a fraction of a nanometre survives; without a known step they count scan pixels, and a
  comment says so.
- The crystal frame is e1 along a, e3 along c*, as orix reads it and EDAX uses it too, but for monoclinic cells: there
  MTEX takes EDAX's axes as X || a*, Z || c. A comment says which axes are meant. `.ctf` has no such doubt.
- Pixels that are not indexed get Euler angles of 4 pi, confidence index -1 and fit 180, as orix and EDAX do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.io.orix_h5 import read_with_orix
from stemtune.crystal_map.orientation_map import OrientationMap

if TYPE_CHECKING:
    from orix.crystal_map import CrystalMap

TOLERANCE_DEG = 0.05
"""Largest disorientation between a map and what is read back from its file."""

_UNIQUE_AXIS = {"2": "2", "121": "20", "211": "211"}  # EDAX's codes; orix does not know its 21, but 211
_DATA_LINE = re.compile(r"^\s*(\S+\s+\S+\s+\S+)\s+\S+\s+\S+(\s+.*)$")


def write_ang(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write the best orientation of every pixel as `.ang` and check what orix reads back from it.

    Columns: Euler angles (rad), x, y, image quality = signal, confidence index = confidence, phase,
    detector signal = 0, fit = 0, as orix lays them out.

    Raises
    ------
    RuntimeError
        When the file does not read back as the same map.
    """
    from orix import io as orix_io

    target = Path(path)
    orix_io.save(
        str(target),
        orientation_map.to_orix(),
        overwrite=True,
        image_quality_prop="signal",
        confidence_index_prop="confidence",
    )
    _mend_coordinates(orientation_map, target)
    check_same(orientation_map, read_with_orix(target), str(target))


def _mend_coordinates(orientation_map: OrientationMap, path: Path) -> None:
    """Rewrite steps, shape and coordinates: orix keeps five decimals and turns a single column into a row."""
    rows, columns = orientation_map.shape
    dy, dx = (value / 1000 for value in orientation_map.step_nm) if orientation_map.step_nm else (1.0, 1.0)
    unit = "µm" if orientation_map.step_nm else "scan pixels (the step is not known)"
    header = {"XSTEP": f"{dx:.9g}", "YSTEP": f"{dy:.9g}", "NROWS": rows, "NCOLS_ODD": columns, "NCOLS_EVEN": columns}
    codes = [_UNIQUE_AXIS.get(phase.symmetry.proper) for phase in reversed(orientation_map.phases)]
    lines = path.read_text(encoding="utf-8").splitlines()
    mended = [f"# Written by stemtune; coordinates in {unit}; Euler angles turn the lab into the crystal frame"]
    mended += ["# Crystal axes: X along a, Z along c*; lab axes: x to the right on the detector, y up"]
    mended += [f"# Cell of {p.name} by CIF: space-group number {p.space_group}" for p in orientation_map.phases]
    pixel = 0
    for line in lines:
        if line.startswith("#"):
            name = line[1:].strip().split(":")[0]
            if name.startswith("Symmetry") and (code := codes.pop(0)):
                line = f"# Symmetry    {code}"
            mended.append(f"# {name}: {header[name]}" if name in header else line.rstrip())
            continue
        match = _DATA_LINE.match(line)
        assert match is not None
        row, column = divmod(pixel, columns)
        mended.append(f" {match[1]}  {column * dx:.9g}  {row * dy:.9g}{match[2]}")
        pixel += 1
    path.write_text("\n".join(mended) + "\n", encoding="utf-8")


def check_same(orientation_map: OrientationMap, crystal_map: CrystalMap, name: str) -> None:
    """Make sure that `crystal_map`, read back from a file, is `orientation_map` to `TOLERANCE_DEG`.

    Raises
    ------
    RuntimeError
        Naming the first thing that differs: the file would mislead its reader.
    """
    indexed = orientation_map.indexed
    if len(crystal_map.phase_id) != len(indexed):
        raise RuntimeError(f"{name} reads back with {len(crystal_map.phase_id)} of {len(indexed)} pixels")
    if not np.array_equal(crystal_map.is_indexed, indexed):
        raise RuntimeError(f"{name} reads back with other pixels not indexed")
    rotations = np.asarray(crystal_map.rotations.data)
    best = rotations[:, 0] if rotations.ndim == 3 else rotations
    for index, phase in enumerate(orientation_map.phases):
        own = orientation_map.phase == index
        if not own.any():
            continue
        off = disorientation_deg(_tensor(orientation_map.orientation[own]), _tensor(best[own]), phase.symmetry)
        if float(off.max()) > TOLERANCE_DEG:
            raise RuntimeError(f"{name} reads back with orientations {float(off.max()):.3f} deg away")
        read = crystal_map.phases[int(np.unique(crystal_map.phase_id[own])[0])]
        laue = read.point_group.laue.name
        if laue != phase.symmetry.laue:
            raise RuntimeError(f"{name} reads back with the Laue class {laue} instead of {phase.symmetry.laue}")


def _tensor(quaternions: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(quaternions, dtype=np.float64))
