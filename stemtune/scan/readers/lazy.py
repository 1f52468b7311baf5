"""Stacks of frames that are read when they are asked for, laid out as scans and handed to dask."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_BYTES = 16 * 2**20  # of patterns in a block, so that neither their number nor their size is large


class Frames:
    """A stack of frames as the array (rows, columns, height, width) of a scan.

    Parameters
    ----------
    shape
        Rows and columns of the scan, height and width of a frame.
    dtype
        Type of the pixels.
    read
        Returns the frames (n, height, width) of a range of numbers: first, and the one after the last.
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
            first, end = int(columns.min()), int(columns.max()) + 1
            if end - first == self.shape[1] and (np.diff(rows) == 1).all():
                found = self._read(int(rows[0]) * end, int(rows[-1] + 1) * end).reshape(len(rows), *self.shape[1:])
            else:
                found = np.stack(
                    [self._read(int(row) * self.shape[1] + first, int(row) * self.shape[1] + end) for row in rows]
                )
            step = slice(None) if len(columns) == end - first and (np.diff(columns) == 1).all() else columns - first
            found = found[:, step]
        else:
            found = np.empty((len(rows), len(columns), *self.shape[2:]), dtype=self.dtype)
        whole = tuple(slice(None) if isinstance(at, slice) else 0 for at in index[:2])
        return found[(*whole, *index[2:])]


def lazily(source: Any, chunks: tuple[int, int] = (1, 1)) -> Any:
    """Return the array-like `source` (rows, columns, height, width) as a dask array of blocks of whole patterns.

    Parameters
    ----------
    source
        Has `shape`, `dtype`, `ndim`, and is read by slices.
    chunks
        Rows and columns of the pieces that the file is stored in; blocks are whole pieces, for a piece is decompressed
        anew for each block that touches it.
    """
    dask_array: Any = importlib.import_module("dask.array")  # here, because it is slow to import
    rows, columns = source.shape[:2]
    piece_rows, piece_columns = min(chunks[0], rows), min(chunks[1], columns)
    pattern = math.prod(source.shape[2:]) * source.dtype.itemsize
    width = min(columns, max(1, _BYTES // (pattern * piece_rows * piece_columns)) * piece_columns)
    height = piece_rows
    if width == columns:
        height = min(rows, max(1, _BYTES // (pattern * columns * piece_rows)) * piece_rows)
    return dask_array.from_array(
        source, chunks=(height, width, *source.shape[2:]), name=False, fancy=False, inline_array=True
    )
