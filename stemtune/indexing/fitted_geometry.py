"""The calibration that all refined candidates agree on: the fit of one pattern is noisy, that of a hundred is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stemtune.diffraction.geometry import Geometry
from stemtune.indexing.predictor import Predictions

MIN_PATTERNS = 30
"""Indexed patterns below which nothing is said about the calibration."""

MIN_SCALE_ERROR, MIN_CENTRE_ERROR_PX = 0.004, 0.5
"""Smallest error of the scale (relative) and of the centre that a note is made of."""

MIN_SAME_SIDE = 0.8
"""Share of the patterns that must see the error on the same side."""


class GeometryFit(NamedTuple):
    """`figures` for the summary, empty where nothing was refined; and `notes` for the user, one sentence each."""

    figures: dict[str, Any]
    notes: list[str]


def fit_geometry(predictions: Predictions, geometry: Geometry) -> GeometryFit:
    """Return what the refined candidates of the indexed patterns say about the calibration `geometry`.

    Figures are `median_ncc` of the best candidates, and `fitted` with `scale_inv_angstrom` per pixel (median, and half
    the distance of the 16th and 84th percentile as `scale_spread`), and the same of the direct beam's place,
    `centre_px` and `centre_spread_px`; these are None without indexed patterns.
    """
    if predictions.ncc is None or predictions.scale is None or predictions.centre_px is None:
        return GeometryFit({}, [])
    seen = predictions.indexed & np.isfinite(predictions.scale)
    if not seen.any():
        return GeometryFit({"median_ncc": None, "fitted": None}, [])
    scale, centre = predictions.scale[seen].astype(np.float64), predictions.centre_px[seen].astype(np.float64)
    found, place = float(np.median(scale)), np.median(centre, axis=0)
    fitted = {
        "scale_inv_angstrom": found * geometry.scale_inv_angstrom,
        "scale_spread": _spread(scale) * geometry.scale_inv_angstrom,
        "centre_px": place.tolist(),
        "centre_spread_px": [_spread(column) for column in centre.T],
    }
    figures = {"median_ncc": float(np.median(predictions.ncc[seen, 0])), "fitted": fitted}
    notes = []
    if int(seen.sum()) >= MIN_PATTERNS:
        if abs(found - 1) > MIN_SCALE_ERROR and np.mean((scale > 1) == (found > 1)) >= MIN_SAME_SIDE:
            notes.append(
                f"the patterns' scale is {abs(found - 1):.1%} {'larger' if found > 1 else 'smaller'} than their"
                f" calibration says: {fitted['scale_inv_angstrom']:.5g} instead of"
                f" {geometry.scale_inv_angstrom:.5g} 1/Å per pixel"
            )
        stated = np.asarray(geometry.centre_px)
        alike = ((centre > stated) == (place > stated)).mean(axis=0)
        if ((abs(place - stated) > MIN_CENTRE_ERROR_PX) & (alike >= MIN_SAME_SIDE)).any():
            notes.append(
                f"the direct beam is at row {place[0]:.1f}, column {place[1]:.1f}, but the calibration says"
                f" {stated[0]:.1f}, {stated[1]:.1f}"
            )
    return GeometryFit(figures, notes)


def _spread(values: np.ndarray[Any, Any]) -> float:
    low, high = np.percentile(values, (16, 84))
    return float(high - low) / 2


__all__ = ["GeometryFit", "fit_geometry"]
