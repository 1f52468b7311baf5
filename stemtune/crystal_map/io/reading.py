"""Maps made elsewhere: the reader that fits a file."""

from __future__ import annotations

import os

import h5py

from stemtune._files import existing
from stemtune.crystal_map.foreign import ForeignMap
from stemtune.crystal_map.frames import AUTO, checked_frame
from stemtune.crystal_map.io.ang_reader import read_ang
from stemtune.crystal_map.io.ctf_reader import read_ctf
from stemtune.crystal_map.io.orix_h5 import read_orix
from stemtune.crystal_map.io.py4dstem import find_matrices, read_py4dstem
from stemtune.dataset.schema import open_hdf5
from stemtune.errors import UserError


def read_map(path: str | os.PathLike[str], frame: str = AUTO) -> ForeignMap:
    """Read an orientation map: `.ang`, `.ctf`, or HDF5 of orix (map.h5 too) or py4DSTEM.

    Parameters
    ----------
    path
        The file. HDF5 is recognised by its content, text by its ending or its first line.
    frame
        A key of `frames.FRAMES`, or "auto": the frame of the program that the file's header names.

    Raises
    ------
    UserError
        Where it is none of these, is cut off or contradicts itself in a way that leaves its meaning open.
    """
    checked_frame(frame)
    found = existing(path, "the map")
    if found.is_dir():
        found = existing(found / "map.h5", "the map")
    ending = found.suffix.lower()
    if h5py.is_hdf5(found):
        with open_hdf5(found) as file:
            orix, matrices = "crystal_map" in file, find_matrices(file) is not None
            kept = ", ".join(list(file)[:4]) or "nothing"
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
