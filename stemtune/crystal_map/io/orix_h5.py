"""Crystal maps in orix's own HDF5 layout, and `map.h5`, which is one too.

`map.h5` opens with `orix.io.load`. One more group, `stemtune`, holds what orix has no place for: quaternions instead of
Euler angles, the n best answers of every pixel, layers, tables, the CIF text of the phases and how the map was made.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import existing
from stemtune.crystal.lattice import Lattice
from stemtune.crystal.phase import Phase
from stemtune.crystal.point_groups import laue_of_point_group
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import GridHeader, Points, grid_of, map_of
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError

if TYPE_CHECKING:
    from orix.crystal_map import CrystalMap

SCHEMA = 2
"""Version of the group `stemtune` in map.h5; 1 had the scores under the names in `OLD_NAMES`."""

OLD_NAMES = {
    "signal": "spot_z_score",
    "fit": "explained_intensity",
    "goodness": "ncc",
    "before_goodness": "before_ncc",
    "phase_fit": "phase_explained_intensity",
}
"""Names of scores and layers up to version 0.1, which are still read."""

_NEEDED = ("answers", "answer_confidence", "phase")
_NM = {"nm": 1.0, "um": 1000.0, "µm": 1000.0, "mm": 1e6, "a": 0.1, "å": 0.1}
_CONFIDENCE = ("confidence", "ci", "scores", "correlation", "corr", "ncc", "dp", "rel", "iq")


def map_file(path: str | os.PathLike[str]) -> Path:
    """Return the file of a map: `path` itself, or `map.h5` inside the map folder `path`."""
    found = existing(path, "the map")
    return existing(found / "map.h5", "the map") if found.is_dir() else found


def write_map_h5(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write `map.h5` and check what orix reads back; the caller sees to it that the name is a temporary one."""
    from orix import io as orix_io

    orix_io.save(str(path), orientation_map.to_orix(), overwrite=True)
    with h5py.File(path, "a") as file:
        group = file.create_group("stemtune")
        for name, values in orientation_map.columns().items():
            group.create_dataset(name, data=values)
        for name, values in orientation_map.layers.items():
            group.create_dataset(f"layers/{name}", data=values, compression="gzip", compression_opts=1)
        for table, columns in orientation_map.tables.items():
            for name, values in columns.items():
                kind = h5py.string_dtype() if values.dtype.kind == "U" else values.dtype
                group.create_dataset(f"tables/{table}/{name}", data=values.astype(kind))
        group.attrs["schema"] = SCHEMA
        group.attrs["shape"] = orientation_map.shape
        group.attrs["phases_cif"] = json.dumps([phase.cif for phase in orientation_map.crystals])
        if orientation_map.step_nm is not None:
            group.attrs["step_nm"] = orientation_map.step_nm
        group.attrs["facts"] = json.dumps(dict(orientation_map.attrs))
    check_same(orientation_map, from_orix(read_with_orix(path)), Path(path).name)


def read_map_h5(path: str | os.PathLike[str]) -> OrientationMap:
    """Read a `map.h5` that `write_map_h5` made, or the one in the map folder `path`.

    Raises `UserError` when the file is missing, no HDF5, truncated, or not written by stemtune.
    """
    found = map_file(path)
    try:
        with h5py.File(found) as file:
            group = file.get("stemtune")
            if group is None or "schema" not in group.attrs or any(name not in group for name in _NEEDED):
                raise UserError(f"'{found}' is HDF5, but no map of stemtune: it lacks the group 'stemtune'")
            if int(group.attrs["schema"]) > SCHEMA:
                raise UserError(f"'{found}' was written by a newer stemtune; update stemtune to read it")
            held = {name: values[()] for name, values in group.items() if isinstance(values, h5py.Dataset)}
            layers = {OLD_NAMES.get(name, name): values[()] for name, values in group.get("layers", {}).items()}
            tables = {name: _table(columns) for name, columns in group.get("tables", {}).items()}
            attrs = dict(group.attrs)
    except OSError as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"'{found}' cannot be read as HDF5 ({reason}); is it truncated?") from None
    step = attrs.get("step_nm")
    return OrientationMap(
        shape=(int(attrs["shape"][0]), int(attrs["shape"][1])),
        phases=[Phase.from_cif_text(text) for text in json.loads(attrs["phases_cif"])],
        step_nm=None if step is None else (float(step[0]), float(step[1])),
        attrs=json.loads(attrs["facts"]),
        layers=layers,
        tables=tables,
        **{OLD_NAMES.get(name, name): values for name, values in held.items()},
    )


def _table(columns: h5py.Group) -> dict[str, npt.NDArray[Any]]:
    return {
        name: values.asstr()[()].astype(str) if h5py.check_string_dtype(values.dtype) else values[()]
        for name, values in columns.items()
    }


def write_orix(orientation_map: OrientationMap, path: Path) -> None:
    """Write the map in orix's HDF5 layout alone, the best answers and the alternatives, and check what orix reads."""
    from orix import io as orix_io

    made = path.with_name(path.name + ".h5")  # orix goes by the ending
    try:
        orix_io.save(str(made), orientation_map.to_orix(), overwrite=True)
        check_same(orientation_map, from_orix(read_with_orix(made)), str(path))
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def read_with_orix(path: str | os.PathLike[str]) -> CrystalMap:
    """Read a crystal map (`.ang`, `.ctf`, `.h5`) with orix, without its chatter.

    Raises `UserError` when orix cannot make a map of it.
    """
    from orix import io as orix_io

    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return orix_io.load(str(path))
    except Exception as problem:
        text = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"'{path}' cannot be read as a crystal map: {text}") from problem


def read_orix(path: Path, frame: str = AUTO) -> OrientationMap:
    """Read the crystal map `path` that orix, pyxem or kikuchipy wrote as HDF5; "auto" is "orix".

    Raises `UserError` when orix cannot make a map of it, or its points make no grid.
    """
    return from_orix(read_with_orix(path), frame, f"'{path}'", _space_groups(path))


def from_orix(
    crystal_map: CrystalMap,
    frame: str = AUTO,
    source: str = "the crystal map",
    space_groups: dict[int, int] | None = None,
) -> OrientationMap:
    """Return orix's `crystal_map` as a map of one answer per pixel; `space_groups` by phase where orix lost them."""
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
    grid = grid_of(x, y, GridHeader(), source)
    unit = str(crystal_map.scan_unit).strip().lower()
    phases = [_phase(crystal_map.phases[index], (space_groups or {}).get(index)) for index in ids]
    points = Points(best, phase, phases, scores, confidence, "orix")
    return map_of(points, grid, "orix" if frame == AUTO else frame, _NM.get(unit))


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


def _phase(phase: Any, number: int | None) -> PhaseDescription:
    lattice: Lattice | None = Lattice(*(float(value) for value in phase.structure.lattice.abcABG())).on_hexagonal_axes()
    if lattice is not None and tuple(lattice[:3]) == (1.0, 1.0, 1.0):  # diffpy's cell where none was given
        lattice = None
    group = phase.point_group
    laue = None if group is None else laue_of_point_group(str(group.laue.name)) or laue_of_point_group(str(group.name))
    symmetry = None if laue is None else Symmetry.of_map_phase(laue, lattice, number)
    return PhaseDescription(str(phase.name), symmetry, lattice, number, "" if group is None else str(group.name))


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
