"""Several models, one for each phase: which phase each pixel is, its picture and its table."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.crystal.phase import Phase
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.indexing.predictor import Answered
from stemtune.plot.figures import NEUTRAL, framed, save, show

FILES = ("phase.png", "phases.csv")
"""What `write_phases` adds to a map folder."""

# Colours that stay apart for the colour-blind (Okabe and Ito, Color universal design, 2008).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


class Chosen(NamedTuple):
    """The answers to n patterns, each of one of m models.

    Attributes
    ----------
    answered
        Of the model that was chosen for each pattern.
    model
        Which one (n,); -1 where none of them sees its crystal.
    fit
        `fit` (n, m) of every model's best answer, see `indexing.spot_check`; 0 where its crystal is not in the pattern.
    """

    answered: Answered
    model: npt.NDArray[np.int16]
    fit: npt.NDArray[np.float32]


def choose(every: Sequence[Answered]) -> Chosen:
    """Return for each pattern the answers of the model whose best answer fits best.

    A model counts only where its crystal is in the pattern at all. The fit is the share of the scattered intensity
    that the predicted spots hold beyond chance, so that a phase of many reflections has no advantage; a confidence
    only compares orientations of one phase.
    """
    fit = np.stack([np.where(one.indexed, one.fit, 0) for one in every], axis=1).astype(np.float32)
    best = fit.argmax(axis=1)
    none = ~np.stack([one.indexed for one in every], axis=1).any(axis=1)
    rows = np.arange(len(best))
    columns = [None if values[0] is None else np.stack(values)[best, rows] for values in zip(*every, strict=True)]
    answered = Answered(*columns)  # type: ignore[arg-type]
    return Chosen(answered, np.where(none, NOT_INDEXED, best).astype(np.int16), fit)


def phase_figures(orientation_map: OrientationMap) -> list[dict[str, Any]]:
    """Return the phase table: of each phase `name`, `space_group`, `pixels`, `share` of the indexed ones, `area` in
    nm² (px² where the step is not known), `median_confidence` and `median_fit` (None without pixels)."""
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    total = max(int(orientation_map.indexed.sum()), 1)
    rows = []
    for index, phase in enumerate(orientation_map.phases):
        own = orientation_map.phase == index
        pixels = int(own.sum())
        rows.append(
            {
                "name": phase.name,
                "space_group": phase.space_group,
                "pixels": pixels,
                "share": pixels / total,
                "area": pixels * dy * dx,
                "median_confidence": float(np.median(orientation_map.confidence[own])) if pixels else None,
                "median_fit": float(np.median(orientation_map.fit[own])) if pixels else None,
            }
        )
    return rows


def write_phases(orientation_map: OrientationMap, folder: Path) -> None:
    """Write the phase map as a picture and its table as CSV into a map folder."""
    rows = phase_figures(orientation_map)
    with (folder / "phases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_phases(orientation_map, folder / "phase.png")


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


def distinct(phases: Sequence[Phase]) -> bool:
    """Say whether all `phases` are different crystals."""
    return all(one.cif != other.cif for place, one in enumerate(phases) for other in phases[:place])


__all__ = [
    "FILES",
    "Chosen",
    "choose",
    "colours_of",
    "distinct",
    "draw_phases",
    "phase_colours",
    "phase_figures",
    "write_phases",
]
