"""How a store is laid out in HDF5, and what keeps a file from being one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError

SCHEMA = 1  # version of the layout below; it goes up when a reader of the old one would go wrong
UNFINISHED = 0  # what `schema` is while a store is being written
SIMULATED = "stemtune simulate"  # the attribute `origin` of a store whose orientations are exact
SPLITS = ("train", "validation", "test")  # names of the values 0, 1, 2 of `split`
LABELLED = "labelled"  # attribute of a store that says in JSON how its labels were made
CONTENT_SHA256 = "content_sha256"
"""The attribute with the hash of all patterns, or of the files that they are read from and of what is done to them;
stores up to version 0.1 have none."""

PATTERN_TYPES = ("uint8", "uint16", "float32")

COLUMNS: dict[str, tuple[tuple[int, ...], str, float]] = {
    "orientation": ((4,), "float64", np.nan),
    "confidence": ((), "float32", np.nan),
    "phase": ((), "int16", -1),
    "position": ((2,), "int32", -1),
    "group": ((), "int32", -1),
    "split": ((), "int8", -1),
}
"""What is kept per pattern beside the pattern itself: shape, type and the value that means "not known"."""

OVERLAP: dict[str, tuple[tuple[int, ...], str, float]] = {
    "overlap_orientation": ((2, 4), "float64", np.nan),
    "overlap_weight": ((3,), "float32", 0),
}
"""Columns of stores with overlapping grains only: orientations of the second and third strongest grain (NaN: there is
none), and the share that each of the three, the strongest first, has in the diffracted intensity."""


def open_hdf5(path: Path) -> h5py.File:
    """Open the file `path` for reading, or raise a `UserError` that says why it is no (whole) HDF5 file."""
    try:
        return h5py.File(path, "r")
    except OSError as problem:
        raise UserError(f"'{path}' {_why_no_hdf5(path, str(problem))}") from None


def _why_no_hdf5(path: Path, problem: str) -> str:
    if path.is_dir():
        return "is a folder, not a store"
    if "truncated" in problem:
        return f"is truncated: it has {path.stat().st_size:,} bytes, fewer than its header says; make or copy it again"
    if "signature not found" in problem:
        return "is no HDF5 file, so it is not a store"
    return f"cannot be opened as HDF5: {problem}"


def is_beam_store(file: h5py.File) -> bool:
    """Return whether an open file is a store of beams (`beam_store`)."""
    return "schema" in file.attrs and "reflection" in file and "patterns" not in file


def check_layout(path: Path, file: h5py.File) -> None:
    """Raise a `UserError` that says what keeps the open `file` from being a store."""
    refuse = f"'{path}' is not a stemtune store"
    if is_beam_store(file):
        raise UserError(f"'{path}' is a store of beams, which holds no patterns; data.source=beams draws them")
    if "schema" not in file.attrs or "patterns" not in file:
        kept = ", ".join(list(file)[:4]) or "nothing"
        raise UserError(f"{refuse} (it holds {kept}); `stemtune ingest` makes one from a scan")
    schema = plain(file.attrs["schema"])
    if schema == UNFINISHED:
        raise UserError(f"'{path}' is an unfinished store; the command that made it resumes it when it is repeated")
    if schema != SCHEMA:
        raise UserError(
            f"'{path}' has store schema {schema}, but this stemtune reads schema {SCHEMA}; upgrade stemtune"
        )
    data = file["patterns"]
    if not isinstance(data, h5py.Dataset):
        raise UserError(f"{refuse}: `patterns` is a group, but must be an array")
    if data.ndim != 3 or data.shape[1] != data.shape[2] or not data.size or data.dtype.name not in PATTERN_TYPES:
        wanted = f"(n, size, size) of {', '.join(PATTERN_TYPES)}"
        raise UserError(f"{refuse}: `patterns` is {data.shape} {data.dtype}, but must be {wanted}")
    for name, (shape, _, _) in {**COLUMNS, **(OVERLAP if set(OVERLAP) & set(file) else {})}.items():
        if name not in file:
            raise UserError(f"{refuse}: `{name}` is missing")
        if getattr(file[name], "shape", None) != (data.shape[0], *shape):
            found = getattr(file[name], "shape", "a group")
            raise UserError(f"{refuse}: `{name}` is {found}, but must be {(data.shape[0], *shape)}")
    if missing := [name for name in ("kv", "scale_inv_angstrom") if name not in file.attrs]:
        raise UserError(f"{refuse}: the attribute `{missing[0]}` is missing")


def replaceable_store(path: str | os.PathLike[str]) -> Path:
    """Return `path` if a store may be written there: nothing is, or an empty file, or a store, but not the scan."""
    target = Path(path).expanduser()
    if target.is_file() and target.stat().st_size:
        with suppress(OSError), h5py.File(target, "r") as file:
            if "schema" in file.attrs and "patterns" in file:
                return target
        raise UserError(f"the file '{path}' is no store, so it is not replaced; choose another --out or remove it")
    return target


def make_splits(
    group: npt.ArrayLike, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> npt.NDArray[np.int8]:
    """Return the split of each pattern (n,): whole groups dealt to train (0), validation (1) and test (2).

    `group` (n,) are the patterns' groups, `fractions` the wanted shares of the patterns, and `seed` sets the order in
    which groups are dealt. Every split with a positive share gets at least one group as long as there are enough.
    """
    _, index, count = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    missing = np.asarray(fractions, dtype=float) / sum(fractions) * len(index)
    empty = set(np.flatnonzero(missing > 0).tolist())
    shares = sorted(empty)
    dealt = np.zeros(len(count), dtype=np.int8)
    for dealt_so_far, chosen in enumerate(np.random.default_rng(seed).permutation(len(count))):
        only_empty = len(count) - dealt_so_far <= len(empty)  # the last groups go where nothing is yet
        best = max(empty if only_empty and empty else shares, key=lambda number: missing[number])
        dealt[chosen] = best
        missing[best] -= count[chosen]
        empty.discard(best)
    return dealt[index]


def set_attribute(file: h5py.File, name: str, value: Any) -> None:
    """Keep `value` as an attribute in its `attribute_form`, None not at all."""
    kept = attribute_form(value)
    if isinstance(kept, list) and all(isinstance(item, str) for item in kept):
        file.attrs.create(name, np.asarray(kept, dtype=object), shape=(len(kept),), dtype=h5py.string_dtype())
    elif kept is not None:
        file.attrs[name] = kept


def attribute_form(value: Any) -> Any:
    """Return what an attribute reads as after `set_attribute`: paths as text, mappings as JSON, tuples as lists."""
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def plain(value: Any) -> Any:
    """Return an HDF5 attribute as text, number, list or None."""
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def disk_is_full(problem: BaseException | None) -> bool:
    """Return whether a disk or a quota is exhausted."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)


def kind_of(path: Path) -> str:
    """Return "store", "beams", "map", "model", "search space" or "scan" (all else that rosettasciio may read)."""
    if path.is_dir():
        if (path / "model.json").is_file() or (path / "model.safetensors").is_file():
            return "model"
        if (path / "map.h5").is_file():
            return "map"
        if path.suffix.lower() != ".zspy":
            raise UserError(f"'{path}' is a folder without model.json or map.h5, so it is neither a model nor a map")
        return "scan"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "search space"
    if path.suffix.lower() == ".hspy" or not h5py.is_hdf5(path):
        return "scan" if path.suffix.lower() not in (".h5", ".hdf5") else "store"
    with suppress(OSError), h5py.File(path) as file:
        if "stemtune" in file and "crystal_map" in file:
            return "map"
        if is_beam_store(file):
            return "beams"
        return "store" if "schema" in file.attrs or "patterns" in file else "scan"
    return "store"  # truncated: what kind it was meant to be does not matter
