"""Pictures of the grains of a map, how the lattice turns inside them, its phases and its overlapping crystals.

Boundaries run between the pixels: they are drawn as lines on top of the picture, sharp at every magnification.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stemtune.analysis.boundaries import HIGH, LOW, PHASE, Boundaries
from stemtune.analysis.grains import Grains
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.indexing.phase_choice import phase_figures
from stemtune.plot.figures import NEUTRAL, draw_scalar, framed, save, show
from stemtune.plot.ipf import draw_key, ipf_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Colours that stay apart for the colour-blind (Okabe and Ito, Color universal design, 2008).
_PLAIN = {HIGH: "#000000", LOW: "#737373", PHASE: "#56B4E9"}
_SPECIAL = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#F0E442")
_KEYS = 2  # colour keys for which there is room


def draw_grains(
    orientation_map: OrientationMap, grains: Grains, boundaries: Boundaries, path: str | os.PathLike[str]
) -> None:
    """Draw the grains in the IPF-z colour of their mean orientation, with their boundaries by class, as a PNG."""
    shape, table = orientation_map.shape, grains.table
    present = [index for index in range(len(orientation_map.phases)) if (table.phase == index).any()]
    note = "Each grain in the colour of its mean orientation. Colour key: orix (TSL). Grey: no grain."
    title = f"{len(table):,} grains: crystal direction along the beam"
    figure, axes, room = framed(shape, orientation_map.step_nm, 2.3, title, note)
    show(axes, grain_colours(orientation_map, grains), orientation_map.step_nm)
    legend = draw_boundaries(axes, boundaries, shape)
    left, bottom, width, height = room
    keys = present[:_KEYS]
    for place, index in enumerate(keys):
        share = 0.62 * height / len(keys)
        low = bottom + height - (place + 1) * share
        phase = orientation_map.crystals[index]
        draw_key(figure.add_axes((left + 0.14 * width, low + 0.12 * share, 0.72 * width, 0.66 * share)), phase)
        name = f"{orientation_map.phase_names[index]}, {phase.symmetry.laue}"
        figure.text(left + width / 2, low + 0.97 * share, name, ha="center", va="bottom", fontsize=9)
    if legend:
        figure.legend(
            handles=legend,
            loc="upper left",
            bbox_to_anchor=(left, bottom + 0.33 * height),
            fontsize=8,
            frameon=False,
            title="boundaries",
            title_fontsize=8,
            alignment="left",
        )
    save(figure, path)


def grain_colours(orientation_map: OrientationMap, grains: Grains) -> npt.NDArray[np.float64]:
    """Return the RGB colours (rows, columns, 3) of the grains' mean orientations along the beam."""
    table = grains.table
    mean = np.full((len(table), 3), NEUTRAL)
    for index, phase in enumerate(orientation_map.crystals):
        own = table.phase == index
        mean[own] = ipf_colours(table.orientation[own], phase)
    colours = np.full((len(grains.number), 3), NEUTRAL)
    inside = grains.number >= 0
    colours[inside] = mean[grains.number[inside]]
    return colours.reshape(*orientation_map.shape, 3)


def class_colours(boundaries: Boundaries) -> dict[str, str]:
    """Return the colour of each class of boundaries that is there."""
    special = [name for name in boundaries.names if name not in _PLAIN]
    return {
        name: _PLAIN.get(name) or _SPECIAL[special.index(name) % len(_SPECIAL)]
        for kind, name in enumerate(boundaries.names)
        if (boundaries.kind == kind).any()
    }


def draw_boundaries(axes: Axes, boundaries: Boundaries, shape: tuple[int, int]) -> list[Line2D]:
    """Draw boundaries over a picture of `shape` pixels; return one line for each class that is there, for a legend."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    figure: Any = axes.get_figure()
    box = axes.get_position()
    pixel = 72 * min(box.width * figure.get_figwidth() / shape[1], box.height * figure.get_figheight() / shape[0])
    width = float(np.clip(0.3 * pixel, 0.35, 1.4))
    shares, legend = boundaries.shares(), []
    for name, colour in class_colours(boundaries).items():
        own = boundaries.kind == boundaries.names.index(name)
        wide = width * (1.0 if name in _PLAIN else 1.6)
        lines = edge_lines(boundaries.first[own], boundaries.second[own], shape[1])
        drawn = LineCollection(list(lines), colors=[colour], linewidths=wide, capstyle="projecting")
        axes.add_collection(drawn, autolim=False)
        text = f"{name} ({shares[name]['share']:.0%})"
        legend.append(Line2D([], [], color=colour, linewidth=max(wide, 1.0), label=text))
    return legend


def edge_lines(first: npt.NDArray[np.intp], second: npt.NDArray[np.intp], columns: int) -> npt.NDArray[np.float64]:
    """Return lines (k, 2, 2), ends as x and y in pixels, along the edges between pixels; edges in a row are one line.

    `first`, `second` (m,) are flat indices of the pixels on both sides, the second right of or below the first.
    """
    row, column = np.divmod(first, columns)
    beside = second == first + 1
    upright = _runs(column[beside], row[beside])
    level = _runs(row[~beside], column[~beside])
    lines = np.empty((len(upright) + len(level), 2, 2))
    for part, runs, across in ((lines[: len(upright)], upright, 0), (lines[len(upright) :], level, 1)):
        part[:, :, across] = runs[:, :1] + 0.5
        part[:, :, 1 - across] = runs[:, 1:] + (-0.5, 0.5)
    return lines


def _runs(line: npt.NDArray[np.intp], along: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return (k, 3) the line, and the first and last place along it, of each run of neighbouring places."""
    order = np.lexsort((along, line))
    line, along = line[order], along[order]
    new = np.ones(len(line), dtype=bool)
    new[1:] = (line[1:] != line[:-1]) | (along[1:] != along[:-1] + 1)
    last = np.append(np.flatnonzero(new)[1:], len(line)) - 1 if len(line) else np.empty(0, dtype=np.intp)
    return np.stack((line[new], along[new], along[last]), axis=1)


def draw_kam(orientation_map: OrientationMap, grains: Grains, path: str | os.PathLike[str]) -> None:
    """Draw the kernel average misorientation as a PNG."""
    note = "Mean disorientation from the neighbours. Grey: not indexed, or no neighbour near enough."
    _draw_angle(orientation_map, grains.kam_deg, path, "Kernel average misorientation (KAM)", note)


def draw_grod(orientation_map: OrientationMap, grains: Grains, path: str | os.PathLike[str]) -> None:
    """Draw the disorientation from each grain's mean as a PNG."""
    title = "Disorientation from the grain's mean (GROD)"
    _draw_angle(orientation_map, grains.grod_deg, path, title, "Grey: no grain.")


def highest_deg(values: npt.NDArray[np.float32]) -> float:
    """Return where the colours of angles end: 98 % of them are below."""
    known = values[np.isfinite(values)]
    return max(float(np.percentile(known, 98)), 0.1) if len(known) else 1.0


def _draw_angle(
    orientation_map: OrientationMap,
    values: npt.NDArray[np.float32],
    path: str | os.PathLike[str],
    title: str,
    note: str,
) -> None:
    draw_scalar(
        values.reshape(orientation_map.shape),
        path,
        step=orientation_map.step_nm,
        title=title,
        label="degrees",
        note=note,
        limits=(0.0, highest_deg(values)),
        beyond=True,
    )


# Colours that stay apart for the colour-blind (Okabe and Ito, Color universal design, 2008).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def colours_of(phases: int) -> list[str]:
    """Return a colour for each phase."""
    return [_COLOURS[index % len(_COLOURS)] for index in range(phases)]


def phase_colours(orientation_map: OrientationMap) -> npt.NDArray[np.float64]:
    """Return the RGB colours (rows, columns, 3) of the phase map."""
    from matplotlib.colors import to_rgb

    names = [to_rgb(colour) for colour in colours_of(len(orientation_map.phases))]
    colours = np.array([*names, NEUTRAL])[orientation_map.phase]  # -1 is the last
    return colours.reshape(*orientation_map.shape, 3)


def draw_phases(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Draw which phase each pixel is as a PNG, with a legend that says how much there is of each."""
    from matplotlib.patches import Patch

    rows = phase_figures(orientation_map)
    note = "The phase whose predicted spots hold most of the pattern. Grey: not indexed."
    figure, axes, room = framed(orientation_map.shape, orientation_map.step_nm, 2.3, "Phases", note)
    show(axes, phase_colours(orientation_map), orientation_map.step_nm)
    handles = [
        Patch(facecolor=colour, label=f"{row['name']} ({row['share']:.1%})")
        for colour, row in zip(colours_of(len(rows)), rows, strict=True)
    ]
    left, bottom, _, height = room
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(left, bottom + height), fontsize=9, frameon=False)
    save(figure, path)


def draw_overlaps(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Draw the share of the second crystal as a PNG: 0 where a pattern holds one, grey where not indexed."""
    weight = np.where(orientation_map.indexed, np.nan_to_num(orientation_map.layers[WEIGHT_LAYER]), np.nan)
    draw_scalar(
        weight.reshape(orientation_map.shape),
        path,
        step=orientation_map.step_nm,
        title="Overlapping grains: share of the second crystal",
        label="share of the scattered counts",
        note="Share of the weaker of two crystals in the pattern; 0: a single one. Grey: not indexed.",
        limits=(0.0, 0.5),
    )
