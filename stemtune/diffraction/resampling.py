"""Patterns of one calibration shown to a model that was made for another: the same 1/Å, other pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

SAME_SCALE = 0.002
"""Relative difference of two scales below which patterns are taken as they are (an eighth of a pixel at 64 px)."""

SAME_CENTRE_PX = 0.1
"""Difference of two centres, in pixels, below which patterns are taken as they are."""

SAME_KV = 0.01
"""Relative difference of two voltages below which nothing is said."""

_MIN_REACH = 0.5
_FULL_REACH = 0.95


class Resampling:
    """Turns patterns calibrated as `source` into patterns calibrated as `target`.

    Bilinear interpolation; where the target's pixels are larger, as many whole source pixels as fit are averaged first.
    What lies outside of the source is 0. Intensities are per source pixel, which every model normalises.

    Attributes
    ----------
    needed
        False when the calibrations agree and patterns pass through unchanged.
    notes
        What the user ought to know about the match, one sentence each.

    Raises
    ------
    UserError
        When the source reaches less than half as far (1/Å) as the target.
    """

    def __init__(self, source: Geometry, target: Geometry) -> None:
        self.source, self.target = source, target
        ratio = target.scale_inv_angstrom / source.scale_inv_angstrom
        apart = max(abs(a - b) for a, b in zip(source.centre_px, target.centre_px, strict=True))
        self.needed = source.size != target.size or abs(ratio - 1) > SAME_SCALE or apart > SAME_CENTRE_PX
        self.notes: list[str] = []
        reach = source.radius_inv_angstrom / target.radius_inv_angstrom
        if reach < _MIN_REACH:
            raise UserError(
                f"the patterns reach {source.radius_inv_angstrom:.2f} 1/Å, but the model looks at "
                f"{target.radius_inv_angstrom:.2f} 1/Å; check the scale, or use a model made for this camera length"
            )
        if self.needed:
            self.notes.append(
                f"patterns are resampled from {source.size} px at {source.scale_inv_angstrom:.5g} 1/Å "
                f"to the model's {target.size} px at {target.scale_inv_angstrom:.5g} 1/Å"
            )
        if reach < _FULL_REACH:
            self.notes.append(f"the patterns reach {100 * reach:.0f} % as far as the model looks; the rest is empty")
        if abs(source.kv / target.kv - 1) > SAME_KV:
            self.notes.append(
                f"the scan was taken at {source.kv:g} kV, the model is made for {target.kv:g} kV: spots stand where "
                "they should, but which of them are excited differs a little"
            )
        self._factor = max(1, int(ratio + 1e-6))
        self._grid = self._sampling() if self.needed else None

    def _sampling(self) -> Tensor:
        """Return (1, S, S, 2) places of the target's pixels in the source's, as `grid_sample` wants them."""
        size, factor = self.target.size, self._factor
        count = self.source.size // factor
        ratio = self.target.scale_inv_angstrom / (self.source.scale_inv_angstrom * factor)
        line = torch.arange(size, dtype=torch.float64)
        places = []
        for own, other in zip(self.target.centre_px, self.source.centre_px, strict=True):
            pixel = (line - own) * ratio + (other + 0.5) / factor - 0.5
            places.append((2 * pixel + 1) / count - 1)
        rows, columns = torch.meshgrid(places[0], places[1], indexing="ij")
        return torch.stack((columns, rows), dim=-1)[None].to(torch.float32)

    def __call__(self, patterns: Tensor) -> Tensor:
        """Return `patterns` (B, H, W) as the target shows them (B, S, S); the very same ones when nothing is to do."""
        if self._grid is None:
            return patterns
        self._grid = self._grid.to(patterns.device)
        counts = patterns.to(torch.float32)[:, None]
        if self._factor > 1:
            counts = functional.avg_pool2d(counts, self._factor)
        grid = self._grid.expand(len(counts), -1, -1, -1)
        moved = functional.grid_sample(counts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved[:, 0]
