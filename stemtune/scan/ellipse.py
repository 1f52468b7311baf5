"""Elliptical distortion of a detector or projector lens, and patterns moved so that it is gone.

A distortion stretches what is at (x, y) (1/Å, y up) by 1 + e/2 along its long axis and by 1 - e/2 across it, as
the simulator's `Conditions.distortion` does: a ring becomes an ellipse with axes in the ratio (1 + e/2) : (1 - e/2), so
e is the relative difference of the axes. The azimuth of the long axis counts anticlockwise from x, in the picture as
the file has it. py4DSTEM's p_ellipse (qx0, qy0, a, b, theta) counts theta from its qx, which runs down the rows,
towards its qy, along the columns: e = 2 (a - b) / (a + b), azimuth = theta - 90°.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError

FloatArray = npt.NDArray[np.float64]

MAX_ELLIPTICITY = 0.2  # largest ellipticity that can be given; lenses and detectors stay below 0.1
_CHUNK = 128  # patterns resampled at once


class Ellipse(NamedTuple):
    """Relative difference of the axes (0 or more), and azimuth of the long one in degrees, in [0, 180)."""

    ellipticity: float
    azimuth_deg: float

    @classmethod
    def of(cls, first: float, second: float) -> Ellipse:
        """Return the ellipse with e cos(2 azimuth) = `first` and e sin(2 azimuth) = `second`."""
        azimuth = math.degrees(math.atan2(second, first)) / 2 % 180 if first or second else 0.0
        return cls(math.hypot(first, second), azimuth)

    @classmethod
    def parse(cls, text: str) -> Ellipse:
        """Read an ellipse written as "E,AZIMUTH", 0.02,35 for instance."""
        try:
            ellipticity, azimuth = (float(part) for part in text.split(","))
        except ValueError:
            raise UserError(
                f"--ellipse is '{text}', but must be off, auto, or ellipticity and azimuth in degrees as 0.02,35"
            ) from None
        if not (0 <= ellipticity <= MAX_ELLIPTICITY and math.isfinite(azimuth)):
            raise UserError(f"--ellipse is '{text}', but the ellipticity must be in [0, {MAX_ELLIPTICITY:g}]")
        return cls(ellipticity, azimuth % 180)

    def matrix(self) -> FloatArray:
        """Return the distortion (2, 2) that takes true (x, y), y up, to measured (x, y)."""
        double = 2 * math.radians(self.azimuth_deg)
        first, second = self.ellipticity / 2 * math.cos(double), self.ellipticity / 2 * math.sin(double)
        return np.array([[1 + first, second], [second, 1 - first]])


@dataclass(frozen=True)
class Warp:
    """Moves the direct beam of every pattern (H, W) to the middle, takes an ellipse out, resamples to `size` pixels.

    The new patterns show a square as wide as the shorter edge of the old ones. Counts are interpolated linearly, which
    for a mere shift is what `beam_center.Resampling` does: every new pixel gets the counts of the old ones that it
    covers. Sums are kept. Where several old pixels go into a new one, it is sampled that many times along both edges.
    """

    shape: tuple[int, int]
    size: int
    ellipse: Ellipse

    def __call__(self, patterns: npt.NDArray[Any], centre_px: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return `patterns` (B, H, W), whose beams are at `centre_px` (B, 2), as (B, size, size)."""
        moved = np.empty((len(patterns), self.size, self.size), np.float32)
        for start in range(0, len(patterns), _CHUNK):
            part = slice(start, start + _CHUNK)
            moved[part] = self._moved(patterns[part], centre_px[part])
        return moved

    def _moved(self, patterns: npt.NDArray[Any], centre_px: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        import torch  # here, because a scan that needs no moving needs no torch
        from torch.nn import functional

        (height, width), factor = self.shape, min(self.shape) / self.size  # old pixels per new one along an edge
        fine = max(1, math.ceil(factor - 1e-9))
        distortion = self.ellipse.matrix()
        # Where in the old pattern each new pixel (or part of one) comes from, as grid_sample counts: -1 to 1, x first.
        turned = distortion[::-1, ::-1] * np.array([[1, -1], [-1, 1]])  # on (row, column), row = -y
        line = ((np.arange(self.size * fine) + 0.5) / fine - self.size / 2) * factor
        down, right = np.meshgrid(line, line, indexing="ij")
        row = turned[0, 0] * down + turned[0, 1] * right
        column = turned[1, 0] * down + turned[1, 1] * right
        centre = torch.as_tensor(np.asarray(centre_px), dtype=torch.float32)[:, None, None]
        place = torch.as_tensor(np.stack((column, row), axis=-1), dtype=torch.float32) + centre.flip(-1)
        grid = (place + 0.5) * torch.tensor([2 / width, 2 / height]) - 1
        counts = torch.as_tensor(np.asarray(patterns, dtype=np.float32))[:, None]
        found = functional.grid_sample(counts, grid, align_corners=False)  # linear, 0 outside
        area = float(np.linalg.det(distortion)) * factor**2
        return np.asarray((functional.avg_pool2d(found, fine)[:, 0] * area).numpy())
