"""A measured scan becomes a store: read in blocks, checked, calibrated, and moved so that the beam is in the middle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune._parallel import prefetch
from stemtune._progress import Progress
from stemtune._version import __version__
from stemtune.dataset.schema import CONTENT_SHA256, replaceable_store
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.scan.corrections import CorrectionOptions, Corrections
from stemtune.scan.plan import Plan, Sample, plan
from stemtune.scan.readers import read_scan
from stemtune.scan.readers.scan import Scan, Window, blocks, read_part, stored_type

BLOCK = 8  # scan positions along the edge of a group: neighbours in one block are never on both sides of a split
_SIZES = (8, 2048)  # smallest and largest patterns that --size may ask for
_SAMPLES = 256  # patterns that corrections are planned from
_SAMPLE_BYTES = 128 * 2**20  # and the most memory that they may take, as float64
_HASHED_BYTES = 2**20  # read at a time
_CALIBRATING = ("kv", "scale", "centre", "shape", "size", "keep", "dataset")


def ingest(
    scan: str | os.PathLike[str] | Scan,
    out: str | os.PathLike[str],
    kv: float | None = None,
    scale: float | None = None,
    centre: str | tuple[float, float] = "auto",
    shape: str | tuple[int, int] | None = None,
    size: int | None = None,
    keep: str | None = None,
    dataset: str | None = None,
    **corrections: Any,
) -> dict[str, Any]:
    """Write the scan in the file `scan` to the store `out`, never loading more than a block of it.

    Parameters
    ----------
    scan, out
        A file that `scan.readers` reads as a stack of patterns, or a scan that has been opened; and the store.
    kv, scale
        Acceleration voltage in kV and 1/Å per pixel of the file; left out, the file's. Bragg peaks are drawn at it.
    centre
        (row, column) of the direct beam in pixels, also as text "y,x"; or "auto", a fit over the scan. A fit that
        agrees with the centre in the file's axes within 0.25 px gives way to it.
    shape
        (rows, columns) of the scan, also as text "ny,nx", for a file that is only a stack of frames.
    size, keep
        Width and height of the stored patterns, else the shorter edge of the measured ones; rows and columns of the
        scan to keep, as text "0:ny,0:nx".
    dataset
        Which array of an HDF5 or .npz file is the scan, where there are several.
    **corrections
        What else is done to the patterns: `descan`, `ellipse`, `bad_pixels`, `beam_stop`, `background`, `flip`,
        `scan_rotation` and `calibrate`; see `corrections.CorrectionOptions`. None means the default.

    Returns
    -------
    facts
        What was found and done: `patterns`, `scan_shape`, the stored geometry (`size`, `kv`, `scale_inv_angstrom`,
        `centre_px`), the beam in the file (`origin_centre_px`, `centre_spread_px`), `copied`: whether the counts
        were copied as they were, `scan_rotation_deg`, `corrections` (see `scan.plan.Plan.facts`) and `notes`.

    Raises
    ------
    UserError
        For a file that cannot be read, is not calibrated, or holds NaN or negative counts.
    """
    given: dict[str, Any] = dict(zip(_CALIBRATING, (kv, scale, centre, shape, size, keep, dataset), strict=True))
    if size is not None and not _SIZES[0] <= size <= _SIZES[1]:
        raise UserError(f"--size is {size}, but must be in [{_SIZES[0]}, {_SIZES[1]}]")
    replaceable_store(out)
    source, window, planned, geometry = _planned(scan, **given, **corrections)
    for note in planned.notes:
        print(f"note: {note}", file=sys.stderr)
    done, beam = planned.corrections, planned.corrections.beam
    dtype = stored_type(source.data.dtype) if done.exact else np.dtype(np.float32)
    extent = (window.bottom - window.top, window.right - window.left)
    facts = {
        "scan_shape": list(extent),
        "origin_centre_px": [beam.row, beam.column],
        "centre_spread_px": beam.spread_px,
        "copied": done.exact,
        "scan_rotation_deg": float(corrections.get("scan_rotation") or 0.0),
        "corrections": planned.facts,
        "notes": planned.notes,
    }
    attrs = {
        **facts,
        "step_nm": source.step_nm,
        "origin": source.path.name,
        "origin_sha256": "0" * 64,  # until it has been read
        "origin_window": list(window),
        "command": "ingest",
        "options": {"scan": str(source.path), **given, **corrections},
    }
    how: dict[str, Any] = {"dtype": dtype, "attrs": attrs, "calibration": planned.evidence, "hashed": False}
    with StoreWriter(out, math.prod(extent), geometry, **how) as writer:
        digest = _copy(source, window, done, writer)
        writer.amend("origin_sha256", digest)
        content = json.dumps([digest, list(window), given, corrections, __version__], default=str)
        writer.amend(CONTENT_SHA256, np.bytes_(hashlib.sha256(content.encode()).hexdigest()))
    return {"patterns": math.prod(extent), **facts, **geometry.to_dict()}


def _copy(source: Scan, window: Window, done: Corrections, writer: StoreWriter) -> str:
    """Write the patterns of a window of a scan block by block, and return the sha256 of the scan's files.

    The next block is read, and the file hashed as far as it has been copied, while a block is written.
    """
    columns = window.right - window.left
    file_hash, copied = ScanHash(source.path, source.parts), 0
    with (
        ThreadPoolExecutor(1) as hashing,
        closing(prefetch(blocks(source, window), 1)) as coming,
        Progress(writer.n, "ingest", "pattern") as progress,
    ):
        hashed = hashing.submit(file_hash.advance, 0.0)
        for row, column, block in coming:
            hashed.result()  # no further behind than a block, or the file would have to come from the disk again
            rows, width = block.shape[:2]
            copied += rows * width
            hashed = hashing.submit(file_hash.advance, copied / writer.n)
            place = np.argwhere(np.ones((rows, width))) + np.array((row - window.top, column - window.left))
            patterns = done(block.reshape(-1, *source.pattern_shape), place)
            run = len(place) if width == columns else width  # positions that follow each other in the store
            for first in range(0, len(place), run):
                where = place[first : first + run]
                start = int(where[0, 0]) * columns + int(where[0, 1])
                writer.write(start, patterns[first : first + run], position=where, group=scan_group(where, columns))
            progress.update(rows * width)
        hashed.result()
    return file_hash.finish()


def corrected_at(
    scan: str | os.PathLike[str], positions: Sequence[tuple[int, int]], **calibration: Any
) -> npt.NDArray[Any]:
    """Return the patterns (n, size, size) at `positions` of the part that is kept, as `ingest` stores them."""
    source, window, planned, _ = _planned(scan, **calibration)
    chosen = [read_part(source, source.data[row + window.top, column + window.left]) for row, column in positions]
    return planned.corrections(np.stack(chosen), np.asarray(positions))


def _planned(scan: str | os.PathLike[str] | Scan, **calibration: Any) -> tuple[Scan, Window, Plan, Geometry]:
    """Return the scan, the part that is kept, what is to be done to its patterns, and their calibration afterwards."""
    kv, scale, centre, shape, size, keep, dataset = (calibration.pop(name, None) for name in _CALIBRATING)
    options = CorrectionOptions.of(calibration)
    if not isinstance(scan, Scan):
        scan = read_scan(scan, None if shape is None else pair(shape, "--shape"), dataset, size, scale)
    window = kept_window(keep, scan.shape)
    return scan, window, *plan_for(scan, window, options, kv, scale, size, "auto" if centre is None else centre)


def plan_for(
    source: Scan,
    window: Window,
    options: CorrectionOptions,
    kv: float | None = None,
    scale: float | None = None,
    size: int | None = None,
    centre: str | tuple[float, float] = "auto",
) -> tuple[Plan, Geometry]:
    """Return what is to be done to the patterns in `window` of a scan, and how they are calibrated afterwards."""
    volts, step = _calibrated(source, kv, scale, options.calibrate != "")
    given = _given_centre(centre, source.pattern_shape)
    size = size or min(source.pattern_shape)
    planned = plan(sample(source, window), options, size, step, given, source.centre_px)
    return planned, Geometry(size, planned.scale * planned.corrections.factor, volts)


def scan_group(position: npt.NDArray[Any], columns: int, block: int = BLOCK) -> npt.NDArray[np.int32]:
    """Return the group (n,) of scan positions (n, 2): blocks of `block` x `block` of a scan of `columns` columns."""
    row, column = position[:, 0] // block, position[:, 1] // block
    return np.asarray(row * math.ceil(columns / block) + column, dtype=np.int32)


def _calibrated(
    scan: Scan, kv: float | None, scale: float | None, searched: bool = False
) -> tuple[float, float | None]:
    """Return kV and 1/Å per pixel of the file, from the options or the file; no scale only where it is `searched`."""
    kv = kv if kv is not None else scan.kv
    scale = scale if scale is not None else scan.scale_inv_angstrom(kv)
    name = scan.path.name
    if scale is None and not searched:
        also = ", and --kv" if kv is None else ""
        raise UserError(f"{name} does not say how many 1/Å a pixel is; give --scale, 0.02 for instance{also}")
    if kv is None:
        raise UserError(f"{name} does not say the acceleration voltage; give --kv, 200 for instance")
    if not 20 <= kv <= 1500:
        raise UserError(f"the acceleration voltage of {name} is {kv:g} kV, but must be in [20, 1500]; give --kv")
    if scale is not None and not 0 < scale <= 1:
        raise UserError(f"the scale of {name} is {scale:g} 1/Å per pixel, but must be in (0, 1]; give --scale")
    return kv, scale


def _given_centre(wanted: str | tuple[float, float], shape: tuple[int, int]) -> tuple[float, float] | None:
    """Return the direct beam's place that the user gave for patterns of `shape`; None where it is to be found."""
    if wanted == "auto":
        return None
    row, column = pair(wanted, "--centre", whole=False)
    if not (0 <= row <= shape[0] - 1 and 0 <= column <= shape[1] - 1):
        raise UserError(f"--centre {row:g},{column:g} lies outside of the {shape[0]} x {shape[1]} pixels of a pattern")
    return row, column


def sample(scan: Scan, window: Window, count: int = _SAMPLES) -> Sample:
    """Return about `count` patterns, fewer large ones, from 16 stretches of rows spread evenly over the window."""
    rows, columns = window.bottom - window.top, window.right - window.left
    count = max(6, min(count, _SAMPLE_BYTES // (8 * math.prod(scan.pattern_shape))))
    lines = np.unique(np.linspace(window.top, window.bottom - 1, min(rows, 16)).round().astype(int))
    step = max(1, round(columns * len(lines) / count))
    picked = [(line, np.arange(window.left + line % step, window.right, step)) for line in lines]
    picked = [(line, chosen) for line, chosen in picked if len(chosen)]
    parts = [read_part(scan, scan.data[line, chosen[0] : window.right : step]) for line, chosen in picked]
    counts = np.concatenate(parts)
    place = np.array([(line, column) for line, chosen in picked for column in chosen])
    whole = np.nan_to_num(counts) if counts.dtype.kind == "f" else counts
    return Sample(whole, place - np.array((window.top, window.left)), (rows, columns))


def kept_window(keep: str | None, shape: tuple[int, int]) -> Window:
    """Return the part of a scan of `shape` that the text `keep` ("0:ny,0:nx") names; None is all of it."""
    if keep is None:
        return Window(0, 0, *shape)
    try:
        ends = [[int(end) if end.strip() else None for end in part.split(":")] for part in keep.split(",")]
        rows, columns = (slice(*part) for part in ends)
    except ValueError:
        raise UserError(f"--keep is '{keep}', but must be rows and columns as 0:ny,0:nx") from None
    spans = [span.indices(length) for span, length in zip((rows, columns), shape, strict=True)]
    over = any((span.stop or 0) > length for span, length in zip((rows, columns), shape, strict=True))
    if over or any(stop <= start or step != 1 for start, stop, step in spans):
        raise UserError(f"--keep is '{keep}', but the scan has the rows 0:{shape[0]} and the columns 0:{shape[1]}")
    return Window(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def pair(value: Any, flag: str, whole: bool = True) -> tuple[Any, Any]:
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


class ScanHash:
    """The sha256 of a scan's files, taken piece by piece beside the copying, so that each byte leaves the disk once.

    `path` is the file, or the folder that some formats are, `parts` further files of the same scan. With them, or for
    a folder, names are hashed too.
    """

    def __init__(self, path: Path, parts: Sequence[Path] = ()) -> None:
        files = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path, *parts]
        self._total, self._read = sum(part.stat().st_size for part in files), 0
        self._pieces, self._digest = _pieces(path, parts), hashlib.sha256()

    def advance(self, share: float) -> None:
        """Go on until this share of the bytes, 0 to 1, is done."""
        while self._read < share * self._total and (piece := next(self._pieces, None)) is not None:
            self._digest.update(piece)
            self._read += len(piece)

    def finish(self) -> str:
        """Do what is left and return the digest in hexadecimal digits."""
        for piece in self._pieces:
            self._digest.update(piece)
        return self._digest.hexdigest()


def _pieces(path: Path, parts: Sequence[Path]) -> Iterator[bytes | memoryview]:
    """Yield names and contents; a piece is overwritten by the next one."""
    folder = path.is_dir()
    for part in sorted(path.rglob("*")) if folder else [path, *parts]:
        if folder or parts:
            yield (part.relative_to(path).as_posix() if folder else part.name).encode()
        if part.is_file():
            piece = memoryview(bytearray(_HASHED_BYTES))
            with part.open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    yield piece[:count]
