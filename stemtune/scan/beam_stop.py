"""The beam stop: the part of the detector that its shadow hides, found in the patterns or given."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from stemtune.errors import UserError

Mask = npt.NDArray[np.bool_]

SIDES = ("top", "bottom", "left", "right")

_MAX_LIGHT = 0.03  # share of the light around that still falls into the shadow
_MIN_PIXELS = 12  # of the smallest stop
_MIN_WIDTH_PX = 3  # a stop is somewhere wider than this
_MAX_SHARE = 0.25  # of the detector
_MAX_DISTANCE = 0.15  # a stop reaches this near to the middle of the detector, as a share of its shorter edge
_COARSE = 48  # pixels along an edge that the light around is looked at in
_MIN_LIT, _MIN_RIM_LIGHT = 0.8, 0.2  # share of a shadow's rim that must be lit, by this share of the light around
_STRIDE = 4  # half pixels between the places that are looked at first
_MIN_ALONE = 0.7  # share of the dark pixels in the middle of the detector that belong to the stop


class StopShape(NamedTuple):
    """A disk of `radius_px` around the direct beam, with a bar of `width_px` to one `side` ("": none)."""

    radius_px: float
    side: str = ""
    width_px: float = 0.0

    @classmethod
    def parse(cls, text: str) -> StopShape:
        """Read a shape written as "RADIUS", "RADIUS,SIDE" or "RADIUS,SIDE,WIDTH"."""
        wrong = UserError(
            f"--beam-stop is '{text}', but must be off, auto, or a radius in pixels, with a side and a width of the"
            " bar where it has one, as 8,left,4"
        )
        first, *further = (part.strip() for part in text.split(","))
        try:
            radius = float(first)
            width = float(further[1]) if len(further) > 1 else radius
        except ValueError:
            raise wrong from None
        side = further[0] if further else ""
        if len(further) > 2 or (further and side not in SIDES):
            raise wrong
        if not (0 < radius < 4096 and 0 < width < 4096):
            raise UserError(f"--beam-stop is '{text}', but radius and width must be above 0")
        return cls(radius, side, width if side else 0.0)

    def mask(self, shape: tuple[int, int], centre: tuple[float, float]) -> Mask:
        """Return the hidden pixels (H, W) with the direct beam at `centre` (row, column)."""
        row, column = np.indices(shape)
        down, right = row - centre[0], column - centre[1]
        hidden = np.hypot(down, right) <= self.radius_px
        if self.side:
            along = {"top": -down, "bottom": down, "left": -right, "right": right}[self.side]
            across = right if self.side in ("top", "bottom") else down
            hidden |= (along >= 0) & (np.abs(across) <= self.width_px / 2)
        return np.asarray(hidden, dtype=bool)


def find_stop(patterns: npt.NDArray[Any]) -> Mask | None:
    """Return the pixels (H, W) that a beam stop hides in `patterns` (N, H, W) of a scan, or None if there is none.

    A stop is one dark region, several pixels wide, near the middle of the detector, with a lit rim. Dark corners, gaps
    between chips and places where hardly any electron falls are none.
    """
    mean = patterns.mean(axis=0, dtype=np.float64)
    height, width = mean.shape
    # Dark pixels: next to no light although there is some around.
    smooth = ndimage.median_filter(mean, size=3, mode="nearest")
    around = _light_around(smooth)
    dark = (smooth <= _MAX_LIGHT * around) & (around * len(patterns) > 25)
    core = ndimage.binary_erosion(dark, np.ones((_MIN_WIDTH_PX,) * 2), border_value=1)
    parts, number = ndimage.label(dark)
    row, column = np.indices(mean.shape)
    away = np.hypot(row - (height - 1) / 2, column - (width - 1) / 2)
    # The first region of them with the size, the place and the rim of a stop.
    for part in range(1, number + 1):
        inside = parts == part
        if inside.sum() < _MIN_PIXELS or inside.sum() > _MAX_SHARE * inside.size or not (inside & core).any():
            continue
        rim = ndimage.binary_dilation(inside, iterations=3) & ~ndimage.binary_dilation(inside)
        lit = smooth[rim] > _MIN_RIM_LIGHT * around[rim]
        alone = inside.sum() > _MIN_ALONE * (dark & (away < min(mean.shape) / 3)).sum()  # between spots, all is dark
        if alone and away[inside].min() <= _MAX_DISTANCE * min(mean.shape) and lit.mean() >= _MIN_LIT:
            return np.asarray(ndimage.binary_dilation(inside) & (mean <= 0.5 * around))
    return None


def _light_around(smooth: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the upper quartile of an image over a window a quarter as wide as itself, looked at in coarse pixels."""
    step = max(1, min(smooth.shape) // _COARSE)
    rows, columns = (length // step for length in smooth.shape)
    coarse = smooth[: rows * step, : columns * step].reshape(rows, step, columns, step).mean(axis=(1, 3))
    level = ndimage.percentile_filter(coarse, 75, size=max(9, min(coarse.shape) // 4), mode="nearest")
    row, column = (
        np.minimum(np.arange(length) // step, part - 1) for length, part in zip(smooth.shape, level.shape, strict=True)
    )
    return np.asarray(level[np.ix_(row, column)])


def centre_by_symmetry(
    patterns: npt.NDArray[Any], hidden: Mask, start: tuple[float, float], search_px: int = 12
) -> tuple[float, float]:
    """Return the centre (row, column) about which the mean pattern is most alike to itself turned by 180°.

    For a direct beam of `patterns` (N, H, W) behind `hidden` pixels (H, W): background and, over many grains, spots
    come in pairs on either side of it. The search goes `search_px` around `start`.
    """
    mean = ndimage.gaussian_filter(np.sqrt(patterns.mean(axis=0, dtype=np.float64)), 1.0)
    seen = ~ndimage.binary_dilation(hidden, iterations=2)
    total = (round(2 * start[0]), round(2 * start[1]))  # the sum of opposite pixels' indices
    # Coarse steps over the whole range, then single ones around the best of them.
    for span in (range(-2 * search_px, 2 * search_px + 1, _STRIDE), range(-_STRIDE, _STRIDE + 1)):
        score = np.array([[_likeness(mean, seen, (total[0] + a, total[1] + b)) for b in span] for a in span])
        if not np.isfinite(score).any():
            return start
        best = np.unravel_index(int(np.nanargmax(score)), score.shape)
        total = (total[0] + span[int(best[0])], total[1] + span[int(best[1])])
    # To a part of a pixel by a parabola through the neighbours along either axis.
    centre = []
    for axis in range(2):
        line, at = np.take(score, best[1 - axis], axis=1 - axis), int(best[axis])
        before, here, after = line[at - 1 : at + 2] if 0 < at < len(line) - 1 else (np.nan,) * 3
        bend = 2 * here - before - after
        centre.append((total[axis] + (float((after - before) / 2 / bend) if bend > 0 else 0.0)) / 2)
    return centre[0], centre[1]


def _likeness(mean: npt.NDArray[np.float64], seen: Mask, total: tuple[int, int]) -> float:
    """Return the correlation of an image with itself turned about `total` / 2, over pixels seen in both."""
    ends = zip(total, mean.shape, strict=True)
    part = tuple(slice(max(0, both - length + 1), min(length - 1, both) + 1) for both, length in ends)
    here, there = mean[part], mean[part][::-1, ::-1]
    both = seen[part] & seen[part][::-1, ::-1]
    if both.sum() < 0.3 * mean.size:
        return math.nan
    a, b = here[both] - here[both].mean(), there[both] - there[both].mean()
    return float((a * b).sum() / max(1e-30, math.sqrt(float((a * a).sum() * (b * b).sum()))))
