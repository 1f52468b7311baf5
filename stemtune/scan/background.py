"""The radial background of a pattern: the median count at every distance from the direct beam, taken away."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

_MIN_PIXELS = 8  # of a ring that has a median


class RadialBackground:
    """Subtracts the median over rings one pixel wide around the middle; what falls below 0 is 0.

    Spots cover a small part of a ring and do not move its median; an inelastic halo, amorphous film and rings of fine
    powder go. The direct beam in the middle, out to the radius `beam_px`, stays; `hidden` pixels (size, size) are not
    looked at, and stay 0.
    """

    def __init__(self, size: int, hidden: npt.NDArray[np.bool_] | None, beam_px: float) -> None:
        self.size, self.hidden, self.beam_px = size, hidden, beam_px

    @cached_property
    def _rings(self) -> tuple[list[npt.NDArray[np.intp]], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        middle = (self.size - 1) / 2
        row, column = np.indices((self.size, self.size))
        distance = np.hypot(row - middle, column - middle).ravel()
        number = np.rint(distance).astype(int)
        open_ = np.ones(len(distance), dtype=bool) if self.hidden is None else ~self.hidden.ravel()
        rings, radius = [], []
        for ring in range(number.max() + 1):
            member = np.flatnonzero((number == ring) & open_)
            if ring > self.beam_px and len(member) >= _MIN_PIXELS:
                rings.append(member)
                radius.append(float(distance[member].mean()))
        return rings, np.asarray(radius), distance

    def __call__(self, patterns: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return `patterns` (B, size, size) less their background, float32."""
        flat = patterns.reshape(len(patterns), -1).astype(np.float32)
        rings, radius, distance = self._rings
        if not rings:
            return flat.reshape(patterns.shape)
        # The median of each ring, interpolated along the radius to every pixel's own distance.
        level = np.stack([np.median(flat[:, ring], axis=1) for ring in rings], axis=1)
        place = np.interp(distance, radius, np.arange(len(radius)))
        low = np.minimum(place.astype(int), len(radius) - 1)
        share = (place - low).astype(np.float32)
        ground = level[:, low] * (1 - share) + level[:, np.minimum(low + 1, len(radius) - 1)] * share
        keep = distance <= self.beam_px
        return np.where(keep, flat, np.maximum(flat - ground, 0)).astype(np.float32).reshape(patterns.shape)
