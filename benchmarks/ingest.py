"""`python -m benchmarks ingest`: scans into stores, beside what the disk or the decompressor can do at best."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

from stemtune.dataset.ingest import ingest

Task = Callable[[], None]

_MIB = 2**20
_PIECE = 8 * _MIB  # bytes that the plain copy moves at a time
_SIZE = 128  # pixels along an edge of a pattern
_COLUMNS = 64  # scan positions of a line
_PLACE = "entry/data/data"
_OPTIONS: dict[str, Any] = {"kv": 200.0, "scale": 0.02, "centre": "63.5,63.5"}
_PACKED: dict[str, dict[str, Any]] = {
    "gzip": {"compression": "gzip", "compression_opts": 4},
    "lz4": {**hdf5plugin.Bitshuffle(cname="lz4")},
}


def run(folder: str | os.PathLike[str], mib: int = 128, rounds: int = 3) -> dict[str, float]:
    """Measure `ingest` of scans that need no resampling beside the least that anyone has to do with the same bytes.

    Uncompressed files (.npy, HDF5 in one piece) stand beside reading and writing their bytes; compressed ones (gzip,
    and the bitshuffle with LZ4 of DECTRIS detectors) beside reading them by h5py, and beside reading them and then
    writing what was unpacked, which a store needs. Files lie in the page cache, and whatever is written is brought to
    the disk (fsync) within the time. Rounds alternate between the two; ratios are medians over the rounds.

    Parameters
    ----------
    folder
        Where to work; three times the scan's size is needed.
    mib
        Size of the scan's patterns in MiB.
    rounds
        How often everything is done.

    Returns
    -------
    figures
        For each kind of file `KIND_mib_per_s`, of patterns; for `npy` and `hdf5` also `KIND_copy_mib_per_s` and
        `KIND_ratio` of the two; for `gzip` and `lz4` `KIND_unpack_mib_per_s`, `KIND_unpack_write_mib_per_s`, and the
        ratios to them, `KIND_ratio` and `KIND_write_ratio`.
    """
    counts = _counts(mib)
    figures: dict[str, float] = {}
    for kind in ("npy", "hdf5", *_PACKED):
        scan, store, copy = (Path(folder) / f"{kind}-{name}" for name in ("scan", "store.h5", "copy"))
        scan = scan.with_suffix(".npy" if kind == "npy" else ".h5")
        _write(scan, counts, kind)
        least: dict[str, Task] = {"copy": partial(_copy, scan, copy)}
        if kind in _PACKED:
            least = {"unpack": partial(_unpack, scan, None), "unpack_write": partial(_unpack, scan, copy)}
        seconds = _rounds([partial(_ingest, scan, store), *least.values()], rounds)
        figures[f"{kind}_mib_per_s"] = mib / statistics.median(taken[0] for taken in seconds)
        for number, name in enumerate(least, 1):
            figures[f"{kind}_{name}_mib_per_s"] = mib / statistics.median(taken[number] for taken in seconds)
            ratio = f"{kind}_write_ratio" if number == 2 else f"{kind}_ratio"
            figures[ratio] = statistics.median(taken[number] / taken[0] for taken in seconds)
        for path in (scan, store, copy):
            path.unlink(missing_ok=True)
    return figures


def _counts(mib: int) -> npt.NDArray[np.uint16]:
    """Return patterns (rows, columns, size, size) of few electrons around a bright beam, alike from line to line."""
    rows = max(1, mib * _MIB // (_COLUMNS * _SIZE * _SIZE * 2))
    line = np.random.default_rng(0).poisson(0.5, (_COLUMNS, _SIZE, _SIZE)).astype(np.uint16)
    middle = slice(_SIZE // 2 - 2, _SIZE // 2 + 2)
    line[:, middle, middle] += 200
    return np.tile(line, (rows, 1, 1, 1))


def _write(path: Path, counts: npt.NDArray[np.uint16], kind: str) -> None:
    if kind == "npy":
        np.save(path, counts)
        return
    with h5py.File(path, "w") as file:
        pieces = {"chunks": (1, 16, _SIZE, _SIZE), **_PACKED[kind]} if kind in _PACKED else {}
        file.create_dataset(_PLACE, data=counts, **pieces)


def _ingest(scan: Path, store: Path) -> None:
    ingest(scan, store, **_OPTIONS)
    descriptor = os.open(store, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _copy(scan: Path, copy: Path) -> None:
    with scan.open("rb") as source, copy.open("wb", buffering=0) as target:
        while piece := source.read(_PIECE):
            target.write(piece)
        os.fsync(target.fileno())


def _unpack(scan: Path, copy: Path | None) -> None:
    """Read a compressed scan line by line; where there is a `copy`, write what was read to it."""
    with h5py.File(scan) as file, (copy or Path(os.devnull)).open("wb", buffering=0) as target:
        for line in file[_PLACE]:
            if copy is not None:
                target.write(line.data)
        if copy is not None:
            os.fsync(target.fileno())


def _rounds(tasks: Sequence[Task], rounds: int) -> list[list[float]]:
    """Return the seconds of each task in each round; every other round goes backwards."""
    seconds = []
    for number in range(rounds):
        taken = [0.0] * len(tasks)
        order = range(len(tasks)) if number % 2 else reversed(range(len(tasks)))
        for task in order:
            began = time.perf_counter()
            tasks[task]()
            taken[task] = time.perf_counter() - began
        seconds.append(taken)
    return seconds
