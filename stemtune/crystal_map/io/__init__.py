"""Files of orientation maps, a module per format with its reader and its writer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py

from stemtune._files import replaceable_file, whole_file
from stemtune.crystal_map.frames import AUTO, checked_frame
from stemtune.crystal_map.io.ang import read_ang, write_ang
from stemtune.crystal_map.io.csv import write_csv
from stemtune.crystal_map.io.ctf import read_ctf, write_ctf
from stemtune.crystal_map.io.dream3d import write_dream3d
from stemtune.crystal_map.io.orix_h5 import map_file, read_map_h5, read_orix, write_map_h5, write_orix
from stemtune.crystal_map.io.py4dstem import find_matrices, read_py4dstem
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError

FORMATS: dict[str, tuple[str, Callable[[OrientationMap, Path], None]]] = {
    "ang": (".ang", write_ang),
    "ctf": (".ctf", write_ctf),
    "h5": ("_orix.h5", write_orix),
    "dream3d": (".dream3d", write_dream3d),
    "csv": (".csv", write_csv),
}
"""Ending of the file's name and writer of each format."""


def read_map(path: str | os.PathLike[str], frame: str = AUTO) -> OrientationMap:
    """Read an orientation map: `map.h5` of stemtune or its folder, `.ang`, `.ctf`, HDF5 of orix or py4DSTEM.

    HDF5 is recognised by its content, text by its ending. `frame` is a key of `frames.FRAMES`, or "auto": the frame of
    the program that the file's header names.

    Raises `UserError` where it is none of these, is cut off or contradicts itself in a way that leaves its meaning
    open.
    """
    checked_frame(frame)
    found = map_file(path)
    ending = found.suffix.lower()
    if h5py.is_hdf5(found):
        try:
            with h5py.File(found, "r") as file:
                ours, orix = "stemtune" in file and "crystal_map" in file, "crystal_map" in file
                matrices, kept = find_matrices(file) is not None, ", ".join(list(file)[:4]) or "nothing"
        except OSError as problem:
            raise UserError(f"'{found}' cannot be read as HDF5 ({problem}); copy or export it again") from None
        if ours and frame in (AUTO, "orix"):
            return read_map_h5(found)
        if orix:
            return read_orix(found, frame)
        if matrices:
            return read_py4dstem(found, frame)
        raise UserError(
            f"'{found}' is HDF5, but no map: it holds {kept}, neither orix's crystal_map nor py4DSTEM's matrix"
        )
    if ending in (".h5", ".hdf5"):
        raise UserError(f"'{found}' is no HDF5 file or is cut off; copy or export it again")
    if ending == ".ctf":
        return read_ctf(found, frame)
    if ending == ".ang":
        return read_ang(found, frame)
    raise UserError(f"'{found}' is no map that can be read; give an .ang, .ctf or .h5 file")


def write_map(path: str | os.PathLike[str], to: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the map at `path`, a `map.h5` or its folder, in the format `to` (a key of `FORMATS`) and return where.

    Without `out` the file is beside the map under its name, with the format's ending.

    Raises `UserError` where the map or the format is unknown, or `out` would replace the map or cannot be written.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: no format is called that; there are {', '.join(FORMATS)}")
    source = map_file(path)
    ending, write = FORMATS[to]
    target = Path(out).expanduser() if out is not None else source.with_name(source.stem + ending)
    if target.exists() and target.samefile(source):
        raise UserError(f"'{target}' is the map itself, which holds more than an export; choose another --out")
    replaceable_file(target)
    orientation_map = read_map_h5(source)
    with whole_file(target) as part:
        write(orientation_map, part)
    return target


__all__ = ["FORMATS", "map_file", "read_map", "read_map_h5", "write_map", "write_map_h5"]
