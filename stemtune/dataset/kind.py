"""What kind of thing lies at a path: a store, a map, a model, a search space, or a scan."""

from __future__ import annotations

from pathlib import Path

import h5py

from stemtune.errors import UserError


def kind_of(path: Path) -> str:
    """Return "store", "map", "model", "search space" or "scan" (everything else that rosettasciio may read)."""
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
    try:
        with h5py.File(path) as file:
            if "stemtune" in file and "crystal_map" in file:
                return "map"
            return "store" if "schema" in file.attrs or "patterns" in file else "scan"
    except OSError:  # truncated: what kind it was meant to be does not matter
        return "store"
