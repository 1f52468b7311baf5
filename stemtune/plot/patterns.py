"""Measured patterns as pictures: a contact sheet of a scan, and patterns under the spots of their orientation."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import existing, whole_file
from stemtune.config import SimulateConfig
from stemtune.crystal.phase import Phase
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.io import map_file, read_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.ingest import corrected_at
from stemtune.dataset.schema import kind_of
from stemtune.dataset.store import Store, spread_evenly
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.indexing.predict import is_store
from stemtune.plot.figures import save
from stemtune.scan.readers import Scan, read_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAMMA = 0.4
"""Power of the measured intensities in the picture, so that weak spots show."""

SHAPE_WIDTH = 0.02
"""Width (1/Å) of the shape factor that says which spots to draw, and how large."""

_FAINTEST = 0.01  # spots weaker than this share of the brightest are not drawn
_PANEL_IN = 2.6


def overlay_positions(
    folder: str | os.PathLike[str], positions: Sequence[tuple[int, int]], png: str | os.PathLike[str] | None = None
) -> Path:
    """Draw measured patterns of a map's scan with the simulated spots of its orientations over them.

    `positions` are (row, column) on the map; `png` left out is `overlay.png` in the map folder.

    Raises `UserError` when the scan is no longer where it was, or a position lies outside of the map.
    """
    orientation_map = read_map_h5(folder)
    target = map_file(folder).parent / "overlay.png" if png is None else Path(png)
    rows, columns = orientation_map.shape
    if not positions:
        raise UserError("no positions are given; write them as row,column")
    for row, column in positions:
        if not (0 <= row < rows and 0 <= column < columns):
            raise UserError(f"position {row},{column} lies outside of the map of {rows} x {columns} pixels")
    patterns = measured_patterns(orientation_map, [row * columns + column for row, column in positions])
    draw(patterns, orientation_map, positions, target)
    return target


def measured_patterns(
    orientation_map: OrientationMap, pixels: Sequence[int], store: Store | None = None
) -> npt.NDArray[Any]:
    """Return the measured patterns (n, size, size) of pixels (flat indices), corrected as they were for the map.

    They are those of `store`; without one, of the scan or store that the map was made of.

    Raises `UserError` when they are no longer there, or are not those of the map.
    """
    columns = orientation_map.shape[1]
    if store is None:
        source = existing(orientation_map.attrs["source"], "the scan or store of the map")
        if not is_store(source):
            positions = [divmod(int(pixel), columns) for pixel in pixels]
            return corrected_at(source, positions, **orientation_map.attrs["calibration"])
        with Store.open(source) as opened:
            return measured_patterns(orientation_map, pixels, opened)
    row_of = {int(place): row for row, place in enumerate(store.grid_pixel())}
    for pixel in pixels:
        if int(pixel) not in row_of:
            row, column = divmod(int(pixel), columns)
            raise UserError(f"'{store.path}' has no pattern at {row},{column}; it is another scan than that of the map")
    return store.take(np.array([row_of[int(pixel)] for pixel in pixels]))


def draw(
    patterns: npt.NDArray[Any],
    orientation_map: OrientationMap,
    positions: Sequence[tuple[int, int]],
    png: str | os.PathLike[str],
) -> None:
    """Draw `patterns` (n, size, size), one per position, each bare and with its predicted spots, to `png`."""
    from matplotlib.figure import Figure

    geometry = Geometry.from_dict(orientation_map.attrs["geometry"])
    across = min(len(positions), 4)
    down = math.ceil(len(positions) / across)
    size = (across * _PANEL_IN, down * (2 * _PANEL_IN + 0.4) + 0.3)
    figure = Figure(figsize=size, dpi=200, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.02)
    panels = figure.subplots(2 * down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (pattern, place) in enumerate(zip(patterns, positions, strict=True)):
        group, column = divmod(number, across)
        pixel = place[0] * orientation_map.shape[1] + place[1]
        bare, marked = panels[2 * group, column], panels[2 * group + 1, column]
        for axes in (bare, marked):
            shown = np.clip(np.nan_to_num(pattern.astype(np.float64)), 0, None) ** GAMMA
            brightest = np.quantile(shown, 0.9995) or 1.0
            axes.imshow(shown, cmap="gray", vmin=0, vmax=brightest, interpolation="nearest")
            axes.set_xlim(-0.5, geometry.size - 0.5)
            axes.set_ylim(geometry.size - 0.5, -0.5)
        bare.set_title(_caption(orientation_map, place, pixel), fontsize=7, linespacing=1.2)
        if orientation_map.measured[pixel]:
            phase = orientation_map.crystals[max(0, int(orientation_map.phase[pixel]))]
            answer = to_pattern_frame(orientation_map.answers[pixel, 0], scan_rotation_deg(orientation_map.attrs))
            _mark(marked, phase, geometry, answer, bool(orientation_map.indexed[pixel]))
    figure.supxlabel(
        "Circles: kinematic spots of the predicted orientation, larger for stronger ones (orange: not indexed). "
        f"Intensity to the power {GAMMA:g}.",
        fontsize=6.5 if across > 1 else 4.5,
        color="0.35",
    )
    with whole_file(png) as part:
        save(figure, part)


def _mark(axes: Axes, phase: Phase, geometry: Geometry, orientation: npt.NDArray[np.float64], indexed: bool) -> None:
    simulator = KinematicSimulator(phase, geometry, SimulateConfig())
    spots = simulator.template_spots(torch.from_numpy(orientation)[None], SHAPE_WIDTH)
    intensity = spots.intensity[0].numpy()
    kept = intensity > _FAINTEST * intensity.max(initial=0.0)
    row, column = geometry.pixel_of(spots.x[0].numpy()[kept], spots.y[0].numpy()[kept])
    area = 8 + 60 * (intensity[kept] / intensity.max(initial=1e-12)) ** 0.5
    colour = "tab:cyan" if indexed else "tab:orange"
    axes.scatter(column, row, s=area, facecolors="none", edgecolors=colour, linewidths=0.7)
    centre = geometry.centre_px
    axes.plot([centre[1]], [centre[0]], marker="+", color=colour, markersize=5, markeredgewidth=0.7)


def _caption(orientation_map: OrientationMap, place: tuple[int, int], pixel: int) -> str:
    state = "" if orientation_map.indexed[pixel] else ", not indexed"
    along = _beam_direction(orientation_map, pixel)
    confidence = float(orientation_map.answer_confidence[pixel, 0])
    explained = float(orientation_map.score("explained_intensity")[pixel])
    return f"row {place[0]}, column {place[1]}{state}\n{along}confidence {confidence:.2f}, explained {explained:.2f}"


def _beam_direction(orientation_map: OrientationMap, pixel: int) -> str:
    """Return the angle between c* and the beam, in words, or nothing without an answer."""
    w, x, y, z = orientation_map.answers[pixel, 0]
    cosine = abs(1 - 2 * (x * x + y * y)) if np.isfinite(w + z) else np.nan
    if not np.isfinite(cosine):
        return ""
    return f"c* {math.degrees(math.acos(min(1.0, cosine))):.0f}° from beam, "


_COLUMNS, _PATTERNS = 8, 40
_GAMMA = 0.25
_BARS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # lengths a scale bar may have, 1/Å
_DARK, _LIGHT, _ACCENT = "#11141b", "#ebe7df", "#f2b35d"
_CELL_IN, _DPI = 1.35, 150


class _Panel(NamedTuple):
    pattern: npt.NDArray[Any]
    label: str


def contact_sheet(path: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draw patterns spread evenly over a scan or store, with their positions, as the picture `png`.

    Intensities are raised to the power 0.25 and each pattern is scaled to its own maximum. A bar shows the
    reciprocal scale where it is known, and a cross the direct beam where the file says where it is.

    Raises `UserError` when `path` is neither a scan nor a store, or `png` cannot be written.
    """
    found = existing(path, "the path")
    if Path(png).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise UserError(f"the picture '{png}' must be called .png, .jpg, .pdf or .svg")
    kind = kind_of(found)
    if kind == "store":
        with Store.open(found) as store:
            panels = _panels_of_store(store)
            scale: float | None = store.geometry.scale_inv_angstrom
            centre: tuple[float, float] | None = store.geometry.centre_px
            title = str(store)
    elif kind == "scan":
        scan = read_scan(found)
        panels = _panels_of_scan(scan)
        scale, centre, title = scan.scale_inv_angstrom(scan.kv), scan.centre_px, str(scan)
    else:
        raise UserError(f"'{path}' is a {kind}, which holds no patterns to draw; give a scan or a store")
    with whole_file(png) as part:
        _draw(panels, f"{found.name}: {title}", scale, centre, part)


def _grid(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return about 40 positions (row, column) of a scan on an even grid, at most 8 of them in a row."""
    columns = min(_COLUMNS, shape[1], max(1, round(math.sqrt(_PATTERNS * shape[1] / shape[0]))))
    rows = max(1, _PATTERNS // columns)
    return [(int(y), int(x)) for y in spread_evenly(shape[0], rows) for x in spread_evenly(shape[1], columns)]


def _panels_of_store(store: Store) -> list[_Panel]:
    if store.scan_shape and store.scan_shape[0] * store.scan_shape[1] == store.n:
        rows = np.array([y * store.scan_shape[1] + x for y, x in _grid(store.scan_shape)])
        labels = [f"{y}, {x}" for y, x in store.position[rows]]
    else:
        rows = spread_evenly(store.n, _PATTERNS)
        labels = [f"{row}" for row in rows]
    return [_Panel(*pair) for pair in zip(store.take(rows), labels, strict=True)]


def _panels_of_scan(scan: Scan) -> list[_Panel]:
    panels = []
    for row, column in _grid(scan.shape):
        panels.append(_Panel(np.asarray(scan.data[row, column].compute()), f"{row}, {column}"))
    return panels


def _draw(
    panels: list[_Panel], title: str, scale: float | None, centre: tuple[float, float] | None, target: Path
) -> None:
    from matplotlib.figure import Figure

    first_row = panels[0].label.split(",")[0] + ","
    columns = sum(panel.label.startswith(first_row) for panel in panels) or min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    height, width = panels[0].pattern.shape
    size = (columns * _CELL_IN, rows * _CELL_IN * height / width + 0.62)
    figure = Figure(figsize=(max(size[0], 4.5), size[1]), dpi=_DPI, facecolor=_DARK)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.01, 0.24 / size[1], 0.99, 1 - 0.36 / size[1], 0.04, 0.04)
    for place in axes.flat:
        place.set_axis_off()
    for place, panel in zip(axes.flat, panels, strict=False):
        counts = np.clip(np.nan_to_num(panel.pattern.astype(np.float64)), 0, None) ** _GAMMA
        low = float(np.percentile(counts, 5))
        place.imshow(counts, cmap="magma", interpolation="nearest", vmin=low, vmax=max(float(counts.max()), low + 1e-9))
        box = {"facecolor": _DARK, "alpha": 0.7, "edgecolor": "none", "boxstyle": "square,pad=0.2"}
        place.text(0.03, 0.965, panel.label, transform=place.transAxes, fontsize=6.5, color=_LIGHT, va="top", bbox=box)
    _mark_scale(axes.flat[0], panels[0].pattern.shape, scale, centre)
    figure.text(0.012, 1 - 0.12 / size[1], title, color=_LIGHT, fontsize=8.5, va="top", weight="bold")
    note = f"labels: scan row, column  ·  intensity to the power {_GAMMA:g}, each pattern to its own maximum"
    if "," not in panels[0].label:
        note = note.replace("scan row, column", "row of the store")
    figure.text(0.012, 0.07 / size[1], note, color=_LIGHT, fontsize=6, alpha=0.75)
    figure.savefig(target, format="png", facecolor=_DARK)


def _mark_scale(place: Axes, shape: tuple[int, ...], scale: float | None, centre: tuple[float, float] | None) -> None:
    """Draw the scale bar, and a cross around the direct beam, into the first pattern."""
    height, width = shape[:2]
    if centre:
        row, column = centre
        near, far = 0.05 * width, 0.12 * width
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            ends = [column + dx * near, column + dx * far], [row + dy * near, row + dy * far]
            place.plot(*ends, color=_ACCENT, linewidth=0.8)
    if scale:
        wanted = [bar for bar in _BARS if bar / scale < 0.45 * width] or [_BARS[0]]
        left, down = 0.06 * width, 0.92 * height
        place.plot([left, left + wanted[-1] / scale], [down, down], color=_ACCENT, linewidth=1.6)
        place.text(left, down - 0.03 * height, f"{wanted[-1]:g} 1/Å", color=_ACCENT, fontsize=6, va="bottom")
    place.set_xlim(-0.5, width - 0.5)
    place.set_ylim(height - 0.5, -0.5)
