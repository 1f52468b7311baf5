"""Two maps of one scan side by side in numbers, and where they differ as a picture."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import whole_file
from stemtune.analysis.evaluation.agreement import agreement, shared
from stemtune.analysis.evaluation.evaluate import in_percent, write_figures
from stemtune.analysis.evaluation.ground_truth import Truth, map_or_labels, read_truth
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError
from stemtune.plot.figures import draw_scalar

_HIGHEST_DEG = 15.0


def differ(
    map: str | os.PathLike[str],
    other: str | os.PathLike[str],
    json: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return how far two maps agree (`agreement.agreement`); draw where they do not if a picture is asked for.

    Parameters
    ----------
    map
        A `map.h5` of stemtune, or its folder, or a labelled store.
    other
        Another map, or the truth, as `analysis.evaluation.ground_truth.read_truth` takes it.
    json
        File for the figures.
    png
        File for the difference map.

    Raises
    ------
    UserError
        When their shapes differ, or there is no pixel that both index as one Laue class.
    """
    ours, theirs = map_or_labels(map), read_truth(other)
    figures = agreement(ours, theirs)
    if "median_deg" not in figures:
        raise UserError("no pixel is indexed as the same Laue class in both maps, so there is nothing to compare")
    write_figures(figures, json)
    if png is not None:
        draw_difference(ours, theirs, png)
    return figures


def differ_in_words(figures: dict[str, Any]) -> str:
    """Return the figures of `differ` as a few lines of text."""
    kinds = ", ".join(f"{name} {in_percent(share)}" for name, share in figures["families"].items())
    return (
        f"indexed in both  {in_percent(figures['both'])} of the pixels\n"
        f"apart            median {figures['median_deg']:.2f}°, within 5° {in_percent(figures['within_5deg'])},"
        f" modulo beam-180 {in_percent(figures['beam180'])}\n"
        f"the other has    {kinds}"
    )


def difference_deg(orientation_map: OrientationMap, other: Truth) -> npt.NDArray[np.float64]:
    """Return the disorientation (n,) of two maps; NaN where not both are indexed, as the same Laue class."""
    both = shared(orientation_map, other)
    angles = np.full(len(both), np.nan)
    for index, phase in enumerate(orientation_map.phases):
        own = both & (orientation_map.phase == index)
        here, there = (torch.from_numpy(some[own]) for some in (orientation_map.orientation, other.orientation))
        angles[own] = disorientation_deg(here, there, phase.symmetry).numpy()
    return angles


def draw_difference(orientation_map: OrientationMap, other: Truth, png: str | os.PathLike[str]) -> None:
    """Draw the disorientation of two maps as a PNG."""
    angles = difference_deg(orientation_map, other)
    known = angles[np.isfinite(angles)]
    share = float((known < 5).mean()) if len(known) else 0.0
    with whole_file(png) as part:
        draw_scalar(
            angles.reshape(orientation_map.shape),
            part,
            step=orientation_map.step_nm,
            title=f"Disorientation of the two maps: {share:.1%} within 5°",
            label="degrees",
            note=f"{_HIGHEST_DEG:g}° and more in one colour. Grey: not indexed in both as the same Laue class.",
            limits=(0.0, _HIGHEST_DEG),
            beyond=True,
        )


__all__ = ["differ", "differ_in_words", "difference_deg", "draw_difference"]
