"""A map folder made anew from what it holds: with other grains, cleaned up, or with the clean-up undone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

from stemtune._files import replaceable_folder, whole_folder
from stemtune.analysis.cleanup import cleaned, undone
from stemtune.analysis.evaluation.evaluate import COMPARED
from stemtune.analysis.grain_analysis import analyse, grain_figures
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.crystal_map.io import map_file, read_map_h5, write_map_h5
from stemtune.map_folder.files import FILES, map_summary, update_summary, write_grains, write_map
from stemtune.plot.report import write_report


def clean_map(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    clean: CleanConfig | None,
    grains: GrainsConfig,
    twins: Sequence[str] = (),
) -> dict[str, Any]:
    """Clean up the map at `path`, a folder or its `map.h5`, by what neighbours say and return its figures.

    `clean` None undoes an earlier clean-up. The result goes to the folder `out`; left out, it replaces the map. The
    figures are those of `files.map_summary`; `cleaned`, pixels by what was done to them, is None when it was undone.
    """
    file = map_file(path)
    folder = replaceable_folder(file.parent, FILES, "a map")
    before = read_map_h5(file)
    changed = undone(before) if clean is None else cleaned(before, clean)
    analysis = analyse(changed, grains, twins)
    figures = {"cleaned": None, **map_summary(analysis)}
    with whole_folder(folder if out is None else replaceable_folder(out, FILES, "a map")) as part:
        for entry in folder.iterdir():
            shutil.copy2(entry, part / entry.name)
        write_map(analysis, part)
        write_report(analysis, part, update_summary(part, figures, stale=COMPARED))
    return figures


def regrain(path: str | os.PathLike[str], settings: GrainsConfig, twins: Sequence[str] = ()) -> dict[str, Any]:
    """Find the grains of the map at `path`, a folder or its `map.h5`, anew and return `grain_figures`."""
    file = map_file(path)
    folder = replaceable_folder(file.parent, FILES, "a map")
    analysis = analyse(read_map_h5(file), settings, twins)
    figures = {"grains": grain_figures(analysis)}
    with whole_folder(folder) as part:
        for entry in folder.iterdir():
            if entry.name != file.name:
                shutil.copy2(entry, part / entry.name)
        write_map_h5(analysis.orientation_map, part / file.name)
        write_grains(analysis, part)
        write_report(analysis, part, update_summary(part, figures))
    return figures["grains"]


def made_by(path: str | os.PathLike[str]) -> list[str]:
    """Return the ids of the MLflow runs whose models made the map at `path`; none where they came from no run."""
    return list(read_map_h5(map_file(path)).attrs.get("model_runs") or [])
