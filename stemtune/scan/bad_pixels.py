"""Hot and dead pixels: found from what patterns all over the scan have in common, filled from their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]

MAX_SHARE = 0.02  # share of the pixels above which they are not believed to be bad: something else is amiss
MIN_PATTERNS = 8  # patterns below which no pixel is judged: a spot would look like a hot pixel
_HOT_RATIO = 8.0  # a hot pixel's usual count over its neighbours'; the sharpest spot stays below
_MIN_EXPECTED = 25.0  # counts that a dead pixel must have missed
_THICK_PX = 3  # dark regions thicker than this are no pixels but a beam stop or the detector's edge
_REACH_PX = 2  # neighbours that fill a pixel are within this distance


@dataclass(frozen=True)
class BadPixels:
    """Pixels (H, W) that are `hot` or `dead`."""

    hot: Mask
    dead: Mask

    @property
    def any(self) -> bool:
        return self.count > 0

    @property
    def count(self) -> int:
        return int(self.hot.sum() + self.dead.sum())


def find_bad_pixels(patterns: npt.NDArray[Any], beam: Mask) -> BadPixels:
    """Find bad pixels in `patterns` (N, H, W) spread over one scan; those of the direct `beam` (H, W) are not judged.

    Hot: its median over the patterns is many times the mean of all its neighbours but the brightest. Diffraction
    spots move from grain to grain, and are wider than a pixel. Dead: it never counts, where its surroundings do.
    """
    if len(patterns) < MIN_PATTERNS:
        none = np.zeros(patterns.shape[1:], dtype=bool)
        return BadPixels(none, none)
    # Hot: many times the mean of the neighbours, and far above the noise of the median pattern.
    middle = np.median(patterns, axis=0)
    mean = patterns.mean(axis=0, dtype=np.float64)
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    second = ndimage.rank_filter(mean, -2, footprint=ring, mode="mirror")
    around = ndimage.median_filter(middle, size=5, mode="mirror")
    noise = 1.4826 * float(np.median(np.abs(middle - around)))
    hot = (middle > _HOT_RATIO * second) & (middle > around + 10 * noise) & (middle > 0) & ~beam
    # Dead: next to nothing where the surroundings count; thick dark regions are no pixels.
    total = patterns.sum(axis=0, dtype=np.float64)
    wide = ndimage.median_filter(total, size=7, mode="mirror")
    dark = (total <= 0.02 * wide) & (wide > _MIN_EXPECTED * _unit(patterns))
    thick = ndimage.binary_dilation(ndimage.binary_erosion(dark, np.ones((_THICK_PX,) * 2)), np.ones((5, 5)))
    return BadPixels(hot, dark & ~thick & ~beam)


def fill_bad_pixels(patterns: npt.NDArray[Any], bad: Mask, hidden: Mask | None = None) -> npt.NDArray[Any]:
    """Return `patterns` (B, H, W), of their own type, with `bad` pixels replaced by the mean of good ones around.

    Neighbours count by the inverse square of their distance; whole numbers are rounded. A pixel without a good one
    within reach becomes 0. The patterns given are not changed.
    """
    if not bad.any():
        return patterns
    corrected = patterns.copy()
    good = ~bad if hidden is None else ~(bad | hidden)
    place = np.argwhere(bad)
    offset = np.argwhere(np.ones((2 * _REACH_PX + 1,) * 2)) - _REACH_PX
    offset = offset[(offset != 0).any(axis=1)]
    near = place[:, None] + offset
    inside = ((near >= 0) & (near < bad.shape)).all(axis=-1)
    row, column = near.clip(0, np.array(bad.shape) - 1).transpose(2, 0, 1)
    weight = (inside & good[row, column]) / (offset**2).sum(axis=1)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    filled = np.einsum("bpk,pk->bp", patterns[:, row, column].astype(np.float64), weight)
    if patterns.dtype.kind in "ui":
        filled = np.rint(filled)
    corrected[:, place[:, 0], place[:, 1]] = filled.astype(patterns.dtype)
    return corrected


def _unit(patterns: npt.NDArray[Any]) -> float:
    """Return what one electron is in the patterns' counts, as far as they tell: the smallest count there is, or 1."""
    if patterns.dtype.kind in "uib":
        return 1.0
    seen = patterns[patterns > 0]
    return float(np.quantile(seen, 0.01)) if len(seen) else 1.0
