"""Diffraction spots in measured patterns: where they are, to a part of a pixel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FloatArray = npt.NDArray[np.float64]

_MAX_SPOTS = 80  # of one pattern that count, the brightest
_MIN_Z_SCORE = 4.5  # a spot is this many times the noise above its surroundings
_MIN_SHARE = 0.01  # and has at least this share of the brightest spot


class SpotList(NamedTuple):
    """Spots of N patterns as one list (M,): `pattern` they belong to, `x` and `y` from its beam in px (y up)."""

    pattern: npt.NDArray[np.intp]
    x: FloatArray
    y: FloatArray


def find_spots(
    patterns: npt.NDArray[Any],
    centre_px: FloatArray,
    radius_px: float,
    hidden: npt.NDArray[np.bool_] | None = None,
) -> SpotList:
    """Return the spots of `patterns` (N, H, W) around their direct beams at `centre_px` (N, 2).

    A spot is a local maximum of the pattern smoothed to about the size of the direct beam (`radius_px`), less the same
    smoothed three times as wide, that is above the noise; its place is the top of a parabola through the
    logarithms of the smoothed counts. What touches the direct beam, an edge or `hidden` (H, W) pixels is left out.
    """
    sigma = max(1.0, 0.6 * radius_px)
    margin = math.ceil(2 * sigma)
    near = 2.5 * radius_px + 2 * sigma
    shut = np.zeros(patterns.shape[1:], dtype=bool) if hidden is None else ndimage.binary_dilation(hidden, None, margin)
    shut[:margin], shut[-margin:], shut[:, :margin], shut[:, -margin:] = True, True, True, True
    row, column = np.indices(patterns.shape[1:])
    lists = []
    for number, (pattern, centre) in enumerate(zip(patterns, centre_px, strict=True)):
        smooth = ndimage.gaussian_filter(pattern.astype(np.float64), sigma, mode="nearest")
        around = ndimage.gaussian_filter(smooth, 2.5 * sigma, mode="nearest")
        above = smooth - around
        open_ = (np.hypot(row - centre[0], column - centre[1]) > near) & ~shut
        noise = np.sqrt(around)  # of counting, up to a factor that the pattern itself tells
        lit = open_ & (around > 1e-3 * around.max())
        if not lit.any():
            continue
        noise *= 1.4826 * float(np.median(np.abs(above[lit] / noise[lit])))
        top = (ndimage.maximum_filter(above, size=2 * math.ceil(sigma) + 1) == above) & open_
        brightest = float(above[top].max(initial=0.0))
        top &= above > np.maximum(_MIN_Z_SCORE * noise, _MIN_SHARE * brightest)
        found = np.argwhere(top)
        found = found[np.argsort(-above[top])[:_MAX_SPOTS]]
        if len(found):
            place = _summit(smooth, found) - centre
            lists.append(np.column_stack((np.full(len(found), number), place[:, 1], -place[:, 0])))
    table = np.concatenate(lists) if lists else np.zeros((0, 3))
    return SpotList(table[:, 0].astype(np.intp), table[:, 1], table[:, 2])


def _summit(smooth: FloatArray, found: npt.NDArray[np.intp]) -> FloatArray:
    """Return the places (M, 2) of the maxima at pixels `found` (M, 2) to a part of a pixel."""
    log = np.log(np.maximum(smooth, 1e-12 * max(float(smooth.max()), 1e-30)))
    moved = found.astype(np.float64)
    for axis, step in enumerate(((1, 0), (0, 1))):
        before, here, after = (
            log[found[:, 0] + shift * step[0], found[:, 1] + shift * step[1]] for shift in (-1, 0, 1)
        )
        bend = 2 * here - before - after
        off = np.where(bend > 1e-9, (after - before) / 2 / np.maximum(bend, 1e-9), 0)
        moved[:, axis] += np.clip(off, -0.75, 0.75)
    return moved
