"""What a map is compared with: a labelled store, a map of stemtune, or another program's (`.ang`, `.ctf`, `.h5`)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing
from stemtune.crystal_map.io.reading import read_map
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, map_file
from stemtune.crystal_map.scan_rotation import scan_rotation_deg, to_scan_frame
from stemtune.dataset.schema import open_hdf5
from stemtune.dataset.store import Store
from stemtune.errors import UserError


@dataclass(frozen=True)
class Truth:
    """Orientations that count as right, pixel by pixel of a scan of `shape` rows and columns.

    Parameters
    ----------
    shape
        Rows and columns.
    orientation
        Unit quaternions (n, 4), lab-to-crystal, scalar first; NaN where there is none.
    phase
        Index (n,) into `laue`; -1 where there is no crystal.
    laue
        Laue class of each phase.
    """

    shape: tuple[int, int]
    orientation: npt.NDArray[np.float64]
    phase: npt.NDArray[np.int16]
    laue: tuple[str, ...]


def grid_shape(store: Store) -> tuple[int, int]:
    """Return rows and columns of the store's scan; a store that is no scan counts as one row."""
    return store.scan_shape or (1, store.n)


def grid_pixel(store: Store) -> npt.NDArray[np.intp]:
    """Return the pixel (n,) of the row-by-row grid of `grid_shape` that each pattern of the store stands on."""
    if store.scan_shape is None:
        return np.arange(store.n)
    rows, columns = store.scan_shape
    row, column = store.position.astype(np.intp).T
    if ((row < 0) | (row >= rows) | (column < 0) | (column >= columns)).any():
        raise UserError(f"'{store.path}' has positions outside its scan of {rows} x {columns}")
    pixel: npt.NDArray[np.intp] = row * columns + column
    if len(np.unique(pixel)) != len(pixel):
        raise UserError(f"'{store.path}' has several patterns at one scan position, which a map cannot show")
    return pixel


def truth_of_store(store: Store) -> Truth:
    """Return the labels of `store` on its grid, in the scan's frame as maps are (`crystal_map.scan_rotation`).

    Raises
    ------
    UserError
        When none of its patterns has an orientation.
    """
    if not store.labelled.any():
        raise UserError(f"'{store.path}' holds no orientations to compare with; label it first")
    shape, pixel = grid_shape(store), grid_pixel(store)
    orientation = np.full((shape[0] * shape[1], 4), np.nan)
    phase = np.full(shape[0] * shape[1], NOT_INDEXED, dtype=np.int16)
    orientation[pixel] = to_scan_frame(store.orientation, scan_rotation_deg(store.attrs))
    phase[pixel] = store.phase
    return Truth(shape, orientation, phase, tuple(entry.symmetry.laue for entry in store.phases))


def map_of_labels(store: Store) -> OrientationMap:
    """Return the labels of `store` as a map of one answer per pixel, so that they can be judged like a model's.

    Raises
    ------
    UserError
        When none of its patterns has a label.
    """
    truth, pixel = truth_of_store(store), grid_pixel(store)
    count = len(truth.phase)
    answers = np.full((count, 1, 4), np.nan)
    answers[pixel] = (1.0, 0.0, 0.0, 0.0)  # a pattern was measured there, labelled or not
    indexed = truth.phase >= 0
    answers[indexed, 0] = truth.orientation[indexed]

    def laid(values: npt.NDArray[Any] | None) -> npt.NDArray[np.float32]:
        grid = np.zeros(count, dtype=np.float32)
        if values is not None:
            grid[pixel] = np.nan_to_num(values)
        return grid

    return OrientationMap(
        shape=truth.shape,
        answers=answers,
        answer_confidence=laid(store.confidence)[:, None],
        phase=truth.phase,
        signal=laid(store.scores.get("signal")),
        fit=laid(store.scores.get("fit")),
        phases=store.phases,
        step_nm=store.step_nm,
        attrs={"source": str(store.path), "scan_rotation_deg": scan_rotation_deg(store.attrs)},
    )


def map_or_labels(path: str | os.PathLike[str]) -> OrientationMap:
    """Read a `map.h5` of stemtune, or its folder, or the labels of a store as a map.

    Raises
    ------
    UserError
        When it is neither.
    """
    found = map_file(path)
    if h5py.is_hdf5(found):
        with open_hdf5(found) as file:
            labelled = "patterns" in file and "stemtune" not in file
        if labelled:
            with Store.open(found) as store:
                return map_of_labels(store)
    return OrientationMap.read(found)


def read_truth(path: str | os.PathLike[str]) -> Truth:
    """Read the truth at `path`: a store, a `map.h5` (or its folder), an orix HDF5 map, an `.ang` or a `.ctf` file.

    Raises
    ------
    UserError
        When it is none of these or holds no orientation.
    """
    found = existing(path, "the truth")
    if found.is_dir():
        found = existing(found / "map.h5", "the truth")
    if not h5py.is_hdf5(found):
        if found.suffix.lower() in (".ang", ".ctf"):
            return _truth_of_map(found)
        raise UserError(f"'{found}' is no truth: give a store, a map.h5, an .ang or a .ctf file")
    with open_hdf5(found) as file:
        ours, orix, store = "stemtune" in file, "crystal_map" in file, "patterns" in file
    if ours:
        answer = OrientationMap.read(found)
        laue = tuple(phase.symmetry.laue for phase in answer.phases)
        return Truth(answer.shape, answer.orientation, answer.phase, laue)
    if store:
        with Store.open(found) as opened:
            return truth_of_store(opened)
    if orix:
        return _truth_of_map(found)
    raise UserError(f"'{found}' is HDF5, but neither a store nor a map; give one, an .ang or a .ctf file")


def _truth_of_map(path: Path) -> Truth:
    """Read a map that another program made, in the frame that its header names; what it leaves open goes to stderr."""
    foreign = read_map(path)
    for note in foreign.notes:
        print(f"note: {path.name}: {note}", file=sys.stderr)
    silent = [phase.name for phase in foreign.phases if phase.symmetry is None]
    if silent:
        raise UserError(f"'{path}' does not say the symmetry of its phase '{silent[0]}'")
    laue = tuple(phase.symmetry.laue for phase in foreign.phases if phase.symmetry is not None)
    return Truth(foreign.shape, foreign.orientation, foreign.phase, laue)
