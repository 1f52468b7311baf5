"""Crystal maps in orix's own HDF5 layout, read by orix; stemtune's map.h5 is one too."""

from __future__ import annotations

import io
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal_map.foreign import (
    NOT_INDEXED,
    ForeignMap,
    ForeignPhase,
    laue_of,
    on_hexagonal_axes,
    symmetry_of,
)
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import Header, lay
from stemtune.crystal_map.io.building import Columns, build
from stemtune.errors import UserError

if TYPE_CHECKING:
    from orix.crystal_map import CrystalMap

_NM = {"nm": 1.0, "um": 1000.0, "µm": 1000.0, "mm": 1e6, "a": 0.1, "å": 0.1}
_CONFIDENCE = ("confidence", "ci", "scores", "correlation", "corr", "ncc", "dp", "rel", "iq")


def read_with_orix(path: str | os.PathLike[str]) -> CrystalMap:
    """Read a crystal map (`.ang`, `.ctf`, `.h5`) with orix, without its chatter.

    Raises
    ------
    UserError
        When orix cannot make a map of it.
    """
    from orix import io as orix_io

    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return orix_io.load(str(path))
    except Exception as problem:
        text = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"'{path}' cannot be read as a crystal map: {text}") from problem


def read_orix(path: Path, frame: str = AUTO) -> ForeignMap:
    """Read the crystal map `path` that orix, pyxem, kikuchipy or stemtune wrote as HDF5; "auto" is "orix".

    Raises
    ------
    UserError
        When orix cannot make a map of it, or its points make no grid.
    """
    source = f"'{path}'"
    crystal_map = read_with_orix(path)
    rotations: npt.NDArray[Any] = np.asarray(crystal_map.rotations.data, dtype=np.float64)
    best = rotations[:, 0] if rotations.ndim == 3 else rotations
    ids = [index for index in crystal_map.phases.ids if index >= 0]
    phase = np.full(len(best), NOT_INDEXED, dtype=np.int16)
    for place, index in enumerate(ids):
        phase[np.asarray(crystal_map.phase_id) == index] = place
    scores = _scores(crystal_map, len(best))
    name = next((name for name in _CONFIDENCE for known in scores if known.lower() == name), None)
    confidence = next((values for known, values in scores.items() if known.lower() == name), None)
    zero = np.zeros(len(best))
    x, y = (zero if axis is None else np.asarray(axis, float) for axis in (crystal_map.x, crystal_map.y))
    grid = lay(x, y, Header(), source)
    unit = str(crystal_map.scan_unit).strip().lower()
    groups = _space_groups(path)
    phases = [_phase(crystal_map.phases[index], groups.get(index)) for index in ids]
    made = Columns(best, phase, phases, scores, confidence, "orix")
    return build(made, grid, "orix" if frame == AUTO else frame, _NM.get(unit))


def _scores(crystal_map: CrystalMap, n: int) -> dict[str, npt.NDArray[Any]]:
    """Return the properties of numbers, of several answers per pixel the best one's."""
    found = {}
    for name, values in crystal_map.prop.items():
        array = np.asarray(values)
        if array.ndim in (1, 2) and len(array) == n and array.dtype.kind in "fiub":
            found[str(name)] = array[:, 0] if array.ndim == 2 else array
    return found


def _space_groups(path: Path) -> dict[int, int]:
    """Return the space groups by phase, from the file: orix drops some of them (152) on reading, as not of 32."""
    with h5py.File(path, "r") as file:
        phases = file["crystal_map/header/phases"]
        found = {index: phases[index]["space_group"][()] for index in phases if "space_group" in phases[index]}
    texts = {index: value.ravel()[0] if isinstance(value, np.ndarray) else value for index, value in found.items()}
    plain = {index: value.decode() if isinstance(value, bytes) else str(value) for index, value in texts.items()}
    return {int(index): int(text) for index, text in plain.items() if text.isdecimal()}


def _phase(phase: Any, number: int | None) -> ForeignPhase:
    lattice = on_hexagonal_axes(Lattice(*(float(value) for value in phase.structure.lattice.abcABG())))
    group = phase.point_group
    laue = None if group is None else laue_of(str(group.laue.name)) or laue_of(str(group.name))
    unknown = tuple(lattice[:3]) == (1.0, 1.0, 1.0)  # diffpy's cell where none was given
    symmetry = None if laue is None else symmetry_of(laue, None if unknown else lattice, number)
    return ForeignPhase(
        str(phase.name), symmetry, None if unknown else lattice, number, "" if group is None else str(group.name)
    )
