"""A measured scan becomes a store: read in blocks, checked, calibrated, and moved so that the beam is in the middle."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stemtune.data.corrections import Corrections, Wanted
from stemtune.data.layout import replaceable_store
from stemtune.data.planning import Plan, Sample, plan
from stemtune.data.readers import Scan, read_scan
from stemtune.data.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

BLOCK = 8
"""Scan positions along the edge of a group: neighbours in one block never stand on both sides of a split."""

_BYTES = 64 * 2**20  # of patterns in memory at a time
_SIZES = (8, 2048)  # smallest and largest patterns that --size may ask for
_SAMPLES = 256  # patterns that corrections are planned from
_SAMPLE_BYTES = 128 * 2**20  # and the most memory that they may take, as float64
_CALIBRATING = ("kv", "scale", "centre", "shape", "size", "keep")


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
    **corrections: Any,
) -> dict[str, Any]:
    """Write the scan in the file `scan` to the store `out`, never loading more than a block of it.

    Parameters
    ----------
    scan
        A file that rosettasciio reads as a stack of patterns.
    out
        The store.
    kv
        Acceleration voltage in kV; left out, the file's.
    scale
        1/Å per pixel of the file; left out, the file's.
    centre
        (row, column) of the direct beam in pixels, also as text "y,x"; or "auto", a fit over the scan. A fit that
        agrees with the centre in the file's axes within 0.25 px gives way to it.
    shape
        (rows, columns) of the scan, also as text "ny,nx", for a file that is only a stack of frames.
    size
        Width and height of the stored patterns; left out, the shorter edge of the measured ones.
    keep
        The part of the scan to keep, as text "0:ny,0:nx".
    **corrections
        What else is done to the patterns: `descan`, `ellipse`, `bad_pixels`, `beam_stop`, `background`, `flip`,
        `scan_rotation` and `calibrate`; see `corrections.Wanted`. None means the default.

    Returns
    -------
    facts
        What was found and done: `patterns`, `scan_shape`, the stored geometry (`size`, `kv`, `scale_inv_angstrom`,
        `centre_px`), the beam in the file (`origin_centre_px`, `centre_spread_px`), `copied`: whether the counts
        were copied as they were, `scan_rotation_deg`, `corrections` (see `planning.Plan.facts`) and `notes`.

    Raises
    ------
    UserError
        For a file that cannot be read, is not calibrated, or holds NaN or negative counts.
    """
    given = dict(zip(_CALIBRATING, (kv, scale, centre, shape, size, keep), strict=True))
    wanted = Wanted.of(corrections)
    if size is not None and not _SIZES[0] <= size <= _SIZES[1]:
        raise UserError(f"--size is {size}, but must be in [{_SIZES[0]}, {_SIZES[1]}]")
    replaceable_store(out)
    source = read_scan(scan, None if shape is None else _pair(shape, "--shape"))
    window = _window(keep, source.shape)
    volts, step = _calibrated(source, kv, scale, wanted.calibrate != "")
    planned = _planned(source, window, wanted, size, step, centre)
    for note in planned.notes:
        print(f"note: {note}", file=sys.stderr)
    done, beam = planned.corrections, planned.corrections.beam
    dtype = _stored_type(source.data.dtype) if done.exact else np.dtype(np.float32)
    geometry = Geometry(done.size, planned.scale * done.factor, volts)
    extent = (window.bottom - window.top, window.right - window.left)
    facts = {
        "scan_shape": list(extent),
        "origin_centre_px": [beam.row, beam.column],
        "centre_spread_px": beam.spread_px,
        "copied": done.exact,
        "scan_rotation_deg": wanted.scan_rotation,
        "corrections": planned.facts,
        "notes": planned.notes,
    }
    attrs = {
        **facts,
        "step_nm": source.step_nm,
        "origin": source.path.name,
        "origin_sha256": file_sha256(source.path),
        "origin_window": list(window),
        "command": "ingest",
        "options": {"scan": str(scan), **given, **corrections},
    }
    with StoreWriter(out, math.prod(extent), geometry, dtype=dtype, attrs=attrs, calibration=planned.shown) as writer:
        _copy(source, window, done, writer)
    return {"patterns": math.prod(extent), **facts, **geometry.to_dict()}


def corrected_at(
    scan: str | os.PathLike[str],
    positions: Sequence[tuple[int, int]],
    kv: float | None = None,
    scale: float | None = None,
    centre: str | tuple[float, float] = "auto",
    shape: str | tuple[int, int] | None = None,
    size: int | None = None,
    keep: str | None = None,
    **corrections: Any,
) -> npt.NDArray[Any]:
    """Return the patterns (n, size, size) at `positions` of the part that is kept, as `ingest` stores them."""
    source = read_scan(scan, None if shape is None else _pair(shape, "--shape"))
    window, wanted = _window(keep, source.shape), Wanted.of(corrections)
    _, step = _calibrated(source, kv, scale, wanted.calibrate != "")
    planned = _planned(source, window, wanted, size, step, centre)
    chosen = [_computed(source, source.data[row + window.top, column + window.left]) for row, column in positions]
    return planned.corrections(np.stack(chosen), np.asarray(positions))


def _planned(
    source: Scan,
    window: Window,
    wanted: Wanted,
    size: int | None,
    scale: float | None,
    centre: str | tuple[float, float],
) -> Plan:
    given = _given_centre(centre, source.pattern_shape)
    return plan(sample(source, window), wanted, size or min(source.pattern_shape), scale, given, source.centre_px)


def _copy(source: Scan, window: Window, done: Corrections, writer: StoreWriter) -> None:
    """Write the patterns of a window of a scan, block by block, each line of a block as one run of rows."""
    columns, size = window.right - window.left, done.size
    with tqdm(total=writer.n, unit="pattern", desc="ingest", disable=None) as progress:
        for row, column, block in blocks(source, window):
            rows, width = block.shape[:2]
            place = np.stack(np.mgrid[row : row + rows, column : column + width], axis=-1) - (window.top, window.left)
            patterns = done(block.reshape(-1, *source.pattern_shape), place.reshape(-1, 2))
            for line, where in zip(patterns.reshape(rows, width, size, size), place, strict=True):
                start = int(where[0, 0] * columns + where[0, 1])
                writer.write(start, line, position=where, group=scan_group(where, columns))
            progress.update(rows * width)


def scan_group(position: npt.NDArray[Any], columns: int, block: int = BLOCK) -> npt.NDArray[np.int32]:
    """Return the group (n,) of scan positions (n, 2): blocks of `block` x `block` of a scan of `columns` columns."""
    row, column = position[:, 0] // block, position[:, 1] // block
    return np.asarray(row * math.ceil(columns / block) + column, dtype=np.int32)


def blocks(scan: Scan, window: Window) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """Yield (row, column, patterns (rows, columns, H, W)) of `window`, block by block as they lie in the file.

    Raises
    ------
    UserError
        When a block cannot be read, or holds NaN or negative counts.
    """
    data = scan.data[window.top : window.bottom, window.left : window.right]
    pattern_bytes = math.prod(scan.pattern_shape) * data.dtype.itemsize
    top = 0
    for height in data.chunks[0]:
        left = 0
        for width in data.chunks[1]:
            lines = max(1, min(height, _BYTES // (pattern_bytes * width)))
            span = max(1, min(width, _BYTES // (pattern_bytes * lines)))
            for row in range(top, top + height, lines):
                for column in range(left, left + width, span):
                    part = data[row : min(row + lines, top + height), column : min(column + span, left + width)]
                    yield _checked(scan, part, window.top + row, window.left + column)
            left += width
        top += height


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, or of all files in a folder by name (some formats are folders)."""
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(part.relative_to(path).as_posix().encode())
        if part.is_file():
            with part.open("rb") as file:
                while piece := file.read(2**22):
                    digest.update(piece)
    return digest.hexdigest()


def _checked(scan: Scan, part: Any, row: int, column: int) -> tuple[int, int, npt.NDArray[Any]]:
    counts = _computed(scan, part)
    bad = ~np.isfinite(counts) if counts.dtype.kind == "f" else np.zeros((), dtype=bool)
    if counts.dtype.kind in "if":
        bad = bad | (counts < 0)
    if bad.any():
        y, x, i, j = (int(index) for index in np.argwhere(bad)[0])
        value = counts[y, x, i, j]
        kind = "a negative count" if value < 0 else "no number"
        raise UserError(
            f"{scan.path.name} has {kind} ({value:g}) at pixel ({i}, {j}) of the pattern at scan position "
            f"({row + y}, {column + x}); counts must be finite and 0 or more, mend the file or leave it out by --keep"
        )
    return row, column, np.ascontiguousarray(counts, dtype=_stored_type(counts.dtype))


def _computed(scan: Scan, part: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(part.compute(scheduler="threads"))
    except Exception as problem:  # whatever the reader's library raises on a damaged file
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{scan.path.name} cannot be read to its end: {reason}") from None


def _stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the store's type that holds counts of `dtype` without loss (beyond 2^24, to 7 digits)."""
    if dtype.kind == "b" or (dtype.kind in "ui" and dtype.itemsize == 1):
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if dtype.kind in "ui" and dtype.itemsize == 2 else np.dtype(np.float32)


def _calibrated(
    scan: Scan, kv: float | None, scale: float | None, searched: bool = False
) -> tuple[float, float | None]:
    """Return voltage (kV) and scale (1/Å per pixel of the file), from the options or the file.

    The scale may be None only where it is `searched` for.
    """
    kv = kv if kv is not None else scan.kv
    scale = scale if scale is not None else scan.scale_inv_angstrom(kv)
    name = scan.path.name
    if kv is None or (scale is None and not searched):
        what = "the acceleration voltage; give --kv, 200 for instance"
        if scale is None and not searched:
            what = "how many 1/Å a pixel is; give --scale, 0.02 for instance" + (", and --kv" if kv is None else "")
        raise UserError(f"{name} does not say {what}")
    if not 20 <= kv <= 1500:
        raise UserError(f"the acceleration voltage of {name} is {kv:g} kV, but must be in [20, 1500]; give --kv")
    if scale is not None and not 0 < scale <= 1:
        raise UserError(f"the scale of {name} is {scale:g} 1/Å per pixel, but must be in (0, 1]; give --scale")
    return kv, scale


def _given_centre(wanted: str | tuple[float, float], shape: tuple[int, int]) -> tuple[float, float] | None:
    """Return the direct beam's place that the user gave for patterns of `shape`; None where it is to be found."""
    if wanted == "auto":
        return None
    row, column = _pair(wanted, "--centre", whole=False)
    height, width = shape
    if not (0 <= row <= height - 1 and 0 <= column <= width - 1):
        raise UserError(f"--centre {row:g},{column:g} lies outside of the {height} x {width} pixels of a pattern")
    return row, column


def sample(scan: Scan, window: Window, count: int = _SAMPLES) -> Sample:
    """Return about `count` patterns, fewer large ones, from 16 stretches of rows spread evenly over the window."""
    rows, columns = window.bottom - window.top, window.right - window.left
    count = max(6, min(count, _SAMPLE_BYTES // (8 * math.prod(scan.pattern_shape))))
    lines = np.unique(np.linspace(window.top, window.bottom - 1, min(rows, 16)).round().astype(int))
    step = max(1, round(columns * len(lines) / count))
    picked = [(line, np.arange(window.left + line % step, window.right, step)) for line in lines]
    picked = [(line, chosen) for line, chosen in picked if len(chosen)]
    parts = [_computed(scan, scan.data[line, chosen[0] : window.right : step]) for line, chosen in picked]
    counts = np.concatenate(parts)
    place = [np.column_stack((np.full(len(chosen), line), chosen)) for line, chosen in picked]
    shape = (window.bottom - window.top, window.right - window.left)
    whole = np.nan_to_num(counts) if counts.dtype.kind == "f" else counts
    return Sample(whole, np.concatenate(place) - (window.top, window.left), shape)


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
