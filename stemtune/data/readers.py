"""Reading a scan: rosettasciio's many formats as one lazy stack of patterns with whatever calibration the file has.

Nothing is loaded here but headers; `Scan.data` is a dask array that reads blocks when they are computed.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemtune.diffraction.geometry import wavelength_angstrom
from stemtune.errors import UserError
from stemtune.files import existing

_EXTRA_READERS = {".h5": ("emd",), ".hdf5": ("emd",)}
"""Readers that take these endings as well, though rosettasciio does not list them (py4DSTEM writes .h5)."""

_VOLTAGES = {"root.iom_measurements.source.get_voltage": 1e-3, "simulation_parameters.E0": 1.0}
"""Where files keep the acceleration voltage that rosettasciio does not pass on, and the factor to kV."""

_LENGTHS_NM = {"pm": 1e-3, "a": 0.1, "å": 0.1, "angstrom": 0.1, "nm": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "mm": 1e6}


@dataclass(frozen=True)
class Scan:
    """A measured scan that has not been read yet.

    Attributes
    ----------
    path
        The file.
    data
        Lazy dask array (rows, columns, height, width) of counts; pattern rows run downwards, y = -row.
    scale
        Reciprocal length of a pixel as the file has it; `scale_inv_angstrom` gives it in 1/Å.
    scale_units
        Unit of `scale`, as written in the file.
    kv
        Acceleration voltage in kV, or None.
    centre_px
        (row, column) of the direct beam by the file's axes, or None.
    step_nm
        (row, column) distance of scan positions in nm, or None.
    """

    path: Path
    data: Any
    scale: tuple[float, float]
    scale_units: str
    kv: float | None
    centre_px: tuple[float, float] | None
    step_nm: tuple[float, float] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the scan."""
        return int(self.data.shape[0]), int(self.data.shape[1])

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """Height and width of a pattern in pixels."""
        return int(self.data.shape[2]), int(self.data.shape[3])

    def scale_inv_angstrom(self, kv: float | None) -> float | None:
        """Return 1/Å per pixel, or None when the file's unit is no reciprocal length and no angle.

        Raises
        ------
        UserError
            When the two axes disagree by more than 1 %, so that pixels are not square.
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


def read_scan(path: str | os.PathLike[str], shape: tuple[int, int] | None = None) -> Scan:
    """Open the scan at `path` with the rosettasciio reader of its file ending.

    Parameters
    ----------
    path
        The file.
    shape
        Rows and columns of the scan, for a file that is only a stack of frames.

    Raises
    ------
    UserError
        When the file is missing, damaged, of an unknown format, no stack of patterns, or not of `shape`.
    """
    found = existing(path, "the scan")
    signal = _largest(found, _signals(found))
    axes, data = _ordered(signal)
    if data.dtype.kind not in "buif":
        raise UserError(f"{found.name} holds {data.dtype} pixels, which are no counts")
    if data.ndim < 2 or (data.ndim - sum(bool(axis.get("navigate")) for axis in axes)) not in (2, data.ndim):
        raise UserError(f"{found.name} holds spectra or numbers, not diffraction patterns")
    data, step = _as_scan(found, data, axes[:-2], shape)
    rows, columns = axes[-2:]
    given = rows.get("scale"), columns.get("scale")
    scale = (1.0 if given[0] is None else float(given[0]), 1.0 if given[1] is None else float(given[1]))
    units = str(columns.get("units") or "")
    centre = None
    if reciprocal_factor(units, 100.0) is not None and all(scale):
        middle = [-float(axis.get("offset") or 0.0) / size for axis, size in zip((rows, columns), scale, strict=True)]
        inside = all(0 < value < length - 1 for value, length in zip(middle, data.shape[-2:], strict=True))
        centre = (middle[0], middle[1]) if inside else None
    return Scan(found, data, scale, units, _kv(signal), centre, step)


def reciprocal_factor(units: str, kv: float | None) -> float | None:
    """Return what a scale in `units` is multiplied with to be in 1/Å, or None if that is not known.

    Reciprocal lengths of any spelling are read ("1/Å", "nm^-1", "$A^{-1}$"), without 2 pi; scattering angles (mrad,
    rad) need the voltage.
    """
    plain = re.sub(r"[\s${}\\()]|mathrm|text", "", units.replace("Å", "a").replace("Å", "a")).lower()
    plain = plain.replace("⁻¹", "^-1").replace("**", "^").replace("angstrom", "a")
    match = re.fullmatch(r"1/([a-zåµμ]+)|([a-zåµμ]+)\^?-1", plain)
    if match:
        length = _LENGTHS_NM.get(match[1] or match[2], {"m": 1e9, "cm": 1e7}.get(match[1] or match[2]))
        return None if length is None else 0.1 / length
    if plain in ("mrad", "rad") and kv:
        return (1e-3 if plain == "mrad" else 1.0) / wavelength_angstrom(kv)
    return None


def _signals(path: Path) -> list[dict[str, Any]]:
    """Return what the first reader that understands the file makes of it."""
    problems: list[str] = []
    for module in _readers_of(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(importlib.import_module(module).file_reader(str(path), lazy=True))
        except ImportError as problem:
            problems.append(f"{module} needs the package {problem.name}, which is not installed")
        except Exception as problem:  # a reader may raise anything on a damaged or foreign file
            problems.append(_why(problem))
    raise UserError(f"{path.name} cannot be read: {problems[0]}")


def _readers_of(path: Path) -> Iterator[str]:
    from rsciio import IO_PLUGINS

    ending = path.suffix.lower()
    found = [str(plugin["api"]) for plugin in IO_PLUGINS if ending[1:] in map(str.lower, plugin["file_extensions"])]
    found = [f"rsciio.{name}" for name in _EXTRA_READERS.get(ending, ())] + found
    if not ending or not found:
        raise UserError(f"'{path}' has no ending that rosettasciio knows; it reads .hspy, .zspy, .mib, .blo, .dm4, ...")
    yield from sorted(found, key=lambda module: module != "rsciio.empad")  # .xml belongs to two readers


def _why(problem: Exception) -> str:
    """Return one line that says why a reader gave up."""
    lines = str(problem).strip().splitlines()
    text = lines[0] if lines else type(problem).__name__
    if "truncated" in text:
        return "the file is truncated; copy it again"
    if "signature not found" in text:
        return "it is no HDF5 file"
    return text.rstrip(".")


def _largest(path: Path, signals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one signal of a file that is the scan: the one with the most values."""
    arrays = [signal for signal in signals if hasattr(signal.get("data"), "shape")]
    if not arrays or not max(math.prod(signal["data"].shape) for signal in arrays):
        raise UserError(f"{path.name} holds no data")
    return max(arrays, key=lambda signal: math.prod(signal["data"].shape))


def _ordered(signal: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Return axes and dask array with the scan's axes first and the pattern's rows and columns last."""
    dask_array: Any = importlib.import_module("dask.array")  # here, because it is slow to import
    data = signal["data"] if hasattr(signal["data"], "chunks") else dask_array.from_array(signal["data"])
    axes = list(signal["axes"])
    if len(axes) != data.ndim:
        raise UserError(f"the file describes {len(axes)} axes, but its data have {data.ndim}")
    place = [axis.get("index_in_array") for axis in axes]
    where = list(range(data.ndim)) if any(index is None for index in place) else [int(index) for index in place]
    order = sorted(range(data.ndim), key=lambda number: (not axes[number].get("navigate"), where[number]))
    return [axes[number] for number in order], data.transpose([where[number] for number in order])


def _as_scan(
    path: Path, data: Any, axes: list[dict[str, Any]], shape: tuple[int, int] | None
) -> tuple[Any, tuple[float, float] | None]:
    """Return the data as (rows, columns, height, width), and the scan step in nm."""
    frames, lengths = math.prod(data.shape[:-2]), " x ".join(str(length) for length in data.shape[:-2])
    if shape is not None:
        if shape[0] * shape[1] != frames:
            raise UserError(
                f"{path.name} holds {frames:,} frames, which is not {shape[0]} x {shape[1]}; give another --shape ny,nx"
            )
        if data.shape[:-2] == shape:
            return data, _step(axes)
        flat = data.reshape((frames, *data.shape[-2:]))
        return flat.reshape((*shape, *data.shape[-2:])), None
    if len(axes) == 2:
        return data, _step(axes)
    if not axes:
        return data[None, None], None
    if len(axes) == 1:
        raise UserError(f"{path.name} holds {frames:,} frames and no scan shape; give --shape ny,nx")
    raise UserError(
        f"{path.name} holds {lengths} frames; a scan has two axes, give --shape ny,nx to lay them out as one"
    )


def _step(axes: list[dict[str, Any]]) -> tuple[float, float] | None:
    units = [_LENGTHS_NM.get(str(axis.get("units") or "").strip().lower()) for axis in axes]
    if None in units:
        return None
    steps = [abs(float(axis.get("scale") or 0)) * float(unit or 0) for axis, unit in zip(axes, units, strict=True)]
    return (steps[0], steps[1]) if min(steps) > 0 else None


def _kv(signal: Mapping[str, Any]) -> float | None:
    """Return the acceleration voltage in kV from a signal's metadata, or None."""
    original = signal.get("original_metadata") or {}
    found = _at(signal.get("metadata") or {}, "Acquisition_instrument.TEM.beam_energy")
    for place, (target, convert) in (signal.get("mapping") or {}).items():
        value = _at(original, place)
        if found is None and target.endswith("TEM.beam_energy") and value is not None:
            found = convert(value) if convert else value
    for place, factor in _VOLTAGES.items():
        value = _at(original, place)
        if found is None and value is not None:
            found = float(value) * factor
    kv = float(np.asarray(found).item()) if found is not None else 0.0
    return kv if math.isfinite(kv) and kv > 0 else None


def _at(tree: Any, dotted: str) -> Any:
    for word in dotted.split("."):
        if not isinstance(tree, Mapping) or word not in tree:
            return None
        tree = tree[word]
    return tree
