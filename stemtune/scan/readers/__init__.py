"""Reading a scan: many kinds of files as one lazy stack of patterns with whatever calibration the file has.

rosettasciio reads what microscopes write (`rosetta.py`). HDF5 that is not hyperspy's is read here, piece by piece
(`hdf5.py`): DECTRIS, py4DSTEM and EMD data cubes, any array of it; so are Bragg peaks (`py4dstem.py`), .npy, .npz and
EMPAD's .raw (`arrays.py`). Nothing is loaded but headers; `Scan.data` is a dask array that reads what is computed.
"""

from __future__ import annotations

import os

from stemtune._files import existing
from stemtune.errors import UserError
from stemtune.scan.readers.scan import Scan, reciprocal_factor

__all__ = ["Scan", "read_scan", "reciprocal_factor"]

_HDF5_ENDINGS = (".h5", ".hdf5", ".emd", ".nxs")
_HDF5_START, _NPY_START, _ZIP_START = b"\x89HDF\r\n\x1a\n", b"\x93NUMPY", b"PK\x03\x04"


def read_scan(
    path: str | os.PathLike[str],
    shape: tuple[int, int] | None = None,
    dataset: str | None = None,
    size: int | None = None,
    scale: float | None = None,
) -> Scan:
    """Open the scan at `path` by its ending, and by its first bytes where the ending says nothing.

    `shape` (rows, columns) is for a file that is only a stack of frames, `dataset` says which array of an HDF5 or .npz
    file is the scan. `size` in pixels and `scale`, 1/Å per pixel, are those of the patterns that Bragg peaks are drawn
    on; without them a grid that holds every peak. A `UserError` says that the file is missing, damaged, of an unknown
    format, no stack of patterns, or not of `shape`.
    """
    found = existing(path, "the scan")
    ending, start = found.suffix.lower(), b""
    if found.is_file():
        if not found.stat().st_size:
            raise UserError(f"{found.name} is empty; copy it again")
        with found.open("rb") as file:
            start = file.read(8)
    if ending == ".hdr" and found.with_suffix(".mib").exists():
        raise UserError(f"{found.name} is only the header of a scan; give {found.with_suffix('.mib').name}")
    # The readers are imported when they are needed: h5py's plugins and rosettasciio take a moment.
    if ending in _HDF5_ENDINGS or (start == _HDF5_START and (not ending or dataset)):
        from stemtune.scan.readers.hdf5 import read_hdf5

        return read_hdf5(found, shape, dataset, size, scale)
    from stemtune.scan.readers import arrays
    from stemtune.scan.readers.rosetta import read_by_rosettasciio

    if ending == ".npz" or (not ending and start.startswith(_ZIP_START)):
        return arrays.read_npz(found, shape, dataset)
    if dataset is not None:
        raise UserError(f"{found.name} holds one scan, so there is nothing to choose; leave out --dataset")
    if ending == ".npy" or (not ending and start.startswith(_NPY_START)):
        return arrays.read_npy(found, shape)
    return arrays.read_raw(found, shape) if ending == ".raw" else read_by_rosettasciio(found, shape)
