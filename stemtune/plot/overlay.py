"""Measured patterns with the spots of their predicted orientation drawn over them: the check by eye."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.indexing.source import is_store
from stemtune.plot.figures import save

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

    Parameters
    ----------
    folder
        The map folder.
    positions
        (row, column) on the map.
    png
        The picture; left out, `overlay.png` in the map folder.

    Returns
    -------
    Path
        Of the picture.

    Raises
    ------
    UserError
        When the scan is no longer where it was, or a position lies outside of the map.
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
    """Return the measured patterns (n, size, size) of pixels of a map, corrected as they were for it.

    Parameters
    ----------
    orientation_map
        The map.
    pixels
        Flat indices.
    store
        The patterns; left out, they are read from the scan or store that the map was made of.

    Raises
    ------
    UserError
        When they are no longer there, or are not those of the map.
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
