"""The files of a map folder: written from a map and its grains, and written again with other grains or cleaned up."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune._files import replaceable_folder, whole_folder
from stemtune.analysis.cleanup import CHANGED, clean_figures, cleaned, undone
from stemtune.analysis.evaluation.evaluate import COMPARED
from stemtune.analysis.grain_analysis import Analysis, analyse, grain_figures
from stemtune.analysis.grains import Grains
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.crystal_map.io import map_file, read_map_h5, write_map_h5
from stemtune.crystal_map.io.ang import write_ang
from stemtune.crystal_map.io.ctf import write_ctf
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.indexing.overlap import SECOND_LAYER, overlap_figures
from stemtune.indexing.phase_choice import phase_figures
from stemtune.plot.figures import draw_scalar
from stemtune.plot.grains import draw_grains, draw_grod, draw_kam, draw_overlaps, draw_phases
from stemtune.plot.ipf import DIRECTIONS, draw_ipf
from stemtune.plot.report import write_report

FILES = (
    *("map.h5", "map.ang", "map.ctf", "ipf_?.png", "confidence.png", "overlap.png", "overlay.png", "summary.json"),
    *("report.html", "grains.csv", "boundaries.csv", "grains.png", "kam.png", "grod.png", "phase.png", "phases.csv"),
)
"""Names of all files that a map folder may hold, ? for any letter."""

OLD_KEYS = {"median_fit": "median_explained_intensity", "median_goodness": "median_ncc"}
"""What `summary.json` called these figures up to version 0.1."""


def write_map(analysis: Analysis, folder: Path) -> None:
    """Write map.h5, map.ang, map.ctf, tables and pictures of a map into `folder`, and check what is read back."""
    orientation_map = analysis.orientation_map
    (folder / "map.h5").unlink(missing_ok=True)
    write_map_h5(orientation_map, folder / "map.h5")
    write_ang(orientation_map, folder / "map.ang")
    write_ctf(orientation_map, folder / "map.ctf")
    for axis in DIRECTIONS:
        draw_ipf(orientation_map, axis, folder / f"ipf_{axis}.png")
    shown = np.where(orientation_map.indexed, orientation_map.confidence, np.nan)
    draw_scalar(
        shown.reshape(orientation_map.shape),
        folder / "confidence.png",
        step=orientation_map.step_nm,
        title="Confidence of the best answer",
        label="confidence",
        note="Grey: not indexed.",
    )
    write_grains(analysis, folder)
    if len(orientation_map.phases) > 1:
        _write_phases(orientation_map, folder)
    if SECOND_LAYER in orientation_map.layers:
        draw_overlaps(orientation_map, folder / "overlap.png")


def _write_phases(orientation_map: OrientationMap, folder: Path) -> None:
    """Write the phase map as a picture and its table as CSV into a map folder."""
    rows = phase_figures(orientation_map)
    _write_csv(folder / "phases.csv", {name: [row[name] for row in rows] for name in rows[0]})
    draw_phases(orientation_map, folder / "phase.png")


def write_grains(analysis: Analysis, folder: Path) -> None:
    """Write the tables as CSV and the pictures into a map folder."""
    orientation_map, grains, boundaries = analysis
    _write_csv(folder / "grains.csv", _grain_columns(orientation_map, grains))
    unit = orientation_map.scan_unit
    between = dict(orientation_map.tables["boundaries"])
    between = {f"length_{unit}" if name == "length" else name: values for name, values in between.items()}
    _write_csv(folder / "boundaries.csv", between)
    draw_grains(orientation_map, grains, boundaries, folder / "grains.png")
    draw_kam(orientation_map, grains, folder / "kam.png")
    draw_grod(orientation_map, grains, folder / "grod.png")


def map_summary(analysis: Analysis) -> dict[str, Any]:
    """Return what `summary.json` says of the map itself: how much is indexed, how surely, its grains and phases."""
    made = analysis.orientation_map
    indexed = made.indexed
    figures: dict[str, Any] = {
        "indexed_fraction": float(indexed[made.measured].mean()),
        "median_confidence": _median(made.confidence[indexed]),
        "median_explained_intensity": _median(made.score("explained_intensity")[indexed]),
        "scan_shape": list(made.shape),
        "step_nm": made.step_nm,
        "grains": grain_figures(analysis),
    }
    if CHANGED in made.layers:
        figures["cleaned"] = clean_figures(made)
    if SECOND_LAYER in made.layers:
        figures["overlaps"] = overlap_figures(made)
    if len(made.phases) > 1:
        figures["phases"] = phase_figures(made)
    return figures


def update_summary(folder: Path, figures: Mapping[str, Any], stale: Sequence[str] = ()) -> dict[str, Any]:
    """Put `figures` into the `summary.json` of a map folder in place of those of the same names; drop `stale` ones.

    Returns all that it then says.
    """
    path = folder / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {OLD_KEYS.get(name, name): value for name, value in before.items() if name not in stale}
    summary = {**kept, **figures}
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _grain_columns(orientation_map: OrientationMap, grains: Grains) -> dict[str, Sequence[Any] | npt.NDArray[Any]]:
    table, unit = grains.table, orientation_map.scan_unit
    names = np.array(orientation_map.phase_names)
    columns: dict[str, Any] = {"grain": np.arange(len(table)), "phase": names[table.phase], "pixels": table.pixels}
    columns |= {f"area_{unit}2": table.area, f"diameter_{unit}": table.diameter}
    columns |= {"row": table.row, "column": table.column}
    columns |= dict(zip(("phi1_deg", "Phi_deg", "phi2_deg"), table.euler_deg.T, strict=True))
    columns |= {f"q{place}": column for place, column in enumerate(table.orientation.T)}
    columns |= {"spread_deg": table.spread_deg, "confidence": table.confidence, "at_edge": table.at_edge.astype(int)}
    return columns


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{value:.7g}" if isinstance(value, float | np.floating) else value for value in row])


def _median(values: npt.NDArray[Any]) -> float | None:
    return float(np.median(values)) if len(values) else None


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
