"""Whether the boundaries of a map are where those of the truth are, to within a pixel.

A boundary here is the edge between two pixels that differ by more than a threshold, or are of different phases; no
grains are needed. Precision is the share of the map's edges that have an edge of the truth near them, recall the share
of the truth's that have one of the map near them (D. R. Martin et al., IEEE Trans. Pattern Anal. 26, 2004, 530).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.analysis.neighbors import SIDES, Neighbourhood, pairs
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap

THRESHOLDS_DEG = (2.0, 5.0, 10.0, 15.0)
"""What two neighbours have to differ by."""

TOLERANCE_PX = 1.0
"""How far the middles of two edges may lie apart."""

Edges = npt.NDArray[np.bool_]
"""Flags (2 rows - 1, 2 columns - 1) of edges at their middles, in half pixels: pixel (r, c) is at (2 r, 2 c)."""


def boundary_match(orientation_map: OrientationMap, truth: OrientationMap) -> list[dict[str, Any]]:
    """Return for each threshold how far the map's boundaries are those of the truth.

    Only edges between pixels whose orientation the truth knows, both of them, are counted. Edges of the truth where
    the map indexes nothing count as not found.

    Returns
    -------
    list of dict
        `threshold_deg`, `tolerance_px`, `edges` and `edges_of_truth` (numbers), `precision`, `recall` and their
        harmonic mean `f1`; None where there is nothing to divide by.
    """
    ours = _angles(orientation_map)
    right = _angles(as_phases_of(orientation_map, truth))
    rows = []
    for threshold in THRESHOLDS_DEG:
        found, true = (ours > threshold) & ~np.isnan(right), right > threshold
        rows.append({"threshold_deg": threshold, "tolerance_px": TOLERANCE_PX, **match(found, true, TOLERANCE_PX)})
    return rows


def match(found: Edges, true: Edges, tolerance_px: float) -> dict[str, Any]:
    """Return the figures of `boundary_match` for two sets of edges."""
    hits = int((found & near(true, tolerance_px)).sum())
    recalled = int((true & near(found, tolerance_px)).sum())
    edges, edges_of_truth = int(found.sum()), int(true.sum())
    precision = hits / edges if edges else None
    recall = recalled / edges_of_truth if edges_of_truth else None
    f1 = None
    if precision is not None and recall is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"edges": edges, "edges_of_truth": edges_of_truth, "precision": precision, "recall": recall, "f1": f1}


def near(edges: Edges, tolerance_px: float) -> Edges:
    """Return every place that lies within `tolerance_px` of an edge."""
    reach = int(2 * tolerance_px)
    rows, columns = edges.shape
    padded = np.pad(edges, reach)
    spread = np.zeros_like(edges)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down * down + right * right <= (2 * tolerance_px) ** 2:
                spread |= padded[reach + down : reach + down + rows, reach + right : reach + right + columns]
    return spread


def _angles(orientation_map: OrientationMap) -> npt.NDArray[np.float32]:
    """Return the disorientations of neighbours at the middles of their edges, as `Edges` are laid out; else NaN."""
    rows, columns = orientation_map.shape
    angles = np.full((2 * rows - 1, 2 * columns - 1), np.nan, dtype=np.float32)
    neighbourhood = Neighbourhood(orientation_map)
    for step in SIDES:
        row, column = np.divmod(pairs(orientation_map.shape, step)[0], columns)
        angles[2 * row + step[0], 2 * column + step[1]] = neighbourhood.at(step)
    return angles


def as_phases_of(orientation_map: OrientationMap, truth: OrientationMap) -> OrientationMap:
    """Return the truth as a map of the phases of `orientation_map`; crystals of a Laue class it lacks are unknown.

    Where two phases have one Laue class, the first of them counts for both, unless truth and map list the same ones.
    """
    own, theirs = ([phase.symmetry.laue for phase in some.phases] for some in (orientation_map, truth))
    first = [own.index(laue) if laue in own else NOT_INDEXED for laue in theirs]
    place = np.array([*(range(len(own)) if own == theirs else first), NOT_INDEXED], dtype=np.int16)
    known = np.isfinite(truth.orientation).all(axis=1)
    return dataclasses.replace(
        orientation_map,
        answers=truth.orientation[:, None],
        answer_confidence=truth.answer_confidence[:, :1],
        phase=np.where(known, place[truth.phase], NOT_INDEXED).astype(np.int16),
        layers={},
        ncc=None,
    )
