"""What a map is made from, opened: a store as it is, a scan by way of a temporary one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from stemtune._files import existing
from stemtune.dataset.ingest import ingest
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.scan.readers import Scan


def name_of(source: str | os.PathLike[str] | Scan) -> str:
    """Return the path of a store, scan file or opened scan."""
    return str(source.path if isinstance(source, Scan) else source)


@contextmanager
def opened(source: str | os.PathLike[str] | Scan, room: Path, **calibration: Any) -> Iterator[Store]:
    """Yield `source` as a store; a scan file is ingested into a temporary one in the folder `room` first.

    Raises
    ------
    UserError
        When it is neither, or when a store is given together with options that only a scan file needs.
    """
    path = source if isinstance(source, Scan) else existing(source, "the scan or store")
    if not isinstance(path, Scan) and is_store(path):
        given = [name for name, value in calibration.items() if value is not None and (name, value) != _AUTO]
        if given:
            flag = given[0].replace("_", "-")
            raise UserError(f"'{source}' is a store with its own calibration; leave out --{flag}")
        with Store.open(path) as store:
            yield store
        return
    with tempfile.TemporaryDirectory(dir=room, prefix=".scan.", suffix=".part") as folder:
        temporary = Path(folder) / "scan.h5"
        ingest(path, temporary, **calibration)
        with Store.open(temporary) as store:
            yield store


_AUTO = ("centre", "auto")


def is_store(path: Path) -> bool:
    """Say whether `path` is to be opened as a store rather than read as a scan.

    Anything called .h5 that does not open as HDF5 counts as a store too, so that the message says what is wrong.
    """
    if not path.is_file():
        return False
    if not h5py.is_hdf5(path):
        return path.suffix == ".h5"
    try:
        with h5py.File(path) as file:
            return "patterns" in file and "schema" in file.attrs
    except OSError:
        return path.suffix == ".h5"


__all__ = ["is_store", "name_of", "opened"]
