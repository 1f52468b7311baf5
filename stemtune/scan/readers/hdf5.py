"""HDF5 that is not hyperspy's: DECTRIS, data cubes of py4DSTEM and EMD, Bragg peaks, and any array of numbers."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin  # noqa: F401 - registers the filters that detectors compress with
import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.readers.py4dstem import Calibration, calibration_of, read_peaks
from stemtune.scan.readers.scan import Frames, Scan, checked_kv, failure_reason, lazily, scan_shape

_LISTED = 8  # arrays that a message lists
_DECTRIS = re.compile(r"data_\d+")
_MASKS = ("entry/instrument/detector/detectorSpecific/pixel_mask", "entry/instrument/detector/pixel_mask")
_TRIGGERS = tuple(f"entry/instrument/detector/detectorSpecific/{name}" for name in ("ntrigger", "nimages"))
_ENERGIES = ("entry/instrument/beam/incident_energy", "entry/instrument/source/energy")


class Candidate(NamedTuple):
    """What may be the scan of a file: its `kind` ("array", "frames" or "peaks") and the lengths of its axes."""

    kind: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return " x ".join(map(str, self.lengths)) + (" lists of peaks" if self.kind == "peaks" else "")


def read_hdf5(
    path: Path, shape: tuple[int, int] | None, dataset: str | None, size: int | None, scale: float | None
) -> Scan:
    """Open the scan in an HDF5 file: the only one, or the one called `dataset`; errors are those of `read_scan`."""
    try:
        file = h5py.File(path, "r")
    except OSError as problem:
        raise UserError(f"{path.name} cannot be read: {failure_reason(problem)}") from None
    if not dataset and (reader := other_reader(path, file)):
        return _by_rosettasciio(path, file, shape, reader)
    try:
        if "schema" in file.attrs and "patterns" in file and dataset is None:
            raise UserError(f"'{path}' is a stemtune store already; it needs no ingesting")
        kind, name = array_in(path.name, file, dataset)
        if kind == "peaks":
            return read_peaks(path, file[name], shape, size, scale)
        if kind == "frames":
            return _frames(path, file[name], shape)
        if _is_berkeley(file[name]):
            return _by_rosettasciio(path, file, shape, "emd", dataset_path=name.lstrip("/"))
        return _array(path, file[name], shape)
    except (OSError, KeyError, RuntimeError) as problem:  # what h5py raises on damaged files
        file.close()
        raise UserError(f"{path.name} cannot be read: {failure_reason(problem)}") from None
    except BaseException:
        file.close()
        raise


def array_in(name: str, file: h5py.File, dataset: str | None) -> tuple[str, str]:
    """Return kind and path of the scan in a file called `name`: `dataset`, or the only one of the best kind."""
    found = dict(_candidates(file))
    shown = [f"{place.lstrip('/')} ({item})" for place, item in found.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    listed = ", ".join(shown[:_LISTED]) + more or "there is none"
    if dataset is not None:
        wanted = next((place for place in found if place.strip("/") == dataset.strip("/")), None)
        if wanted is None:
            raise UserError(f"{name} has no array '{dataset}' of patterns; {listed}")
        return found[wanted].kind, wanted
    arrays = [place for place, item in found.items() if item.kind == "array"]
    frames, peaks = ([place for place, item in found.items() if item.kind == kind] for kind in ("frames", "peaks"))
    for group in ([place for place in arrays if len(found[place].lengths) >= 4], frames, peaks, arrays):
        if len(group) == 1:
            return found[group[0]].kind, group[0]
        if group:
            raise UserError(f"{name} holds several scans; give --dataset PATH: {listed}")
    held = ", ".join(list(file)[:_LISTED]) or "nothing"
    raise UserError(f"{name} cannot be read as a scan: no array in it has 3 axes or more (it holds {held})")


def other_reader(path: Path, file: h5py.File) -> str | None:
    """Return the reader of rosettasciio that a file is for whose layout says more than its arrays do."""
    if file.attrs.get("file_format") == "HyperSpy":
        return "hspy"
    if path.suffix.lower() == ".nxs" and file.attrs.get("file_format") is not None:
        return "nexus"
    return "emd" if isinstance(file.get("Data/Image"), h5py.Group) else None  # Velox


def _is_berkeley(data: h5py.Dataset) -> bool:
    """Return whether an array lies in a Berkeley EMD file, which counts axes from the last; py4DSTEM's do not."""
    attrs, root = data.parent.attrs, next(iter(data.file), "")
    ours = {"python_class", "py4dstem_class"} & set(attrs) or root.startswith("4DSTEM")
    return not ours and "emd_group_type" in attrs and "dim1" in data.parent


def _by_rosettasciio(path: Path, file: h5py.File, shape: tuple[int, int] | None, reader: str, **options: Any) -> Scan:
    from stemtune.scan.readers.rosetta import read_by_rosettasciio

    file.close()
    return read_by_rosettasciio(path, shape, reader, **options)


def _candidates(group: h5py.Group, seen: set[Any] | None = None) -> Iterator[tuple[str, Candidate]]:
    """Yield path and kind of whatever below `group` may be a scan; links are followed, each object once."""
    seen = set() if seen is None else seen
    if frames := _frame_arrays(group):
        yield group.name, Candidate("frames", (sum(map(len, frames)), *frames[0].shape[1:]))
        return
    for key in group:
        if (item := _member(group, key)) is None:
            continue
        info = h5py.h5o.get_info(item.id)
        if (info.fileno, info.addr) in seen:
            continue
        seen.add((info.fileno, info.addr))
        place = f"{group.name.rstrip('/')}/{key}"
        if isinstance(item, h5py.Group):
            held = item.get("data")
            fields = h5py.check_vlen_dtype(held.dtype) if isinstance(held, h5py.Dataset) and held.ndim == 2 else None
            if fields is not None and {"qx", "qy", "intensity"} <= set(fields.names or ()):
                yield place, Candidate("peaks", held.shape)
            else:
                yield from _candidates(item, seen)
        elif isinstance(item, h5py.Dataset) and item.ndim >= 3 and item.dtype.kind in "buif" and item.size:
            yield place, Candidate("array", item.shape)


def _frame_arrays(group: h5py.Group) -> list[h5py.Dataset]:
    """Return the arrays data_1, data_2 ... of frames that DECTRIS detectors write, in their order."""
    keys = sorted((key for key in group if _DECTRIS.fullmatch(key)), key=lambda key: (len(key), key))
    items = [_member(group, key) for key in keys]
    return [item for item in items if isinstance(item, h5py.Dataset) and item.ndim == 3 and item.dtype.kind in "buif"]


def _member(group: h5py.Group, key: str) -> Any:
    """Return what `key` is in the group, None for a broken link inside the file, an error for one to a lost file."""
    link = group.get(key, getlink=True)
    try:
        return group[key]
    except (KeyError, OSError):
        if isinstance(link, h5py.ExternalLink):
            name = Path(group.file.filename).name
            raise UserError(f"{name} needs '{link.filename}', which cannot be opened; put it into its folder") from None
        if isinstance(link, h5py.SoftLink):
            return None
        raise


def _frames(path: Path, group: h5py.Group, shape: tuple[int, int] | None) -> Scan:
    """Return the frames of a DECTRIS file, in as many arrays and files as the detector wrote, as one scan.

    Pixels that the detector's own mask rejects hold the type's largest number; they are set to 0.
    """
    datasets = _frame_arrays(group)
    height, width = datasets[0].shape[1:]
    if any(data.shape[1:] != (height, width) for data in datasets):
        raise UserError(f"{path.name} holds frames of different sizes in {group.name}; give --dataset for one array")
    ends = np.cumsum([len(data) for data in datasets])
    frames, triggers = int(ends[-1]), [int(_scalar(group.file, place) or 0) for place in _TRIGGERS]
    by_trigger = min(triggers) > 1 and math.prod(triggers) == frames
    rows, columns = scan_shape(path.name, triggers if by_trigger else (frames,), shape)
    masks = (group.file.get(place) for place in _MASKS)
    mask = next((mask for mask in masks if isinstance(mask, h5py.Dataset) and mask.shape == (height, width)), None)
    dead = np.zeros((height, width), bool) if mask is None else mask[()] != 0

    def read(first: int, end: int) -> npt.NDArray[Any]:
        found = []
        for data, stop in zip(datasets, ends.tolist(), strict=True):
            low, high = first - (stop - len(data)), end - (stop - len(data))
            if high > 0 and low < len(data):
                found.append(data[max(low, 0) : min(high, len(data))])
        counts = found[0] if len(found) == 1 else np.concatenate(found)
        if dead.any():
            counts[:, dead] = 0
        return counts

    links = [group.get(key, getlink=True) for key in group if _DECTRIS.fullmatch(key)]
    names = {link.filename for link in links if isinstance(link, h5py.ExternalLink)}
    lazy = lazily(Frames((rows, columns, height, width), datasets[0].dtype, read))
    return Scan(path, lazy, kv=_kv(group.file), parts=tuple(path.parent / name for name in sorted(names)))


def _array(path: Path, data: h5py.Dataset, shape: tuple[int, int] | None) -> Scan:
    """Return an array, calibrated by what a data cube of py4DSTEM or EMD has beside it."""
    rows, columns = scan_shape(path.name, data.shape[:-2], shape)
    pieces = data.chunks or (1,) * data.ndim
    if data.shape[:-2] == (rows, columns):
        lazy = lazily(data, pieces[:2])
    elif data.ndim == 3:
        lazy = lazily(Frames((rows, columns, *data.shape[1:]), data.dtype, lambda first, end: data[first:end]))
    else:
        dask_array: Any = importlib.import_module("dask.array")
        chunks = ("auto",) * (data.ndim - 2) + data.shape[-2:]
        lazy = lazily(data, pieces[:2]) if data.ndim == 4 else dask_array.from_array(data, chunks=chunks, name=False)
        lazy = lazy.reshape((rows * columns, *data.shape[-2:])).reshape((rows, columns, *data.shape[-2:]))
    return array_scan(path, data, lazy)


def array_scan(path: Path, data: h5py.Dataset, lazy: Any) -> Scan:
    """Return `lazy`, which is the array `data` or a part of it as a scan, with what the file says of it."""
    found = calibration_of(data.parent, data) if data.ndim == 4 else Calibration()
    step = found.step_nm if data.ndim == 4 and data.shape[1] == lazy.shape[1] else None
    kv = found.kv if found.kv is not None else _kv(data.file)
    return Scan(path, lazy, found.scale, found.units, kv, found.centre_px, step, found.rotation_deg, found.flip)


def _kv(file: h5py.File) -> float | None:
    """Return the voltage of a NeXus file in kV: its beam's energy, in eV unless it says keV."""
    for place in _ENERGIES:
        if (value := _scalar(file, place)) is not None:
            units = file[place].attrs.get("units", b"eV")
            text = (units.decode(errors="replace") if isinstance(units, bytes) else str(units)).lower()
            return checked_kv(value * (1.0 if text in ("kev", "kv") else 1e-3))
    return None


def _scalar(file: h5py.File, place: str) -> float | None:
    """Return the one number that is kept at `place`; None where there is none."""
    value = file.get(place)
    if isinstance(value, h5py.Dataset) and value.size == 1 and value.dtype.kind in "iuf":
        return float(np.asarray(value[()]).item())
    return None
