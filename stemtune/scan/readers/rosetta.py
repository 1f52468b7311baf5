"""rosettasciio's many formats: what its reader makes of a file, as a scan."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stemtune.errors import UserError
from stemtune.scan.readers import scan as base
from stemtune.scan.readers.scan import Scan, failure_reason, lazily

# Where files keep the acceleration voltage that rosettasciio does not pass on, and the factor to kV.
_VOLTAGES = {"root.iom_measurements.source.get_voltage": 1e-3, "simulation_parameters.E0": 1.0}
_RAW_MIB = (
    "it is a RAW .mib, whose pixels are still in the order of the detector's chips; save it again without RAW in"
    " Merlin's software, or read it with LiberTEM and save the array as .npy"
)


def read_by_rosettasciio(
    path: Path, shape: tuple[int, int] | None = None, reader: str | None = None, **options: Any
) -> Scan:
    """Open the scan at `path` with the rosettasciio reader of its ending, or the one called `reader` with `options`."""
    signals = _signals(path, [f"rsciio.{reader}"] if reader else _readers_of(path), options)
    # The scan is the one signal with the most values.
    sizes = [math.prod(getattr(signal.get("data"), "shape", (0,))) for signal in signals]
    if not max(sizes, default=0):
        raise UserError(f"{path.name} holds no data")
    signal = signals[sizes.index(max(sizes))]
    axes, data = _ordered(signal)
    if data.dtype.kind not in "buif":
        raise UserError(f"{path.name} holds {data.dtype} pixels, which are no counts")
    if data.ndim < 2 or (data.ndim - sum(bool(axis.get("navigate")) for axis in axes)) not in (2, data.ndim):
        raise UserError(f"{path.name} holds spectra or numbers, not diffraction patterns")
    laid, frame, step = base.scan_shape(path.name, data.shape[:-2], shape), data.shape[-2:], None
    if data.shape[:-2] == laid:
        step = base.scan_step(*([axis.get(name) for axis in axes[:-2]] for name in ("scale", "units")))
        data = _whole_pieces(data)
    else:
        data = data.reshape((math.prod(laid), *frame)).reshape((*laid, *frame))
    scale = tuple(1.0 if axis.get("scale") is None else float(axis["scale"]) for axis in axes[-2:])
    units = str(axes[-1].get("units") or "")
    offsets = [float(axis.get("offset") or 0.0) for axis in axes[-2:]]
    centre = base.beam_by_axes(offsets, scale, frame, units)
    return Scan(path, data, (scale[0], scale[1]), units, _kv(signal), centre, step, parts=_parts(path, signal))


def _signals(path: Path, readers: Iterable[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the first reader that understands the file makes of it."""
    problems: list[str] = []
    for module in readers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(importlib.import_module(module).file_reader(str(path), lazy=True, **options))
        except ImportError as problem:
            problems.append(f"{module} needs the package {problem.name}, which is not installed")
        except Exception as problem:  # a reader may raise anything on a damaged or foreign file
            problems.append(failure_reason(problem))
    raise UserError(f"{path.name} cannot be read: {_RAW_MIB if 'RAW MIB' in problems[0] else problems[0]}")


def _readers_of(path: Path) -> list[str]:
    """Return the modules of rosettasciio that take files of this ending, the likeliest first."""
    from rsciio import IO_PLUGINS

    ending = path.suffix.lower()
    found = [str(plugin["api"]) for plugin in IO_PLUGINS if ending[1:] in map(str.lower, plugin["file_extensions"])]
    if not ending or not found:
        raise UserError(
            f"'{path}' has no ending that rosettasciio knows, and does not begin as HDF5 or numpy files do; give it the"
            " ending of its format: .hspy, .zspy, .mib, .blo, .dm4, .h5, .npy, ..."
        )
    return sorted(found, key=lambda module: module != "rsciio.empad")  # .xml belongs to two readers


def _ordered(signal: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Return axes and dask array with the scan's axes first and the pattern's rows and columns last."""
    dask_array: Any = importlib.import_module("dask.array")  # here, because it is slow to import
    data = signal["data"] if hasattr(signal["data"], "chunks") else dask_array.from_array(signal["data"])
    axes = list(signal["axes"])
    if len(axes) != data.ndim:
        raise UserError(f"the file describes {len(axes)} axes, but its data have {data.ndim}")
    place = [axis.get("index_in_array") for axis in axes]
    where = list(range(data.ndim)) if None in place else [int(index) for index in place]
    order = sorted(range(data.ndim), key=lambda number: (not axes[number].get("navigate"), where[number]))
    return [axes[number] for number in order], data.transpose([where[number] for number in order])


def _whole_pieces(data: Any) -> Any:
    """Return the array in blocks of many pieces where it is nothing but an array of an HDF5 file.

    rosettasciio makes a block of every piece of a hyperspy file, of 1 MB and less: dask then spends longer on blocks
    than HDF5 on reading them.
    """
    layers = data.dask.layers
    held = [value for layer in layers.values() for value in layer.values() if isinstance(value, h5py.Dataset)]
    if len(layers) > 2 or len(held) != 1 or held[0].shape != data.shape or held[0].dtype != data.dtype:
        return data
    return lazily(held[0], (held[0].chunks or (1, 1))[:2])


def _parts(path: Path, signal: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the files beside `path` that its patterns or their header lie in."""
    beside = [path.with_suffix(".hdr")] if path.suffix.lower() == ".mib" else []
    raw = _at(signal.get("original_metadata"), "root.raw_file.filename")
    if raw and path.suffix.lower() == ".xml":
        beside.append(path.with_name(Path(str(raw)).name))
    return tuple(part for part in beside if part.is_file())


def _kv(signal: Mapping[str, Any]) -> float | None:
    """Return the acceleration voltage in kV from a signal's metadata, or None."""
    original = signal.get("original_metadata")
    found = _at(signal.get("metadata"), "Acquisition_instrument.TEM.beam_energy")
    for place, (target, convert) in (signal.get("mapping") or {}).items():
        value = _at(original, place)
        if found is None and target.endswith("TEM.beam_energy") and value is not None:
            found = convert(value) if convert else value
    for place, factor in _VOLTAGES.items():
        value = _at(original, place)
        if found is None and value is not None:
            found = float(value) * factor
    return base.checked_kv(float(np.asarray(found).item())) if found is not None else None


def _at(tree: Any, dotted: str) -> Any:
    for word in dotted.split("."):
        if not isinstance(tree, Mapping) or word not in tree:
            return None
        tree = tree[word]
    return tree
