"""The calibration that py4DSTEM, and the EMD files that it grew from, keep beside a data cube or Bragg peaks.

py4DSTEM's x is array axis 0 (rows) and its y is axis 1 (columns), of the scan as of the pattern; so an array is taken
as it lies, and (x, y) pairs are (row, column).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.scan.readers.scan import beam_by_axes, checked_kv, scan_step

_PLACES = ("metadatabundle/calibration", "calibration", "_metadata/calibration", "metadata/metadata_0/calibration")
"""Where py4DSTEM has kept calibrations over the years, from the group of the data or from one above it."""

_PRISMATIC = "4DSTEM_simulation"


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
    origin: npt.NDArray[np.float64] | None = None
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
        middle = np.nanmedian(origin.reshape(-1, 2), axis=0)
        found = found._replace(origin=origin, centre_px=(float(middle[0]), float(middle[1])))
    a, b, theta = (_number(kept.get(name)) for name in ("a", "b", "theta"))
    rotation, flip = _number(kept.get("QR_rotation_degrees")), kept.get("QR_flip")
    if rotation is None and _number(kept.get("QR_rotation")) is not None:
        rotation = math.degrees(float(kept["QR_rotation"]))
    return found._replace(
        ellipse=(a, b, theta) if a and b and theta is not None else None,
        rotation_deg=rotation,
        flip=None if flip is None or isinstance(flip, str) else bool(flip),
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


def _origin(kept: dict[str, Any]) -> npt.NDArray[np.float64] | None:
    """Return the direct beam's (row, column), per position where it was measured so, else the mean."""
    for names in (("qx0", "qy0"), ("qx0_mean", "qy0_mean")):
        pair = [kept.get(name) for name in names]
        if all(isinstance(value, np.ndarray | float | int) for value in pair):
            found = np.stack([np.asarray(value, dtype=np.float64) for value in pair], axis=-1)
            if found.ndim in (1, 3) and np.isfinite(found).any():
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
        kv = checked_kv(_number(_plain(settings.attrs.get("E")))) if settings is not None else None
    centre = beam_by_axes(start[-2:], scale[-2:], data.shape[-2:], units[-1])
    return Calibration((scale[-2], scale[-1]), units[-1], kv, centre, scan_step(scale[-4:-2], units[-4:-2]))
