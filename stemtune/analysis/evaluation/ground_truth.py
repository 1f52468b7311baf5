"""What a map is compared with: a labelled store, a map of stemtune, or another program's (`.ang`, `.ctf`, `.h5`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_scan_frame
from stemtune.crystal_map.io import map_file, read_map, read_map_h5
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.schema import open_hdf5
from stemtune.dataset.store import Store
from stemtune.errors import UserError


def map_of_labels(store: Store) -> OrientationMap:
    """Return the labels of `store` as a map of one answer per pixel, in the scan's frame (`frame_rotations`).

    Raises `UserError` when none of its patterns has an orientation.
    """
    if not store.labelled.any():
        raise UserError(f"'{store.path}' holds no orientations to compare with; label it first")
    shape, pixel = store.grid_shape, store.grid_pixel()
    n = shape[0] * shape[1]

    def on_grid(values: npt.NDArray[np.generic] | None) -> npt.NDArray[np.float32]:
        grid = np.zeros(n, dtype=np.float32)
        if values is not None:
            grid[pixel] = np.nan_to_num(values)
        return grid

    phase = np.full(n, NOT_INDEXED, dtype=np.int16)
    phase[pixel] = store.phase
    answers = np.full((n, 1, 4), np.nan)
    answers[pixel] = (1.0, 0.0, 0.0, 0.0)  # a pattern was measured there, labelled or not
    labels = to_scan_frame(store.orientation, scan_rotation_deg(store.attrs))
    answers[pixel[store.phase >= 0], 0] = labels[store.phase >= 0]
    return OrientationMap(
        shape=shape,
        answers=answers,
        answer_confidence=on_grid(store.confidence)[:, None],
        phase=phase,
        phases=store.phases,
        spot_z_score=on_grid(store.score("spot_z_score")),
        explained_intensity=on_grid(store.score("explained_intensity")),
        step_nm=store.step_nm,
        attrs={"source": str(store.path), "scan_rotation_deg": scan_rotation_deg(store.attrs)},
    )


def map_or_labels(path: str | os.PathLike[str]) -> OrientationMap:
    """Read a `map.h5` of stemtune, or its folder, or the labels of a store as a map.

    Raises `UserError` when it is neither.
    """
    found = map_file(path)
    if not _is_store(found):
        return read_map_h5(found)
    with Store.open(found) as store:
        return map_of_labels(store)


def read_truth(path: str | os.PathLike[str]) -> OrientationMap:
    """Read the ground truth at `path`: a store, a `map.h5` (or its folder), an orix HDF5 map, an `.ang` or a `.ctf`.

    Another program's map is read in the frame that its header names; what it leaves open goes to stderr.

    Raises `UserError` when it is none of these, holds no orientation, or does not say the symmetry of a phase.
    """
    found = existing(path, "the ground truth")
    if found.is_dir():
        found = existing(found / "map.h5", "the ground truth")
    if _is_store(found):
        with Store.open(found) as store:
            return map_of_labels(store)
    if not h5py.is_hdf5(found) and found.suffix.lower() not in (".ang", ".ctf"):
        raise UserError(f"'{found}' is not a ground-truth file: give a store, a map.h5, an .ang or a .ctf file")
    truth = read_map(found)
    for note in truth.attrs.get("notes", ()) if truth.attrs.get("program") else ():
        print(f"note: {found.name}: {note}", file=sys.stderr)
    for phase in truth.phases:
        _ = phase.symmetry  # a UserError where the file does not state it
    return truth


def _is_store(path: Path) -> bool:
    if not h5py.is_hdf5(path):
        return False
    with open_hdf5(path) as file:
        return "patterns" in file and "stemtune" not in file
