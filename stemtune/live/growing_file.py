"""Scans that another program is still writing: how many of their frames are whole, and reading those.

A file says by itself how far it has got.

- .npy: the header has the final shape; the file is shorter than that while frames are appended.
- Merlin's .mib: every frame has a header of its own; the scan's shape is given, or the .hdr beside it has it.
- HDF5: a scan that is resized along its first axis, or one of full size from the start with a number
  `frames_written`, an attribute of the array or a scalar beside it. Written in SWMR mode it is read as it grows;
  otherwise it is read whenever the writer has closed it.
- Full size from the start and nothing that counts the frames (numpy.lib.format.open_memmap, most preallocated HDF5):
  a frame is whole when a later one has begun, that is, is not all zero; the last one when the file has been left
  alone for `QUIET_S`.

Frames that are half there are left for later. The writer never notices: no lock is taken and nothing is kept open.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers import arrays, hdf5
from stemtune.scan.readers.scan import Frames, Scan, failure_reason, lazily, scan_shape

QUIET_S = 1.0  # how long a file must be left alone before its last frame counts as whole, where nothing else says so
ENDINGS = (".npy", ".mib", ".h5", ".hdf5", ".emd", ".nxs")  # endings of files that can be read while they grow
_SEARCHED = 256  # frames beyond those known to be whole that are searched for the last one begun
_GLANCED = 4  # of them that are looked at every time; the others when these hold something, and now and then
_MIB_TYPES = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}
_COUNTER = "frames_written"


class NotReady(Exception):
    """The file cannot be read now, but may be later; the message says what is waited for."""


class NotIncremental(Exception):
    """The file is of a kind that is read when it is finished."""


class GrowingFile:
    """A scan file that may still grow; `look` brings what is known of it up to date.

    `shape` and `dataset` are those of `read_scan`. When a file has been left alone for `stall_s`, nothing more is
    expected of it: frames of zeros at the end of one of full size are then frames, and the rows of one without a last
    row are all there is.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int] | None = None, dataset: str | None = None, stall_s: float = 10.0
    ) -> None:
        self.path, self.shape, self.dataset, self.stall_s = path, shape, dataset, stall_s
        self.layout = (0, 0, 0, 0)  # rows, columns, height, width when whole; zeros before anything is known
        self.dtype: np.dtype[Any] = np.dtype(np.uint16)
        self.frames = 0  # that can be read, in the order of the scan
        self.open_ended = False  # whether more rows may come than `layout` has: nothing says how many there will be
        self._size, self._modified, self._seen = -1, -1, time.monotonic()
        self._searched = -math.inf

    @property
    def total(self) -> int:
        """Frames of the whole scan, as far as is known; 0 before anything is."""
        return self.layout[0] * self.layout[1]

    @property
    def whole(self) -> bool:
        """Whether every frame of the scan is there."""
        return not self.open_ended and self.frames >= self.total > 0

    def look(self) -> None:
        """Find out how many frames are whole.

        Raises `NotReady` when nothing can be said now (what was known before stays), `NotIncremental` when the file is
        of a kind that is not read while it grows, and a `UserError` when it never will be a scan.
        """
        stat = self.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (self._size, self._modified):
            age = max(0.0, time.time() - stat.st_mtime) if self._size < 0 else 0.0
            self._size, self._modified = stat.st_size, stat.st_mtime_ns
            self._seen = time.monotonic() - age
        self._look()

    def quiet_s(self) -> float:
        """Return for how many seconds the file has not changed."""
        return time.monotonic() - self._seen

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        """Return the whole frames (n, height, width) from `first` to before `end`."""
        raise NotImplementedError

    def scan(self, rows: int) -> Scan:
        """Return the first `rows` rows as a scan, with whatever calibration the file has."""
        return Scan(self.path, lazily(Frames((rows, *self.layout[1:]), self.dtype, self.read)))

    def _look(self) -> None:
        raise NotImplementedError

    def _begun(self, total: int) -> int:
        """Return how many frames are whole in a file of full size that does not say, by the last that is not zero."""
        if self.frames >= total or self.quiet_s() > self.stall_s:
            return total
        last = at = self.frames
        end, step = min(total, self.frames + _SEARCHED), _GLANCED
        # On in growing steps while there is something; blank frames are looked behind only now and then.
        while at < end:
            filled = np.flatnonzero(self.read(at, min(at + step, end)).any(axis=(1, 2)))
            if len(filled):
                last = at + int(filled[-1]) + 1
            elif time.monotonic() - self._searched < QUIET_S:
                break
            at, step = at + step, 2 * step
        else:
            self._searched = time.monotonic()
        if last > self.frames and (last < total or self.quiet_s() < QUIET_S):
            last -= 1
        return last


class GrowingNpy(GrowingFile):
    """A numpy file to which frames are appended, or into which they are written."""

    def _look(self) -> None:
        with self.path.open("rb") as file:
            try:
                lengths, fortran, self.dtype = arrays.npy_header(self.path.name, file)
            except UserError:
                if self.quiet_s() > QUIET_S:
                    raise
                raise NotReady("its header") from None
            self._offset = file.tell()
        rows, columns = arrays.stack_shape(self.path.name, lengths, self.shape)
        if fortran:
            raise NotIncremental
        first = not any(self.layout)
        height, width = lengths[-2:]
        self.layout = (rows, columns, height, width)
        there = (self._size - self._offset) // (height * width * self.dtype.itemsize)
        if first:
            self._preallocated = there >= self.total
        self.frames = max(self.frames, self._begun(self.total) if self._preallocated else min(there, self.total))

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        try:
            return arrays.frames_at(self.path, self._offset, first, end, self.layout[2:], self.dtype)
        except EOFError:
            raise NotReady("frames that were there before") from None


class GrowingMib(GrowingFile):
    """Merlin's .mib; rows come from the last to the first, as rosettasciio reads them."""

    def _look(self) -> None:
        with self.path.open("rb") as file:
            words = file.read(64).split(b",")
            if len(words) < 7:
                raise NotReady("its first header")
            try:
                self._header, width, height = (int(words[place]) for place in (2, 4, 5))
                kind = words[6].decode()
            except ValueError:
                raise UserError(f"{self.path.name} cannot be read: its first bytes are no header of Merlin's") from None
            if kind not in _MIB_TYPES:
                raise NotIncremental
            self.dtype = np.dtype(_MIB_TYPES[kind])
            self._frame = self._header + height * width * self.dtype.itemsize
            self.layout = (*self._scan_shape(), height, width)
            there = min(self._size // self._frame, self.total)
            while self.frames < there:
                file.seek(self.frames * self._frame)
                if file.read(3) != b"MQ1":
                    break
                self.frames += 1

    def _scan_shape(self) -> tuple[int, int]:
        """Return rows and columns as given, or by the .hdr as rosettasciio understands it."""
        if self.shape is not None:
            return self.shape
        beside = self.path.with_suffix(".hdr")
        lines = beside.read_text(errors="replace").splitlines() if beside.is_file() else []
        header = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        try:
            columns, frames = (int(header[f"Frames {name} (Number)"]) for name in ("per Trigger", "in Acquisition"))
        except (KeyError, ValueError):
            columns = frames = 0
        if columns < 2 or frames < columns:
            if self.quiet_s() < self.stall_s:
                raise NotReady("its .hdr, for it does not say how many rows and columns are scanned; or give --shape")
            raise UserError(f"{self.path.name} does not say how many rows and columns are scanned; give --shape ny,nx")
        return frames // columns, columns

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        raw = np.fromfile(self.path, np.uint8, (end - first) * self._frame, offset=first * self._frame)
        if len(raw) < (end - first) * self._frame:
            raise NotReady("frames that were there before")
        counts = np.ascontiguousarray(raw.reshape(end - first, self._frame)[:, self._header :]).view(self.dtype)
        upright = counts.reshape(end - first, *self.layout[2:])[:, ::-1]
        return np.ascontiguousarray(upright, dtype=self.dtype.newbyteorder("="))

    def scan(self, rows: int) -> Scan:
        beside = self.path.with_suffix(".hdr")
        return replace(super().scan(rows), parts=(beside,) if beside.is_file() else ())


class GrowingHdf5(GrowingFile):
    """An array of an HDF5 file: resized, filled, or filled and counted."""

    _was_open = False

    def _look(self) -> None:
        with self._opened() as file:
            name = self._place(file)
            data = file[name]
            self.dtype = data.dtype
            counter = data.attrs.get(_COUNTER, data.parent.get(_COUNTER, data.parent.attrs.get(_COUNTER)))
            if not isinstance(counter, np.generic | int) and getattr(counter, "shape", None) not in ((), (1,)):
                counter = None  # something else of that name
            grows = data.maxshape[0] is None and counter is None
            self._name, self._flat = name, data.ndim == 3
            there = math.prod(data.shape[:-2])
            given = self.shape or (data.shape[:2] if data.ndim == 4 else None)
            rows, columns = given or scan_shape(self.path.name, data.shape[:-2], None)
            if data.ndim == 4 and columns != data.shape[1]:
                raise UserError(f"{self.path.name} has rows of {data.shape[1]} frames; give another --shape ny,nx")
            self.layout = (rows, columns, *data.shape[-2:])
            ended = (self._was_open and not file.swmr_mode) or self.quiet_s() > self.stall_s
            self.open_ended = grows and self.shape is None and not ended
            if counter is not None:
                self.frames = max(self.frames, min(int(np.asarray(counter).item()), there, self.total))
            elif grows:
                self.frames = max(self.frames, min(self._resized(data, there), self.total))
            self._was_open = self._was_open or file.swmr_mode
        if counter is None and not grows:
            self.frames = max(self.frames, self._begun(min(there, self.total)))

    def _resized(self, data: h5py.Dataset, there: int) -> int:
        """Return how many frames of an array that is resized are whole; the last part of it may not be written."""
        if not there or self.quiet_s() > QUIET_S or data[-1].reshape(-1, *data.shape[-2:])[-1].any():
            return there
        return there - int(math.prod(data.shape[1:-2]))

    def _place(self, file: h5py.File) -> str:
        """Return the path of the scan in the file."""
        if (not self.dataset and hdf5.other_reader(self.path, file)) or "schema" in file.attrs:
            raise NotIncremental
        try:
            kind, name = hdf5.array_in(self.path.name, file, self.dataset)
        except UserError:
            if self.quiet_s() > QUIET_S:
                raise
            raise NotReady("the array of its frames") from None
        if kind != "array" or file[name].ndim > 4:
            raise NotIncremental
        return name

    def _opened(self) -> h5py.File:
        """Open the file for reading without a lock, if its writer lets others read it."""
        if _written_now(self.path):
            raise NotReady("the program that writes it to close it, for it does not write in SWMR mode")
        for swmr in (False, True):
            try:
                return h5py.File(self.path, "r", swmr=swmr, locking=False)
            except (OSError, ValueError, RuntimeError) as problem:
                reason = problem
        if self.quiet_s() > QUIET_S and "signature not found" in str(reason):
            raise UserError(f"{self.path.name} cannot be read: {failure_reason(reason)}")
        raise NotReady(f"it to become readable ({failure_reason(reason)})")

    def read(self, first: int, end: int) -> npt.NDArray[Any]:
        before = self.path.stat().st_mtime_ns
        try:
            with self._opened() as file:
                data, columns = file[self._name], self.layout[1]
                if self._flat:
                    found = data[first:end]
                else:
                    top, bottom = first // columns, -(-end // columns)
                    found = data[top:bottom].reshape(-1, *self.layout[2:])[first - top * columns : end - top * columns]
                steady = file.swmr_mode or self.path.stat().st_mtime_ns == before
        except (OSError, KeyError, RuntimeError) as problem:
            raise NotReady(f"it to become readable ({failure_reason(problem)})") from None
        if not steady or len(found) < end - first:
            raise NotReady("the program that writes it")
        return np.asarray(found)

    def scan(self, rows: int) -> Scan:
        with self._opened() as file:
            return hdf5.array_scan(self.path, file[self._name], super().scan(rows).data)


def open_growing(
    path: Path, shape: tuple[int, int] | None = None, dataset: str | None = None, stall_s: float = 10.0
) -> GrowingFile | None:
    """Return the file as one that may still grow; None for a kind that is read when it is finished."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        return None
    return {".npy": GrowingNpy, ".mib": GrowingMib}.get(ending, GrowingHdf5)(path, shape, dataset, stall_s)


def _written_now(path: Path) -> bool:
    """Return whether another process holds the file locked for writing, as HDF5 does outside of SWMR mode.

    The kernel's list is read, because trying for a lock could make the writer fail.
    """
    try:
        locks = Path("/proc/locks").read_text()
        file = f"{_device(path)}:{path.stat().st_ino}"
    except OSError:  # another system
        return False
    return any(line.split()[3] == "WRITE" and line.split()[5] == file for line in locks.splitlines())


def _device(path: Path) -> str:
    """Return the device of the file system that holds the file, as /proc/locks writes it: `08:01`.

    It is that of the mount, which `stat` does not tell for a volume of btrfs or a container's layers.
    """
    with path.open("rb") as file:
        facts = Path(f"/proc/self/fdinfo/{file.fileno()}").read_text()
    mount = re.findall(r"^mnt_id:\s*(\d+)$", facts, re.M)[0]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        number, _, device, *_ = line.split()
        if number == mount:
            major, minor = (int(part) for part in device.split(":"))
            return f"{major:02x}:{minor:02x}"
    return f"{os.major(path.stat().st_dev):02x}:{os.minor(path.stat().st_dev):02x}"
