"""What all refined answers together say about a scan's calibration: one pattern's fit is noisy, a hundred's is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stemtune.diffraction.geometry import Geometry
from stemtune.indexing.predictor import Answered

LEAST_PATTERNS = 30
"""Indexed patterns below which nothing is said about the calibration."""

LEAST_SCALE, LEAST_CENTRE_PX = 0.004, 0.5
"""Smallest error of the scale (relative) and of the centre that the user is told of."""

ALIKE = 0.8
"""Share of the patterns that must see the error on the same side."""


class Found(NamedTuple):
    """`figures` for the summary, empty where nothing was refined; and `notes` for the user, one sentence each."""

    figures: dict[str, Any]
    notes: list[str]


def found_calibration(answered: Answered, geometry: Geometry) -> Found:
    """Return what the refined answers to the indexed patterns say about the calibration `geometry`.

    Returns
    -------
    Found
        Figures: `median_ncc` of the best answers, and `fitted` with `scale_inv_angstrom` per pixel (median, and
        half the distance of the 16th and 84th percentile as `scale_spread`), and the same of the direct beam's place,
        `centre_px` and `centre_spread_px`; these are None without indexed patterns.
    """
    if answered.ncc is None or answered.scale is None or answered.centre_px is None:
        return Found({}, [])
    seen = answered.indexed & np.isfinite(answered.scale)
    if not seen.any():
        return Found({"median_ncc": None, "fitted": None}, [])
    scale, centre = answered.scale[seen].astype(np.float64), answered.centre_px[seen].astype(np.float64)
    found, place = float(np.median(scale)), np.median(centre, axis=0)
    fitted = {
        "scale_inv_angstrom": found * geometry.scale_inv_angstrom,
        "scale_spread": _spread(scale) * geometry.scale_inv_angstrom,
        "centre_px": place.tolist(),
        "centre_spread_px": [_spread(column) for column in centre.T],
    }
    figures = {"median_ncc": float(np.median(answered.ncc[seen, 0])), "fitted": fitted}
    notes = []
    if int(seen.sum()) >= LEAST_PATTERNS:
        if abs(found - 1) > LEAST_SCALE and np.mean((scale > 1) == (found > 1)) >= ALIKE:
            notes.append(
                f"the patterns' scale is {abs(found - 1):.1%} {'larger' if found > 1 else 'smaller'} than their"
                f" calibration says: {fitted['scale_inv_angstrom']:.5g} instead of"
                f" {geometry.scale_inv_angstrom:.5g} 1/Å per pixel"
            )
        told = np.asarray(geometry.centre_px)
        alike = ((centre > told) == (place > told)).mean(axis=0)
        if ((abs(place - told) > LEAST_CENTRE_PX) & (alike >= ALIKE)).any():
            notes.append(
                f"the direct beam stands at row {place[0]:.1f}, column {place[1]:.1f}, but the calibration says"
                f" {told[0]:.1f}, {told[1]:.1f}"
            )
    return Found(figures, notes)


def _spread(values: np.ndarray[Any, Any]) -> float:
    low, high = np.percentile(values, (16, 84))
    return float(high - low) / 2


__all__ = ["Found", "found_calibration"]
