"""Pictures of which phase each pixel is, and of the second crystal where patterns hold two."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.indexing.phase_choice import phase_figures
from stemtune.plot.figures import NEUTRAL, draw_scalar, framed, save, show

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
