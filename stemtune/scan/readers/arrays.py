"""Bare arrays of numbers in files: .npy, .npz and EMPAD's .raw, read frame by frame rather than mapped.

What is read leaves memory with the block that it was read for, while pages of a mapped file stay with the process.
Errors are those of `read_scan`.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers.scan import Frames, Scan, failure_reason, lazily, scan_shape

_EMPAD_ROWS, _EMPAD_SIZE = 130, 128  # an EMPAD frame has two rows more than the pattern, for the detector's own use
_LARGEST_PACKED = 2**30  # bytes of a compressed array of an .npz, which can only be unpacked whole


def read_npy(path: Path, shape: tuple[int, int] | None) -> Scan:
    """Open a numpy file as a scan: no calibration, two scan axes or one, then the pattern's rows and columns."""
    with path.open("rb") as file:
        header = lengths, _, dtype = npy_header(path.name, file)
        offset = file.tell()
    missing = offset + math.prod(lengths) * dtype.itemsize - path.stat().st_size
    if missing > 0:
        raise UserError(f"{path.name} cannot be read: the file is truncated, {missing:,} bytes are missing")
    return _scan_at(path, offset, header, shape)


def read_npz(path: Path, shape: tuple[int, int] | None, dataset: str | None) -> Scan:
    """Open one array of an .npz file as a scan: in place as `numpy.savez` writes it, else unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            headers = {}
            for name, info in infos.items():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        headers[name] = npy_header(f"{name} of {path.name}", file), file.tell()
            name = _chosen(path.name, {name: header[0] for name, (header, _) in headers.items()}, dataset)
            header, before = headers[name]
            if infos[name].compress_type == zipfile.ZIP_STORED:
                with path.open("rb") as raw:  # the file's data begin behind a header of its own in the archive
                    raw.seek(infos[name].header_offset + 26)
                    start = infos[name].header_offset + 30 + sum(np.fromfile(raw, dtype="<u2", count=2).tolist())
                return _scan_at(path, start + before, header, shape)
            if infos[name].file_size > _LARGEST_PACKED:
                raise UserError(
                    f"{name} of {path.name} is compressed, so it can only be read whole, and has"
                    f" {infos[name].file_size:,} bytes; save it by numpy.save instead"
                )
            with archive.open(infos[name]) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, OSError) as problem:
        raise UserError(f"{path.name} cannot be read: {failure_reason(problem)}; copy it again") from None
    return Scan(path, lazily(array.reshape(*stack_shape(path.name, array.shape, shape), *array.shape[-2:])))


def read_raw(path: Path, shape: tuple[int, int] | None) -> Scan:
    """Open EMPAD's .raw: by the .xml in the same folder that names it, else as frames of 130 x 128 float32.

    Without an .xml, the file's name (scan_x64_y32.raw) or `shape` says how they are laid out.
    """
    from stemtune.scan.readers.rosetta import read_by_rosettasciio

    for header in sorted(path.parent.glob("*.xml")):
        if f'"{path.name}"'.encode() in header.read_bytes():
            return read_by_rosettasciio(header, shape)
    frames, rest = divmod(path.stat().st_size, _EMPAD_ROWS * _EMPAD_SIZE * 4)
    if rest:
        raise UserError(
            f"{path.name} cannot be read: no .xml in its folder names it, and its size is not that of EMPAD frames"
            " (66,560 bytes each); other raw files say nothing of their pixels, so save them as .npy"
        )
    named = re.search(r"_x(\d+)_y(\d+)", path.stem)
    lengths = (int(named[2]), int(named[1])) if named and int(named[1]) * int(named[2]) == frames else (frames,)
    laid, dtype = scan_shape(path.name, lengths, shape), np.dtype("<f4")

    def read(first: int, end: int) -> npt.NDArray[Any]:
        return frames_at(path, 0, first, end, (_EMPAD_ROWS, _EMPAD_SIZE), dtype)[:, :_EMPAD_SIZE]

    return Scan(path, lazily(Frames((*laid, _EMPAD_SIZE, _EMPAD_SIZE), dtype, read)))


def npy_header(name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is in Fortran's order, and type of the array that begins in `file`."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        lengths, fortran, dtype = read(file)
    except (ValueError, EOFError) as problem:
        raise UserError(f"{name} cannot be read: it is no whole numpy file ({failure_reason(problem)})") from None
    if dtype.hasobject or dtype.kind not in "buif":
        raise UserError(f"{name} holds {dtype} pixels, which are no counts")
    return lengths, fortran, dtype


def _chosen(name: str, shapes: dict[str, tuple[int, ...]], dataset: str | None) -> str:
    found = [key for key, lengths in shapes.items() if len(lengths) >= 3]
    if dataset is not None and dataset not in shapes:
        raise UserError(f"{name} has no array '{dataset}'; there are {', '.join(shapes) or 'none'}")
    if dataset is None and len(found) != 1:
        held = ", ".join(f"{key} {' x '.join(map(str, lengths))}" for key, lengths in shapes.items()) or "nothing"
        raise UserError(f"{name} holds {held}; " + ("give --dataset with one of them" if found else "none is a scan"))
    return dataset or found[0]


def stack_shape(name: str, lengths: Sequence[int], shape: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the scan that an array with these `lengths` is."""
    if len(lengths) < 2 or not math.prod(lengths):
        raise UserError(f"{name} holds an array of shape {tuple(lengths)}, which is no stack of patterns")
    return scan_shape(name, lengths[:-2], shape)


def frames_at(
    path: Path, offset: int, first: int, end: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return the frames (n, height, width) from `first` to before `end` of a stack that begins at byte `offset`."""
    pixels = math.prod(shape)
    at, count = offset + first * pixels * dtype.itemsize, (end - first) * pixels
    found = np.fromfile(path, dtype=dtype, count=count, offset=at)
    if len(found) < count:
        raise EOFError("the file ends early")
    return found.reshape(-1, *shape)


def _scan_at(
    path: Path, offset: int, header: tuple[tuple[int, ...], bool, np.dtype[Any]], shape: tuple[int, int] | None
) -> Scan:
    """Return the scan whose array lies in the file from byte `offset` on."""
    lengths, fortran, dtype = header
    laid, frame = stack_shape(path.name, lengths, shape), (lengths[-2], lengths[-1])
    if fortran:  # a pattern is scattered over the whole file, so it is mapped
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=lengths, order="F")
        if laid != lengths[:-2]:
            raise UserError(f"{path.name} is in Fortran's order, which cannot be laid out anew; save it in C's order")
        return Scan(path, lazily(mapped))
    read = partial(frames_at, path, offset, shape=frame, dtype=dtype)
    return Scan(path, lazily(Frames((*laid, *frame), dtype, read)))
