"""Calibration of measured patterns: where the direct beam is, and patterns moved so that it is in the middle.

Pixel coordinates are (row, column); whole numbers are pixel centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from stemtune.errors import UserError

FloatArray = npt.NDArray[np.float64]

_ROUNDS = 20  # of moving the window after the centroid
_ALIGNED_PX = 0.02  # patterns that are off their pixels by less are copied, not interpolated


class Centre(NamedTuple):
    """The direct beam of a scan: the median of its place over the patterns in pixels, and how far it drifts.

    `spread_px` is the robust standard deviation of the place along the worse axis.
    """

    row: float
    column: float
    spread_px: float


def fit_centre(patterns: npt.NDArray[Any]) -> Centre:
    """Find the direct beam in patterns (N, H, W) sampled from one scan.

    The beam is the brightest place, near the middle, of what most patterns have in common (their median: spots of
    single orientations drop out). It is then measured in every pattern as the centroid of the counts above the
    surroundings, cut off at half of the maximum, so that neither the inside of a disk nor one hot pixel counts
    for much; the answer is the median over the patterns. A `UserError` says that these are empty, or have no bright
    place.
    """
    counts = np.asarray(patterns, dtype=np.float64)
    # Where the beam is in what the patterns have in common, then in each of them.
    common = common_pattern(counts)
    *start, reach = beam_near(common)
    first = centroids(common[None], start, reach)[0]
    if not np.isfinite(first).all():
        raise UserError("the sampled patterns have no bright direct beam to fit a centre to; give --centre y,x")
    each = centroids(counts, first, reach)
    each = each[np.isfinite(each).all(axis=1)]
    each = each if len(each) else first[None]
    centre = np.median(each, axis=0)
    spread = 1.4826 * float(np.median(np.abs(each - centre), axis=0).max())
    return Centre(float(centre[0]), float(centre[1]), spread)


def common_pattern(counts: npt.NDArray[Any]) -> FloatArray:
    """Return what most patterns (N, H, W) have in common: their median, or their mean where that is empty."""
    common = np.asarray(np.median(counts, axis=0), dtype=np.float64)
    return common if common.max() > 0 else np.asarray(counts.mean(axis=0, dtype=np.float64))


def beam_near(common: FloatArray) -> tuple[float, float, float]:
    """Return the pixel (row, column) of the direct beam in a pattern (H, W), and the reach of a window around it.

    The reach is twice the beam's radius, and 3 pixels or more. A `UserError` says that the pattern is empty.
    """
    if not common.max() > 0:
        raise UserError("the sampled patterns hold no counts, so there is no direct beam to find; give --centre y,x")
    height, width = common.shape
    around = ndimage.maximum_filter(common, footprint=[[1, 1, 1], [1, 0, 1], [1, 1, 1]], mode="constant")
    smooth = ndimage.gaussian_filter(np.minimum(common, 3 * around), 1.5, mode="constant")  # without hot pixels
    middle = np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    row, column = (np.indices(common.shape) - middle) / min(common.shape)
    start = np.unravel_index(np.argmax(smooth * np.exp(-4 * (row**2 + column**2))), common.shape)
    blob, _ = ndimage.label(smooth > smooth[start] / 2)
    radius = math.sqrt((blob == blob[start]).sum() / math.pi)
    return float(start[0]), float(start[1]), min(max(2.0 * radius, 3.0), min(common.shape) / 2)


def centroids(counts: FloatArray, start: Sequence[float] | FloatArray, reach: float) -> FloatArray:
    """Return the centroid (N, 2) of the spot near `start` in each pattern (N, H, W); NaN where there is none."""
    low = [max(0, round(value - 2 * reach)) for value in start]
    high = [min(length, round(value + 2 * reach) + 1) for value, length in zip(start, counts.shape[1:], strict=True)]
    part = counts[:, low[0] : high[0], low[1] : high[1]]
    row, column = np.mgrid[low[0] : high[0], low[1] : high[1]].astype(np.float64)
    # Counts above the surroundings, cut off at half of the maximum.
    ground = np.median(part, axis=(1, 2))[:, None, None]
    part = np.clip(part - ground, 0, None)
    peak = part.max(axis=(1, 2), initial=0)
    part = np.minimum(part, peak[:, None, None] / 2)
    # The window follows the centroid until it stays.
    centre = np.tile(np.asarray(start), (len(part), 1))
    for _ in range(_ROUNDS):
        distance = np.hypot(row - centre[:, 0, None, None], column - centre[:, 1, None, None])
        weight = part * np.clip(reach + 0.5 - distance, 0, 1)  # pixels at the rim count in part
        total = weight.sum(axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = np.stack([(weight * row).sum(axis=(1, 2)), (weight * column).sum(axis=(1, 2))], axis=1)
            centre = moved / total[:, None]
    centre[peak < 0.1 * np.median(peak)] = np.nan
    return centre


@dataclass(frozen=True)
class Resampling:
    """Moves the direct beam from `centre_px` to the middle and resamples patterns of `shape` (H, W) to `size` pixels.

    Every new pixel is a square of the old pattern and gets the counts of the old pixels it covers, in proportion
    to the covered area, so their sum is kept. The new pattern shows a square as wide as the shorter edge of the old
    one; where that reaches over an edge, it is 0.
    """

    shape: tuple[int, int]
    centre_px: tuple[float, float]
    size: int

    @property
    def factor(self) -> float:
        """Old pixels per new pixel along an edge."""
        return min(self.shape) / self.size

    @property
    def exact(self) -> bool:
        """Whether new pixels are old pixels, so that the counts are copied as they are."""
        off = [value - (self.size - 1) / 2 for value in self.centre_px]
        return self.factor == 1 and all(abs(value - round(value)) < _ALIGNED_PX for value in off)

    @cached_property
    def _weights(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        overlaps = [self._overlap(length, at).T for length, at in zip(self.shape, self.centre_px, strict=True)]
        return np.ascontiguousarray(overlaps[0]), np.ascontiguousarray(overlaps[1])

    def _overlap(self, length: int, centre: float) -> npt.NDArray[np.float32]:
        """Return how much of each old pixel (columns) lies in each new one (rows), along one axis."""
        edges = centre + (np.arange(self.size + 1) - self.size / 2) * self.factor
        old = np.arange(length)
        low = np.maximum(edges[:-1, None], old - 0.5)
        high = np.minimum(edges[1:, None], old + 0.5)
        return np.asarray(np.clip(high - low, 0, None), dtype=np.float32)

    def __call__(self, patterns: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `patterns` (B, H, W) as (B, size, size): the same type where `exact`, else float32."""
        if not self.exact:
            rows, columns = self._weights
            narrow = patterns.reshape(-1, self.shape[1]).astype(np.float32) @ columns
            upright = narrow.reshape(len(patterns), self.shape[0], self.size).swapaxes(1, 2)
            low = upright.reshape(-1, self.shape[0]) @ rows
            return low.reshape(len(patterns), self.size, self.size).swapaxes(1, 2)
        shift = [round(value - (self.size - 1) / 2) for value in self.centre_px]
        if not any(shift) and self.shape == (self.size, self.size):
            return patterns
        moved = np.zeros((len(patterns), self.size, self.size), dtype=patterns.dtype)
        ends = list(zip(shift, self.shape, strict=True))
        new = [slice(max(0, -offset), max(0, min(self.size, length - offset))) for offset, length in ends]
        old = [slice(max(0, offset), max(0, min(length, self.size + offset))) for offset, length in ends]
        moved[:, *new] = patterns[:, *old]
        return moved
