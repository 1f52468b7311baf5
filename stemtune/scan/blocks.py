"""The patterns of a scan in blocks of whole pieces of its file, checked, the next one read while one is worked on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers import Scan

_BYTES = 16 * 2**20  # of patterns in a block; memory of larger ones is given back and cleared anew every time

Block = tuple[int, int, npt.NDArray[Any]]
"""First row, first column, and the patterns (rows, columns, H, W) from there on."""


class Window(NamedTuple):
    """The part of a scan that is kept: first row and column, and those after the last."""

    top: int
    left: int
    bottom: int
    right: int


def blocks(scan: Scan, window: Window) -> Iterator[Block]:
    """Yield (row, column, patterns (rows, columns, H, W)) of `window`, in blocks of whole pieces of the file.

    A `UserError` says where a block cannot be read, or holds NaN or negative counts.
    """
    data = scan.data[window.top : window.bottom, window.left : window.right]
    most = max(1, _BYTES // (math.prod(scan.pattern_shape) * data.dtype.itemsize))
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


def _checked(scan: Scan, part: Any, row: int, column: int) -> Block:
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
    if dtype.kind == "b" or (dtype.kind in "ui" and dtype.itemsize == 1):
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if dtype.kind in "ui" and dtype.itemsize == 2 else np.dtype(np.float32)
