"""What py4DSTEM, and the EMD files that it grew from, keep beside an array: calibrations, and Bragg peaks.

py4DSTEM's x is array axis 0 (rows) and its y is axis 1 (columns), of the scan as of the pattern; so an array is taken
as it lies, and (x, y) pairs are (row, column).

Files of Bragg peaks hold positions and intensities only, so they are drawn as patterns again. Each peak becomes a
Gaussian spot of the standard deviation `SPOT_PX` on a grid of square pixels with the direct beam in the middle, its
counts in proportion to the peak's intensity; the mean pattern holds `COUNTS` counts. Positions are calibrated as the
file says, in py4DSTEM's order: origin, ellipse, pixel size. qx runs along rows, qy along columns.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers import scan as base
from stemtune.scan.readers.scan import Frames, Scan, lazily, scan_step

FloatArray = npt.NDArray[np.float64]

SPOT_PX = 1.1  # standard deviation of a spot in pixels: its neighbours tell where between pixels it is
COUNTS = 5000.0  # counts of a pattern in the mean over the scan, for py4DSTEM's intensities have no unit
_REACH_PX = 5  # from a spot's middle to where it is cut off
_SIZE = 128  # of the patterns, where neither the options nor the file say
_SAMPLED_ROWS = 64  # of the scan, that the grid and the counts are fitted to
_LARGEST_Q = 5.0  # 1/Å: positions around 0 that stay below are in 1/Å, not in pixels
_PRISMATIC = "4DSTEM_simulation"

# Where py4DSTEM has kept calibrations over the years, from the group of the data or from one above it.
_PLACES = ("metadatabundle/calibration", "calibration", "_metadata/calibration", "metadata/metadata_0/calibration")


class Calibration(NamedTuple):
    """What is known of an array: as the attributes of `Scan`; and for peaks, `origin` and `ellipse`.

    `origin` is (row, column) of the direct beam in pixels, (2,) for the scan or (rows, columns, 2) per position;
    `ellipse` is (a, b, theta): half axes of what should be a circle, and the angle of a in rad from rows to columns.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    units: str = ""
    kv: float | None = None
    centre_px: tuple[float, float] | None = None
    step_nm: tuple[float, float] | None = None
    rotation_deg: float | None = None
    flip: bool | None = None
    origin: FloatArray | None = None
    ellipse: tuple[float, float, float] | None = None


def calibration_of(group: h5py.Group, data: h5py.Dataset | None = None) -> Calibration:
    """Return the calibration of what lies in `group`: py4DSTEM's own, or the axes of the array `data`."""
    kept = _kept(group)
    by_axes = _by_axes(group, data) if data is not None else Calibration()
    size, units = _number(kept.get("Q_pixel_size")), kept.get("Q_pixel_units")
    if size is None or str(units) in ("pixels", "None", ""):
        found = by_axes
    else:
        step, step_units = _number(kept.get("R_pixel_size")), kept.get("R_pixel_units")
        found = Calibration((size, size), str(units), by_axes.kv)
        found = found._replace(step_nm=scan_step([step] * 2, [step_units] * 2))
    origin = _origin(kept)
    if origin is not None:
        middle = _middle(origin)
        found = found._replace(origin=origin, centre_px=(float(middle[0]), float(middle[1])))
    a, b, theta = (_number(kept.get(name)) for name in ("a", "b", "theta"))
    rotation, flip = _number(kept.get("QR_rotation_degrees")), kept.get("QR_flip")
    if rotation is None and (radians := _number(kept.get("QR_rotation"))) is not None:
        rotation = math.degrees(radians)
    return found._replace(
        ellipse=(a, b, theta) if a and b and theta is not None else None,
        rotation_deg=rotation,
        flip=bool(flip) if isinstance(flip, int | float) else None,
    )


def _kept(group: h5py.Group) -> dict[str, Any]:
    """Return the entries of the nearest calibration: of this group or of one above it."""
    while True:
        for place in _PLACES:
            held = group.get(place)
            if isinstance(held, h5py.Group):
                entries = {name: item[()] for name, item in held.items() if isinstance(item, h5py.Dataset)}
                return {name: _plain(value) for name, value in (*held.attrs.items(), *entries.items())}
        if group.name == "/":
            return {}
        group = group.parent


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def _number(value: Any) -> float | None:
    found = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return float(found) if math.isfinite(found) else None


def _origin(kept: dict[str, Any]) -> FloatArray | None:
    """Return the direct beam's (row, column), per position where it was measured so, else the mean."""
    for names in (("qx0", "qy0"), ("qx0_mean", "qy0_mean")):
        pair = [np.asarray(kept.get(name)) for name in names]
        if all(value.dtype.kind in "iuf" and value.ndim in (0, 2) for value in pair) and pair[0].shape == pair[1].shape:
            found = np.stack(pair, axis=-1).astype(np.float64)
            if np.isfinite(found).any():
                return found
    return None


def _by_axes(group: h5py.Group, data: h5py.Dataset) -> Calibration:
    """Return what the vectors dim1, dim2 ... (or dim0 ...) say that EMD files keep beside an array."""
    first = 0 if "dim0" in group else 1
    vectors = [group.get(f"dim{first + number}") for number in range(data.ndim)]
    if not all(isinstance(vector, h5py.Dataset) and vector.ndim == 1 and len(vector) > 1 for vector in vectors):
        return Calibration()
    start = [float(vector[0]) for vector in vectors]
    scale = [float(vector[1]) - float(vector[0]) for vector in vectors]
    units = [str(_plain(vector.attrs.get("units", ""))) for vector in vectors]
    kv = None
    if _PRISMATIC in group.file:  # it writes Å and calls them nm
        units = [unit.replace("n_m", "Å") for unit in units]
        settings = group.file.get(f"{_PRISMATIC}/metadata/metadata_0/original/simulation_parameters")
        kv = base.checked_kv(_number(_plain(settings.attrs.get("E")))) if settings is not None else None
    centre = base.beam_by_axes(start[-2:], scale[-2:], data.shape[-2:], units[-1])
    return Calibration((scale[-2], scale[-1]), units[-1], kv, centre, scan_step(scale[-4:-2], units[-4:-2]))


def read_peaks(
    path: Path, group: h5py.Group, shape: tuple[int, int] | None, size: int | None, scale: float | None
) -> Scan:
    """Return the peaks of a PointListArray, drawn on patterns of `size` pixels of `scale` 1/Å, as a scan.

    The `data` (rows, columns) of `group` are lists of qx, qy and intensity; `shape` lays them out anew. Without `size`
    and `scale` the grid is that of the detector, or one that holds every peak. Where the file says no 1/Å, patterns
    have the detector's pixels, and `scale` is what they are taken for.
    """
    data, calibration = group["data"], calibration_of(group)
    laid = base.scan_shape(path.name, data.shape, shape)
    sampled = np.unique(np.linspace(0, len(data) - 1, min(len(data), _SAMPLED_ROWS)).round().astype(int))
    lists = [peaks for row in sampled for peaks in data[row]]
    raw = np.concatenate(lists)
    if not len(raw):
        raise UserError(f"{path.name} holds no Bragg peaks in {group.name}")
    factor, origin = _frame(raw, lists, calibration)
    step, ellipse = factor or 1.0, None if origin is None else calibration.ellipse  # centred: calibrated already
    positions = _positions(raw, np.zeros(2) if origin is None else _middle(origin), ellipse) * step
    shape_px = group.parent.get("metadatabundle/_braggvectors_shape/Qshape")  # of the detector; BraggVectors keep it
    detector = int(max(shape_px)) if isinstance(shape_px, h5py.Dataset) and shape_px.shape == (2,) else 0
    size = size or detector or _SIZE
    if factor is None:
        pixel = 1.0
    elif scale is not None:
        pixel = scale
    elif detector and origin is not None:
        pixel = step * detector / size
    else:
        pixel = float(np.abs(positions).max()) / ((size - 1) / 2 - 3)
    gain = COUNTS * len(lists) / float(raw["intensity"].sum())
    read = partial(_drawn, data, origin, ellipse, step / pixel, size, gain)
    return Scan(
        path,
        lazily(Frames((*laid, size, size), np.float32, read)),
        (pixel, pixel),
        "1/Å" if factor is not None else "px",
        calibration.kv,
        ((size - 1) / 2, (size - 1) / 2),
        calibration.step_nm,
        calibration.rotation_deg,
        calibration.flip,
    )


def draw(
    positions: FloatArray, intensity: FloatArray, owner: npt.NDArray[Any], n: int, size: int
) -> npt.NDArray[np.float32]:
    """Return patterns (n, size, size) with a Gaussian spot for every peak.

    `positions` (P, 2) are (row, column) in pixels, `intensity` (P,) the sums of the spots' counts, `owner` (P,) the
    numbers of the patterns that they belong to.
    """
    near = np.rint(positions).astype(np.int64)
    offsets = np.arange(-_REACH_PX, _REACH_PX + 1)
    pixel = near[:, :, None] + offsets  # (P, 2, 2 reach + 1)
    profile = np.exp(-0.5 * ((pixel - positions[:, :, None]) / SPOT_PX) ** 2) / (SPOT_PX * math.sqrt(2 * math.pi))
    profile = np.where((pixel >= 0) & (pixel < size), profile, 0.0)
    pixel = np.clip(pixel, 0, size - 1)
    value = intensity[:, None, None] * profile[:, 0, :, None] * profile[:, 1, None, :]
    place = (owner[:, None, None] * size + pixel[:, 0, :, None]) * size + pixel[:, 1, None, :]
    drawn = np.bincount(place.ravel(), weights=value.ravel(), minlength=n * size * size)
    return drawn.astype(np.float32).reshape(n, size, size)


def _drawn(
    data: h5py.Dataset,
    origin: FloatArray | None,
    ellipse: tuple[float, float, float] | None,
    px_per_step: float,
    size: int,
    gain: float,
    first: int,
    end: int,
) -> npt.NDArray[np.float32]:
    """Return the patterns (end - first, size, size) of the scan positions from `first` to before `end`."""
    columns = data.shape[1]
    lists = [
        peaks
        for row in range(first // columns, (end - 1) // columns + 1)
        for peaks in data[row, max(0, first - row * columns) : min(columns, end - row * columns)]
    ]
    peaks, owner = np.concatenate(lists), np.repeat(np.arange(len(lists)), [len(peaks) for peaks in lists])
    origin = np.zeros((1, 2)) if origin is None else origin
    if origin.ndim == 3:
        at = origin[np.divmod(np.arange(first, end), columns)]
        origin = np.where(np.isfinite(at), at, _middle(origin))[owner]
    found = _positions(peaks, origin, ellipse) * px_per_step + (size - 1) / 2
    return draw(found, peaks["intensity"] * gain, owner, len(lists), size)


def _positions(peaks: npt.NDArray[Any], origin: FloatArray, ellipse: tuple[float, float, float] | None) -> FloatArray:
    """Return (row, column) (P, 2) of peaks from the direct beam, with ellipses made circles of the half axis b."""
    found = np.stack([peaks["qx"], peaks["qy"]], axis=1).astype(np.float64) - origin
    if ellipse is not None:
        a, b, theta = ellipse
        long = np.array([math.cos(theta), math.sin(theta)])
        found -= (1 - b / a) * np.outer(found @ long, long)
    return np.asarray(found)


def _frame(
    raw: npt.NDArray[Any], lists: list[npt.NDArray[Any]], calibration: Calibration
) -> tuple[float | None, FloatArray | None]:
    """Return 1/Å per unit of the positions, or None if that is unknown, and where the direct beam is, or None for 0.

    Positions on both sides of 0 are from the direct beam already, and in 1/Å if they are that small. Others are in
    the detector's pixels; without an origin in the file, the beam is where the strongest peak mostly is.
    """
    q = np.stack([raw["qx"], raw["qy"]])
    units = base.reciprocal_factor(calibration.units, calibration.kv)
    factor = None if units is None else calibration.scale[0] * units
    if (q.min(axis=1) < 0).all():
        return (1.0, None) if np.abs(q).max() <= _LARGEST_Q else (factor, None)
    if calibration.origin is not None:
        return factor, calibration.origin
    strongest = [peaks[np.argmax(peaks["intensity"])][["qx", "qy"]].tolist() for peaks in lists if len(peaks)]
    return factor, np.median(strongest, axis=0)


def _middle(origin: FloatArray) -> FloatArray:
    return np.asarray(np.nanmedian(origin.reshape(-1, 2), axis=0))
