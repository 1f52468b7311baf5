"""A measured scan becomes a store: read in blocks, checked, calibrated, and moved so that the beam is in the middle."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stemtune.data.calibrate import Centre, Resampling, fit_centre
from stemtune.data.fingerprint import Fingerprint
from stemtune.data.layout import replaceable_store
from stemtune.data.readers import Scan, read_scan
from stemtune.data.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

BLOCK = 8
"""Scan positions along the edge of a group: neighbours in one block never stand on both sides of a split."""

_BYTES = 16 * 2**20  # of patterns in a block; memory of larger ones is given back and cleared anew every time
_SIZES = (8, 2048)  # smallest and largest patterns that --size may ask for
_SAMPLES = 256  # patterns that the direct beam is fitted in
_TRUSTED_PX = 0.25  # a fit this near to the centre in the file's axes confirms it


Block = tuple[int, int, npt.NDArray[Any]]
"""First row, first column, and the patterns (rows, columns, H, W) from there on."""


class Window(NamedTuple):
    """The part of a scan that is kept: first row and column, and those after the last."""

    top: int
    left: int
    bottom: int
    right: int


def ingest(
    scan: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kv: float | None = None,
    scale: float | None = None,
    centre: str | tuple[float, float] = "auto",
    shape: str | tuple[int, int] | None = None,
    size: int | None = None,
    keep: str | None = None,
    dataset: str | None = None,
) -> dict[str, Any]:
    """Write the scan in the file `scan` to the store `out`, never loading more than a block of it.

    Parameters
    ----------
    scan
        A file that `data.readers` reads as a stack of patterns.
    out
        The store.
    kv
        Acceleration voltage in kV; left out, the file's.
    scale
        1/Å per pixel of the file; left out, the file's. Bragg peaks are drawn at this scale.
    centre
        (row, column) of the direct beam in pixels, also as text "y,x"; or "auto", a fit over the scan. A fit that
        agrees with the centre in the file's axes within 0.25 px gives way to it.
    shape
        (rows, columns) of the scan, also as text "ny,nx", for a file that is only a stack of frames.
    size
        Width and height of the stored patterns; left out, the shorter edge of the measured ones.
    keep
        The part of the scan to keep, as text "0:ny,0:nx".
    dataset
        Which array of an HDF5 or .npz file is the scan, where there are several.

    Returns
    -------
    facts
        What was found and done: `patterns`, `scan_shape`, the stored geometry (`size`, `kv`, `scale_inv_angstrom`,
        `centre_px`), the beam in the file (`origin_centre_px`, `centre_spread_px`), and `copied`: whether the counts
        were copied as they were.

    Raises
    ------
    UserError
        For a file that cannot be read, is not calibrated, or holds NaN or negative counts.
    """
    options = {
        "scan": str(scan),
        "kv": kv,
        "scale": scale,
        "centre": centre,
        "shape": shape,
        "size": size,
        "keep": keep,
        "dataset": dataset,
    }
    if size is not None and not _SIZES[0] <= size <= _SIZES[1]:
        raise UserError(f"--size is {size}, but must be in [{_SIZES[0]}, {_SIZES[1]}]")
    replaceable_store(out)
    source = read_scan(scan, None if shape is None else _pair(shape, "--shape"), dataset, size, scale)
    window = _window(keep, source.shape)
    kv, step = _calibrated(source, kv, scale)
    beam = _centre(source, window, centre)
    size = size or min(source.pattern_shape)
    resampling = Resampling(source.pattern_shape, (beam.row, beam.column), size)
    dtype = _stored_type(source.data.dtype) if resampling.exact else np.dtype(np.float32)
    geometry = Geometry(size, step * resampling.factor, kv)
    shape = (window.bottom - window.top, window.right - window.left)
    facts = {
        "scan_shape": list(shape),
        "origin_centre_px": [beam.row, beam.column],
        "centre_spread_px": beam.spread_px,
        "copied": resampling.exact,
    }
    attrs = {
        **facts,
        "step_nm": source.step_nm,
        "origin": source.path.name,
        "origin_sha256": "0" * 64,  # until it has been read
        "origin_window": list(window),
        "command": "ingest",
        "options": options,
    }
    with StoreWriter(out, math.prod(shape), geometry, dtype=dtype, attrs=attrs) as writer:
        _copy(source, window, resampling, writer)
    return {"patterns": math.prod(shape), **facts, **geometry.to_dict()}


def _copy(source: Scan, window: Window, resampling: Resampling, writer: StoreWriter) -> None:
    """Write the patterns of a window of a scan block by block, and the file's sha256.

    The next block is read, and the file hashed as far as it has been copied, while a block is written.
    """
    columns, size = window.right - window.left, resampling.size
    fingerprint, done = Fingerprint(source.path, source.parts), 0
    with (
        ThreadPoolExecutor(1) as hashing,
        closing(_ahead(blocks(source, window))) as coming,
        tqdm(total=writer.n, unit="pattern", desc="ingest", disable=None) as progress,
    ):
        hashed = hashing.submit(fingerprint.advance, 0.0)
        for row, column, block in coming:
            hashed.result()  # no further behind than a block, or the file would have to come from the disk again
            done += block.shape[0] * block.shape[1]
            hashed = hashing.submit(fingerprint.advance, done / writer.n)
            patterns = resampling(block.reshape(-1, *source.pattern_shape)).reshape(*block.shape[:2], size, size)
            lines = patterns if block.shape[1] < columns else patterns.reshape(1, -1, size, size)
            for number, line in enumerate(lines):
                start = (row - window.top + number) * columns + column - window.left
                place = np.stack(np.divmod(np.arange(start, start + len(line)), columns), axis=1)
                writer.write(start, line, position=place, group=scan_group(place, columns))
            progress.update(block.shape[0] * block.shape[1])
        hashed.result()
        writer.amend("origin_sha256", fingerprint.finish())


def _ahead(items: Iterator[Block]) -> Generator[Block, None, None]:
    """Yield `items` while the next one is made in a thread."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def scan_group(position: npt.NDArray[Any], columns: int, block: int = BLOCK) -> npt.NDArray[np.int32]:
    """Return the group (n,) of scan positions (n, 2): blocks of `block` x `block` of a scan of `columns` columns."""
    row, column = position[:, 0] // block, position[:, 1] // block
    return np.asarray(row * math.ceil(columns / block) + column, dtype=np.int32)


def blocks(scan: Scan, window: Window) -> Iterator[Block]:
    """Yield (row, column, patterns (rows, columns, H, W)) of `window`, in blocks of whole pieces of the file.

    Raises
    ------
    UserError
        When a block cannot be read, or holds NaN or negative counts.
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
    counts = _computed(scan, part)
    if not _sound(counts):
        bad = ~np.isfinite(counts) | (counts < 0)
        y, x, i, j = (int(index) for index in np.argwhere(bad)[0])
        value = counts[y, x, i, j]
        kind = "a negative count" if value < 0 else "no number"
        raise UserError(
            f"{scan.path.name} has {kind} ({value:g}) at pixel ({i}, {j}) of the pattern at scan position "
            f"({row + y}, {column + x}); counts must be finite and 0 or more, mend the file or leave it out by --keep"
        )
    return row, column, np.ascontiguousarray(counts, dtype=_stored_type(counts.dtype))


def _sound(counts: npt.NDArray[Any]) -> bool:
    """Return whether all counts are finite and 0 or more."""
    if counts.dtype.kind in "bu":
        return True
    return bool(counts.min() >= 0 and (counts.dtype.kind == "i" or counts.max() < np.inf))  # false for NaN


def _computed(scan: Scan, part: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(part.compute(scheduler="threads" if part.npartitions > 1 else "synchronous"))
    except Exception as problem:  # whatever the reader's library raises on a damaged file
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{scan.path.name} cannot be read to its end: {reason}") from None


def _stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the store's type that holds counts of `dtype` without loss (beyond 2^24, to 7 digits)."""
    if dtype.kind == "b" or (dtype.kind in "ui" and dtype.itemsize == 1):
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if dtype.kind in "ui" and dtype.itemsize == 2 else np.dtype(np.float32)


def _calibrated(scan: Scan, kv: float | None, scale: float | None) -> tuple[float, float]:
    """Return voltage (kV) and scale (1/Å per pixel of the file), from the options or the file."""
    kv = kv if kv is not None else scan.kv
    scale = scale if scale is not None else scan.scale_inv_angstrom(kv)
    name = scan.path.name
    if kv is None or scale is None:
        what = "the acceleration voltage; give --kv, 200 for instance"
        if scale is None:
            what = "how many 1/Å a pixel is; give --scale, 0.02 for instance" + (", and --kv" if kv is None else "")
        raise UserError(f"{name} does not say {what}")
    if not 20 <= kv <= 1500:
        raise UserError(f"the acceleration voltage of {name} is {kv:g} kV, but must be in [20, 1500]; give --kv")
    if not 0 < scale <= 1:
        raise UserError(f"the scale of {name} is {scale:g} 1/Å per pixel, but must be in (0, 1]; give --scale")
    return kv, scale


def _centre(scan: Scan, window: Window, wanted: str | tuple[float, float]) -> Centre:
    height, width = scan.pattern_shape
    if wanted != "auto":
        row, column = _pair(wanted, "--centre", whole=False)
        if not (0 <= row <= height - 1 and 0 <= column <= width - 1):
            raise UserError(f"--centre {row:g},{column:g} lies outside of the {height} x {width} pixels of a pattern")
        return Centre(row, column, 0.0)
    found = fit_centre(sample(scan, window))
    if scan.centre_px and max(abs(found.row - scan.centre_px[0]), abs(found.column - scan.centre_px[1])) < _TRUSTED_PX:
        return Centre(*scan.centre_px, found.spread_px)
    return found


def sample(scan: Scan, window: Window, count: int = _SAMPLES) -> npt.NDArray[Any]:
    """Return about `count` patterns (n, H, W) from 16 stretches of rows spread evenly over the window."""
    rows, columns = window.bottom - window.top, window.right - window.left
    lines = np.unique(np.linspace(window.top, window.bottom - 1, min(rows, 16)).round().astype(int))
    step = max(1, round(columns * len(lines) / count))
    picked = [scan.data[line, window.left + line % step : window.right : step] for line in lines]
    counts = np.concatenate([_computed(scan, part) for part in picked if part.shape[0]])
    return np.nan_to_num(counts) if counts.dtype.kind == "f" else counts


def _window(keep: str | None, shape: tuple[int, int]) -> Window:
    """Return the part of a scan of `shape` that the text `keep` ("0:ny,0:nx") names; None is all of it."""
    if keep is None:
        return Window(0, 0, *shape)
    try:
        rows, columns = (
            slice(*(int(end) if end.strip() else None for end in part.split(":"))) for part in keep.split(",")
        )
    except ValueError:
        raise UserError(f"--keep is '{keep}', but must be rows and columns as 0:ny,0:nx") from None
    spans = [span.indices(length) for span, length in zip((rows, columns), shape, strict=True)]
    ends = [span.stop for span in (rows, columns)]
    over = any(end is not None and end > length for end, length in zip(ends, shape, strict=True))
    if over or any(stop <= start or step != 1 for start, stop, step in spans):
        raise UserError(f"--keep is '{keep}', but the scan has the rows 0:{shape[0]} and the columns 0:{shape[1]}")
    return Window(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def _pair(value: Any, flag: str, whole: bool = True) -> tuple[Any, Any]:
    """Return two numbers given as a pair or as text "y,x"."""
    parts = value.split(",") if isinstance(value, str) else list(value)
    try:
        first, second = (int(part) if whole else float(part) for part in parts)
    except ValueError:
        kind = "two whole numbers as ny,nx" if whole else "auto or two numbers as y,x"
        raise UserError(f"{flag} is '{value}', but must be {kind}") from None
    if whole and min(first, second) < 1:
        raise UserError(f"{flag} is '{value}', but both numbers must be 1 or more")
    return first, second
