"""One map, any format: what `stemtune export` writes, and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stemtune._files import replaceable_file, whole_file
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal_map.io.ang import check_same, write_ang
from stemtune.crystal_map.io.ctf import write_ctf
from stemtune.crystal_map.io.dream3d import write_dream3d
from stemtune.crystal_map.io.orix_h5 import read_with_orix
from stemtune.crystal_map.orientation_map import OrientationMap, map_file
from stemtune.errors import UserError


def export(path: str | os.PathLike[str], to: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the map at `path` in the format `to` and return where.

    Parameters
    ----------
    path
        A map.h5 of stemtune, or its folder.
    to
        A key of `FORMATS`.
    out
        The file to write; left out, it stands beside the map under its name, with the format's ending.

    Raises
    ------
    UserError
        Where the map or the format is unknown, or `out` would replace the map or cannot be written.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: no format is called that; there are {', '.join(FORMATS)}")
    source = map_file(path)
    ending, write = FORMATS[to]
    target = Path(out).expanduser() if out is not None else source.with_name(source.stem + ending)
    if target.exists() and target.samefile(source):
        raise UserError(f"'{target}' is the map itself, which holds more than an export; choose another --out")
    replaceable_file(target)
    orientation_map = OrientationMap.read(source)
    with whole_file(target) as part:
        write(orientation_map, part)
    return target


def write_h5(orientation_map: OrientationMap, path: Path) -> None:
    """Write the map in orix's HDF5 layout alone, the best answers and the alternatives, and check what orix reads."""
    from orix import io

    made = path.with_name(path.name + ".h5")  # orix goes by the ending
    try:
        io.save(str(made), orientation_map.to_orix(), overwrite=True)
        check_same(orientation_map, read_with_orix(made), str(path))
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def write_csv(orientation_map: OrientationMap, path: Path) -> None:
    """Write a table of the best answers: a row per pixel, empty fields where not indexed.

    Columns: row, column, y_nm and x_nm (left out where the step is not known), phase (name), space_group, phi1_deg,
    Phi_deg, phi2_deg, q0 to q3 (scalar first, lab to crystal), confidence, signal, fit, and of a refined map goodness.
    """
    rows, columns = orientation_map.shape
    row, column = np.divmod(np.arange(rows * columns), columns)
    indexed = orientation_map.indexed
    euler = to_euler_deg(torch.from_numpy(orientation_map.orientation)).numpy()
    table: dict[str, Any] = {"row": row, "column": column}
    if orientation_map.step_nm is not None:
        dy, dx = orientation_map.step_nm
        table |= {"y_nm": [f"{value:.9g}" for value in row * dy], "x_nm": [f"{value:.9g}" for value in column * dx]}
    names = ['"' + phase.name.replace('"', '""') + '"' for phase in orientation_map.phases]
    groups = [str(phase.space_group) for phase in orientation_map.phases]
    table["phase"] = [names[index] if index >= 0 else "" for index in orientation_map.phase]
    table["space_group"] = [groups[index] if index >= 0 else "" for index in orientation_map.phase]
    measures = {
        **{name: euler[:, place] for place, name in enumerate(("phi1_deg", "Phi_deg", "phi2_deg"))},
        **{f"q{place}": orientation_map.orientation[:, place] for place in range(4)},
        "confidence": orientation_map.confidence,
        "signal": orientation_map.signal,
        "fit": orientation_map.fit,
    }
    if orientation_map.goodness is not None:
        measures["goodness"] = orientation_map.goodness[:, 0]
    for name, values in measures.items():
        shown = indexed & np.isfinite(values)
        table[name] = [f"{value:.7g}" if show else "" for value, show in zip(values, shown, strict=True)]
    lines = [",".join(table), *(",".join(map(str, cells)) for cells in zip(*table.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


FORMATS: dict[str, tuple[str, Callable[[OrientationMap, Path], None]]] = {
    "ang": (".ang", write_ang),
    "ctf": (".ctf", write_ctf),
    "h5": ("_orix.h5", write_h5),
    "dream3d": (".dream3d", write_dream3d),
    "csv": (".csv", write_csv),
}
"""Ending of the file's name and writer of each format."""
