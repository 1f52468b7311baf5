"""What every reader returns: a scan that has not been read yet, its lazy array, and the units of its calibration.

`blocks` reads its patterns, checked, in whole pieces of the file.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.diffraction.geometry import wavelength_angstrom
from stemtune.errors import UserError

_LENGTHS_NM = {"pm": 1e-3, "a": 0.1, "å": 0.1, "angstrom": 0.1, "nm": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "mm": 1e6}
_BLOCK_BYTES = 16 * 2**20  # of patterns in a dask block, so that neither their number nor their size is large
_READ_BYTES = 16 * 2**20  # of patterns read at once; memory of larger ones is given back and cleared anew every time


@dataclass(frozen=True)
class Scan:
    """A measured scan that has not been read yet; None is what the file does not say."""

    path: Path
    data: Any  # lazy dask array (rows, columns, height, width) of counts; pattern rows run downwards, y = -row
    scale: tuple[float, float] = (1.0, 1.0)  # of a pixel, in the file's units; `scale_inv_angstrom` gives it in 1/Å
    scale_units: str = ""
    kv: float | None = None  # acceleration voltage in kV
    centre_px: tuple[float, float] | None = None  # (row, column) of the direct beam by the file's axes
    step_nm: tuple[float, float] | None = None  # between scan rows and between scan columns
    rotation_deg: float | None = None  # from the scan's axes to the detector's: py4DSTEM's QR_rotation, axis 0 to 1
    flip: bool | None = None  # the scan's axes are the detector's with rows and columns swapped: py4DSTEM's QR_flip
    parts: tuple[Path, ...] = ()  # further files that the patterns lie in

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the scan."""
        return int(self.data.shape[0]), int(self.data.shape[1])

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """Height and width of a pattern in pixels."""
        return int(self.data.shape[2]), int(self.data.shape[3])

    def __str__(self) -> str:
        height, width = self.pattern_shape
        return f"a scan of {math.prod(self.shape):,} patterns of {height} x {width} pixels, {self.data.dtype}"

    def scale_inv_angstrom(self, kv: float | None) -> float | None:
        """Return 1/Å per pixel, or None when the file's unit is no reciprocal length and no angle.

        A `UserError` says that the two axes disagree by more than 1 %, so that pixels are not square.
        """
        factor = reciprocal_factor(self.scale_units, kv)
        if factor is None:
            return None
        row, column = (abs(value) * factor for value in self.scale)
        if not math.isclose(row, column, rel_tol=0.01):
            raise UserError(
                f"{self.path.name} has pixels of {row:g} x {column:g} 1/Å, but they must be square; give --scale"
            )
        return (row + column) / 2

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return a title, and what the file says by topic, for people."""
        scale = self.scale_inv_angstrom(self.kv)
        said = f"{self.scale[0]:g} {self.scale_units}".strip()
        volts = f"{self.kv:g} kV (wavelength {wavelength_angstrom(self.kv):.5f} Å)" if self.kv else "give --kv"
        centre = "row {:g}, column {:g} by the file's axes".format(*self.centre_px) if self.centre_px else ""
        missing = [flag for flag, value in (("--kv KV", self.kv), ("--scale SCALE", scale)) if value is None]
        facts = {
            "scan": describe_positions(self.shape, self.step_nm),
            "scale": f"{scale:g} 1/Å per pixel" if scale else f"the file says {said} per pixel; give --scale in 1/Å",
            "voltage": volts,
            "direct beam": centre or "fitted when the scan is ingested",
            "next": " ".join(["stemtune ingest", self.path.name, "--out", f"{self.path.stem}.h5", *missing]),
        }
        return str(self), facts


def describe_positions(shape: tuple[int, int], step_nm: tuple[float, float] | None) -> str:
    """Return the rows and columns of a scan, and how far apart its positions are, for people."""
    apart = "{:g} x {:g} nm apart".format(*step_nm) if step_nm else "at an unknown distance"
    return f"{shape[0]} rows x {shape[1]} columns, {apart}"


class Frames:
    """A stack of frames as the array (rows, columns, height, width) of a scan, its `shape`.

    `read(first, end)` returns the frames (n, height, width) from number `first` to before `end`.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: npt.DTypeLike, read: Callable[[int, int], npt.NDArray[Any]]
    ) -> None:
        self.shape, self.dtype, self.ndim, self._read = shape, np.dtype(dtype), 4, read

    def __getitem__(self, index: tuple[Any, ...]) -> npt.NDArray[Any]:
        """Return what `index`, numbers and slices, picks; frames between those picked may be read, not more."""
        index = (*index, *(slice(None),) * (4 - len(index)))
        rows, columns = (np.atleast_1d(np.arange(n)[at]) for n, at in zip(self.shape[:2], index[:2], strict=True))
        if len(rows) and len(columns):
            across, first, end = self.shape[1], int(columns.min()), int(columns.max()) + 1
            if end - first == across and (np.diff(rows) == 1).all():
                found = self._read(int(rows[0]) * across, int(rows[-1] + 1) * across).reshape(-1, *self.shape[1:])
            else:
                found = np.stack([self._read(int(row) * across + first, int(row) * across + end) for row in rows])
            if not (np.diff(columns) == 1).all():
                found = found[:, columns - first]
        else:
            found = np.empty((len(rows), len(columns), *self.shape[2:]), dtype=self.dtype)
        whole = tuple(slice(None) if isinstance(at, slice) else 0 for at in index[:2])
        return found[(*whole, *index[2:])]


def lazily(source: Any, chunks: tuple[int, int] = (1, 1)) -> Any:
    """Return the array-like `source` (rows, columns, height, width) as a dask array of blocks of whole patterns.

    `source` has `shape`, `dtype`, `ndim`, and is read by slices. `chunks` are the rows and columns of the pieces that
    the file is stored in; blocks are whole pieces, for a piece is decompressed anew for each block that touches it.
    """
    dask_array: Any = importlib.import_module("dask.array")  # here, because it is slow to import
    rows, columns = source.shape[:2]
    piece_rows, piece_columns = min(chunks[0], rows), min(chunks[1], columns)
    pattern = math.prod(source.shape[2:]) * source.dtype.itemsize
    width = min(columns, max(1, _BLOCK_BYTES // (pattern * piece_rows * piece_columns)) * piece_columns)
    height = piece_rows
    if width == columns:
        height = min(rows, max(1, _BLOCK_BYTES // (pattern * columns * piece_rows)) * piece_rows)
    return dask_array.from_array(
        source, chunks=(height, width, *source.shape[2:]), name=False, fancy=False, inline_array=True
    )


def reciprocal_factor(units: str, kv: float | None) -> float | None:
    """Return what a scale in `units` is multiplied with to be in 1/Å, or None if that is not known.

    Reciprocal lengths of any spelling are read ("1/Å", "nm^-1", "$A^{-1}$", "[n_m^-1]"), without 2 pi; scattering
    angles (mrad, rad) need the voltage.
    """
    plain = re.sub(r"[\s${}\\()\[\]_]|mathrm|text", "", units.replace("Å", "a").replace("Å", "a")).lower()
    plain = plain.replace("⁻¹", "^-1").replace("**", "^").replace("angstrom", "a")
    match = re.fullmatch(r"1/([a-zåµμ]+)|([a-zåµμ]+)\^?-1", plain)
    if match:
        length = _LENGTHS_NM.get(match[1] or match[2], {"m": 1e9, "cm": 1e7}.get(match[1] or match[2]))
        return None if length is None else 0.1 / length
    if plain in ("mrad", "rad") and kv:
        return (1e-3 if plain == "mrad" else 1.0) / wavelength_angstrom(kv)
    return None


def scan_step(scales: Sequence[Any], units: Sequence[Any]) -> tuple[float, float] | None:
    """Return the (row, column) step of a scan in nm from the scales and units of its axes, or None."""
    lengths = [_LENGTHS_NM.get(re.sub(r"[\s\[\]_]", "", str(unit or "")).lower()) for unit in units]
    if len(lengths) != 2 or None in lengths:
        return None
    first, second = (abs(float(scale or 0)) * float(unit or 0) for scale, unit in zip(scales, lengths, strict=True))
    return (first, second) if min(first, second) > 0 else None


def beam_by_axes(
    offsets: Sequence[float], scales: Sequence[float], lengths: Sequence[int], units: str
) -> tuple[float, float] | None:
    """Return where the two axes of a pattern are 0, in pixels, or None where that is outside of it."""
    if reciprocal_factor(units, 100.0) is None or not all(scales):
        return None
    row, column = (-offset / scale for offset, scale in zip(offsets, scales, strict=True))
    inside = all(0 < value < length - 1 for value, length in zip((row, column), lengths, strict=True))
    return (row, column) if inside else None


def scan_shape(name: str, lengths: Sequence[int], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of a scan whose axes have these `lengths`, laid out as `wanted` if that is given.

    A `UserError` says that there are not as many frames, or that nothing is wanted and there are not two axes.
    """
    frames = math.prod(lengths)
    if wanted is not None:
        if wanted[0] * wanted[1] != frames:
            given = f"{wanted[0]} x {wanted[1]}"
            raise UserError(f"{name} holds {frames:,} frames, which is not {given}; give another --shape ny,nx")
        return wanted
    if len(lengths) in (0, 2):
        return (int(lengths[0]), int(lengths[1])) if len(lengths) else (1, 1)
    if len(lengths) == 1:
        raise UserError(f"{name} holds {frames:,} frames and no scan shape; give --shape ny,nx")
    axes = " x ".join(map(str, lengths))
    raise UserError(f"{name} holds {axes} frames; a scan has two axes, give --shape ny,nx to lay them out as one")


def checked_kv(value: float | None) -> float | None:
    """Return a voltage in kV as a file has it, or None where it is nonsense."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def failure_reason(problem: Exception) -> str:
    """Return one line that says why a file could not be read."""
    text = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    if "truncated" in text:
        return "the file is truncated; copy it again"
    if "signature not found" in text:
        return "it is no HDF5 file"
    return text.rstrip(".")


class Window(NamedTuple):
    """The part of a scan that is kept: first row and column, and those after the last."""

    top: int
    left: int
    bottom: int
    right: int


def blocks(scan: Scan, window: Window) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """Yield (row, column, patterns (rows, columns, H, W)) of `window`, in blocks of whole pieces of the file.

    A `UserError` says where a block cannot be read, or holds NaN or negative counts.
    """
    data = scan.data[window.top : window.bottom, window.left : window.right]
    most = max(1, _READ_BYTES // (math.prod(scan.pattern_shape) * data.dtype.itemsize))
    across, widest = data.shape[1], max(data.chunks[1])
    rows = max(1, most // across, min(max(data.chunks[0]), most // widest))  # a piece is not cut if it fits
    for top, height in _spans(data.chunks[0], rows):
        for left, width in _spans(data.chunks[1], max(1, most // height)):
            part = data[top : top + height, left : left + width]
            yield _checked(scan, part, window.top + top, window.left + left)


def _spans(pieces: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of runs of whole pieces, of at most `most`; a longer piece is cut."""
    start = length = 0
    for piece in pieces:
        if length and length + piece > most:
            yield start, length
            start, length = start + length, 0
        length += piece
        while length > most:
            yield start, most
            start, length = start + most, length - most
    if length:
        yield start, length


def _checked(scan: Scan, part: Any, row: int, column: int) -> tuple[int, int, npt.NDArray[Any]]:
    counts = read_part(scan, part)
    if not valid_counts(counts):
        bad = ~np.isfinite(counts) | (counts < 0)
        y, x, i, j = (int(index) for index in np.argwhere(bad)[0])
        value = counts[y, x, i, j]
        kind = "a negative count" if value < 0 else "no number"
        raise UserError(
            f"{scan.path.name} has {kind} ({value:g}) at pixel ({i}, {j}) of the pattern at scan position"
            f" ({row + y}, {column + x}); counts must be finite and 0 or more; correct the file, or leave"
            " it out by --keep"
        )
    return row, column, np.ascontiguousarray(counts, dtype=stored_type(counts.dtype))


def valid_counts(counts: npt.NDArray[Any]) -> bool:
    """Return whether all counts are finite and 0 or more."""
    if counts.dtype.kind in "bu":
        return True
    return bool(counts.min() >= 0 and (counts.dtype.kind == "i" or counts.max() < np.inf))  # false for NaN


def read_part(scan: Scan, part: Any) -> npt.NDArray[Any]:
    """Return `part` of the scan's data, read; a `UserError` says why where it cannot be."""
    try:
        return np.asarray(part.compute(scheduler="threads" if part.npartitions > 1 else "synchronous"))
    except Exception as problem:  # whatever the reader's library raises on a damaged file
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{scan.path.name} cannot be read to its end: {reason}") from None


def stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the store's type that holds counts of `dtype` without loss (beyond 2^24, to 7 digits)."""
    return np.dtype({1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.float32) if dtype.kind in "bui" else np.float32)
