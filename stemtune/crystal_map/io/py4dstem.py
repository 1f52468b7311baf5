"""Orientation maps of py4DSTEM's ACOM kept as HDF5.

py4DSTEM 0.14 has no writer for its `OrientationMap`, so its arrays are looked for wherever a script put them: a data
set called `matrix` (rows, columns[, matches], 3, 3), or a group or emdfile array of that name holding it as `data`,
with `corr` (rows, columns[, matches]) beside it. The best match counts.

`matrix` takes its lab frame to the crystal frame (e1 along a, e3 along c*), with x along the first array axis, which
runs down, and y to the right: `g = matrix * Rz(90)` in our frame. Not so in `.ang` files of py4DSTEM's save_ang_file,
whose angles are turned (frame "py4dstem-ang"). Without an answer the matrix or the correlation is 0. The file says
neither the phase nor the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.rotations import from_matrix
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import Grid, Points, map_of
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError

_ORTHOGONAL = 1e-3


def find_matrices(file: h5py.File) -> str | None:
    """Return the path of the orientation matrices in an open file; None where there are none."""
    found: list[str] = []

    def look(name: str, entry: Any) -> None:
        words = name.split("/")
        named = words[-1] == "matrix" or (words[-1] == "data" and words[-2:-1] == ["matrix"])
        if named and isinstance(entry, h5py.Dataset) and entry.ndim in (4, 5) and entry.shape[-2:] == (3, 3):
            found.append(name)

    file.visititems(look)
    return found[0] if found else None


def read_py4dstem(path: Path, frame: str = AUTO) -> OrientationMap:
    """Read the best matches of the py4DSTEM orientation map in the HDF5 file `path`; "auto" is "py4dstem".

    Raises `UserError` where the file holds no matrices, or they are no rotations.
    """
    with h5py.File(path, "r") as file:
        name = find_matrices(file)
        if name is None:
            raise UserError(f"'{path}' holds no data set `matrix` of shape (rows, columns, matches, 3, 3)")
        matrix = np.asarray(file[name][()], dtype=np.float64)
        beside = name.removesuffix("/data").removesuffix("matrix") + "corr"
        corr = _correlation(file.get(beside))
    if matrix.ndim == 5:
        matrix = matrix[:, :, 0]
    rows, columns = matrix.shape[:2]
    matrix = matrix.reshape(-1, 3, 3)
    answered = np.abs(matrix).max(axis=(1, 2)) > 0
    if corr is not None and corr.shape[0] * corr.shape[1] == len(matrix):
        score = corr.reshape(len(matrix))
        answered &= score > 0
    else:
        score = None
    orientation, mirrored = _rotations(matrix, answered, f"'{path}'")
    notes = [f"{mirrored:,} of its matrices are mirrored (determinant -1); they count with their inverted twin"]
    made = Points(
        orientation=orientation,
        phase=np.where(answered, 0, NOT_INDEXED).astype(np.int16),
        phases=[PhaseDescription("the phase of the py4DSTEM map")],
        scores={} if score is None else {"corr": score},
        confidence=score,
        program="py4DSTEM",
        notes=notes if mirrored else [],
    )
    grid = Grid((rows, columns), np.arange(rows * columns), None, [])
    return map_of(made, grid, "py4dstem" if frame == AUTO else frame, None)


def _correlation(entry: Any) -> npt.NDArray[np.float64] | None:
    if isinstance(entry, h5py.Group):
        entry = entry.get("data")
    if not isinstance(entry, h5py.Dataset) or entry.ndim not in (2, 3):
        return None
    values = np.asarray(entry[()], dtype=np.float64)
    return values[:, :, 0] if values.ndim == 3 else values


def _rotations(
    matrix: npt.NDArray[np.float64], answered: npt.NDArray[np.bool_], source: str
) -> tuple[npt.NDArray[np.float64], int]:
    """Return the quaternions (n, 4) of the matrices, NaN where not answered, and how many were mirrored."""
    known = matrix[answered]
    off = np.abs(known @ known.transpose(0, 2, 1) - np.eye(3)).max(initial=0.0)
    if not off < _ORTHOGONAL:
        raise UserError(f"{source} has orientation matrices that are no rotations (off by {off:.2g}); save it again")
    sign = np.sign(np.linalg.det(known)) if len(known) else np.ones(0)
    quaternions = np.full((len(matrix), 4), np.nan)
    if len(known):
        quaternions[answered] = from_matrix(torch.from_numpy(known * sign[:, None, None])).numpy()
    return quaternions, int((sign < 0).sum())
