"""Bragg peaks that py4DSTEM has found, drawn as patterns again: its files hold positions and intensities only.

Each peak becomes a Gaussian spot of the standard deviation `SPOT_PX` on a grid of square pixels with the direct beam
in the middle, its counts in proportion to the peak's intensity; the mean pattern holds `COUNTS` counts. Positions are
calibrated as the file says, in py4DSTEM's order: origin, ellipse, pixel size. qx runs along rows, qy along columns.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers.cube import Calibration
from stemtune.scan.readers.lazy import Frames, lazily
from stemtune.scan.readers.scan import Scan, reciprocal_factor, scan_shape

SPOT_PX = 1.1
"""Standard deviation of a spot in pixels: its neighbours tell where between pixels it stands."""

COUNTS = 5000.0
"""Counts of a pattern in the mean over the scan, for py4DSTEM's intensities have no unit."""

_REACH = 5  # pixels from a spot's middle to where it is cut off
_SIZE = 128  # of the patterns, where neither the options nor the file say
_SAMPLED_ROWS = 64  # of the scan, that the grid and the counts are fitted to
_CALIBRATED = 5.0  # 1/Å: positions around 0 that stay below are in 1/Å, not in pixels


def read_peaks(
    path: Path,
    group: h5py.Group,
    calibration: Calibration,
    shape: tuple[int, int] | None,
    size: int | None,
    scale: float | None,
) -> Scan:
    """Return the peaks of a PointListArray, drawn on patterns of `size` pixels of `scale` 1/Å, as a scan.

    Parameters
    ----------
    path
        The file.
    group
        The PointListArray: its `data` (rows, columns) are lists of qx, qy and intensity.
    calibration
        As the file has it.
    shape
        Rows and columns, where the peaks' own are to be laid out anew.
    size, scale
        The grid; left out, that of the detector, or one that holds every peak. Where the file says no 1/Å, patterns
        have the detector's pixels, and `scale` is what they are taken for.

    Raises
    ------
    UserError
        When there are no peaks, or not as many lists as `shape` asks for.
    """
    data = group["data"]
    rows, columns = scan_shape(path.name, data.shape, shape)
    sampled = np.unique(np.linspace(0, len(data) - 1, min(len(data), _SAMPLED_ROWS)).round().astype(int))
    lists = [peaks for row in sampled for peaks in data[row]]
    raw = np.concatenate(lists)
    if not len(raw):
        raise UserError(f"{path.name} holds no Bragg peaks in {group.name}")
    factor, origin = _frame(raw, lists, calibration)
    step, ellipse = factor or 1.0, None if origin is None else calibration.ellipse  # centred: calibrated already
    positions = _positions(raw, np.zeros(2) if origin is None else _middle(origin), ellipse) * step
    detector = _detector(group)
    size = size or (max(detector) if detector else _SIZE)
    if factor is None:
        pixel = 1.0
    elif scale is not None:
        pixel = scale
    elif detector and origin is not None:
        pixel = step * max(detector) / size
    else:
        pixel = float(np.abs(positions).max()) / ((size - 1) / 2 - 3)
    gain = COUNTS * len(lists) / float(raw["intensity"].sum())
    source = _Drawn(data, origin, ellipse, step / pixel, size, gain)
    centre = ((size - 1) / 2, (size - 1) / 2)
    lazy = lazily(Frames((rows, columns, size, size), np.float32, source.read))
    units = "1/Å" if factor is not None else "px"
    return Scan(
        path, lazy, (pixel, pixel), units, calibration.kv, centre, calibration.step_nm,
        calibration.rotation_deg, calibration.flip,
    )  # fmt: skip


def draw(
    positions: npt.NDArray[np.float64], intensity: npt.NDArray[np.float64], owner: npt.NDArray[Any], n: int, size: int
) -> npt.NDArray[np.float32]:
    """Return patterns (n, size, size) with a Gaussian spot for every peak.

    Parameters
    ----------
    positions
        (row, column) of each peak in pixels (P, 2).
    intensity
        Sum of each spot's counts (P,).
    owner
        Number of the pattern that each peak belongs to (P,).
    n, size
        How many patterns, and their width and height.
    """
    near = np.rint(positions).astype(np.int64)
    offsets = np.arange(-_REACH, _REACH + 1)
    pixel = near[:, :, None] + offsets  # (P, 2, 2 reach + 1)
    profile = np.exp(-0.5 * ((pixel - positions[:, :, None]) / SPOT_PX) ** 2) / (SPOT_PX * math.sqrt(2 * math.pi))
    profile = np.where((pixel >= 0) & (pixel < size), profile, 0.0)
    pixel = np.clip(pixel, 0, size - 1)
    value = intensity[:, None, None] * profile[:, 0, :, None] * profile[:, 1, None, :]
    place = (owner[:, None, None] * size + pixel[:, 0, :, None]) * size + pixel[:, 1, None, :]
    drawn = np.bincount(place.ravel(), weights=value.ravel(), minlength=n * size * size)
    return drawn.astype(np.float32).reshape(n, size, size)


class _Drawn:
    """Reads lists of peaks and draws them, pattern by pattern."""

    def __init__(
        self,
        data: h5py.Dataset,
        origin: npt.NDArray[np.float64] | None,
        ellipse: tuple[float, float, float] | None,
        px_per_step: float,
        size: int,
        gain: float,
    ) -> None:
        self._data, self._origin, self._ellipse = data, origin, ellipse
        self._px_per_step, self._size, self._gain = px_per_step, size, gain

    def read(self, first: int, end: int) -> npt.NDArray[np.float32]:
        """Return the patterns (end - first, size, size) of the scan positions from `first` to before `end`."""
        columns = self._data.shape[1]
        place = np.stack(np.divmod(np.arange(first, end), columns), axis=1)
        lists = [
            peaks
            for row in range(first // columns, (end - 1) // columns + 1)
            for peaks in self._data[row, max(0, first - row * columns) : min(columns, end - row * columns)]
        ]
        count = [len(peaks) for peaks in lists]
        peaks, owner = np.concatenate(lists), np.repeat(np.arange(len(lists)), count)
        origin = np.zeros((1, 2)) if self._origin is None else self._origin
        if origin.ndim == 3:
            at = origin[place[:, 0], place[:, 1]]
            origin = np.where(np.isfinite(at), at, _middle(origin))[owner]
        found = _positions(peaks, origin, self._ellipse) * self._px_per_step + (self._size - 1) / 2
        return draw(found, peaks["intensity"] * self._gain, owner, len(lists), self._size)


def _positions(
    peaks: npt.NDArray[Any], origin: npt.NDArray[np.float64], ellipse: tuple[float, float, float] | None
) -> npt.NDArray[np.float64]:
    """Return (row, column) (P, 2) of peaks from the direct beam, with ellipses made circles of the half axis b."""
    found = np.stack([peaks["qx"], peaks["qy"]], axis=1).astype(np.float64) - origin
    if ellipse is not None:
        a, b, theta = ellipse
        long = np.array([math.cos(theta), math.sin(theta)])
        found -= (1 - b / a) * np.outer(found @ long, long)
    return np.asarray(found)


def _frame(
    raw: npt.NDArray[Any], lists: list[npt.NDArray[Any]], calibration: Calibration
) -> tuple[float | None, npt.NDArray[np.float64] | None]:
    """Return 1/Å per unit of the positions, or None if that is unknown, and where the direct beam is, or None for 0.

    Positions on both sides of 0 are from the direct beam already, and in 1/Å if they are that small. Others are in
    the detector's pixels; without an origin in the file, the beam is where the strongest peak mostly is.
    """
    q = np.stack([raw["qx"], raw["qy"]])
    units = reciprocal_factor(calibration.units, calibration.kv)
    factor = None if units is None else calibration.scale[0] * units
    if (q.min(axis=1) < 0).all():
        return (1.0, None) if np.abs(q).max() <= _CALIBRATED else (factor, None)
    if calibration.origin is not None:
        return factor, calibration.origin
    strongest = np.array([peaks[np.argmax(peaks["intensity"])][["qx", "qy"]].tolist() for peaks in lists if len(peaks)])
    return factor, np.median(strongest, axis=0)


def _middle(origin: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.nanmedian(origin.reshape(-1, 2), axis=0))


def _detector(group: h5py.Group) -> tuple[int, int] | None:
    """Return the detector's height and width in pixels where the file says (BraggVectors do)."""
    kept = group.parent.get("metadatabundle/_braggvectors_shape/Qshape")
    return (int(kept[0]), int(kept[1])) if isinstance(kept, h5py.Dataset) and kept.shape == (2,) else None
