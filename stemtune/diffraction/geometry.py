"""Where a pattern stands in reciprocal space: pixels, 1/Å per pixel, centre and acceleration voltage.

Lab frame, used everywhere: x to the right on the detector, y up (image row = -y), the beam travels along -z and the
centre of the Ewald sphere is at +z. Reciprocal lengths are in 1/Å without 2 pi. `Resampling` shows patterns of one
calibration to a model that was made for another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from stemtune.config import SimulateConfig
from stemtune.errors import UserError

_PLANCK = 6.62607015e-34
_ELECTRON_MASS = 9.1093837015e-31
_ELEMENTARY_CHARGE = 1.602176634e-19
_LIGHT_SPEED = 299792458.0


def wavelength_angstrom(kv: float) -> float:
    """Return the relativistic wavelength (Å) of electrons accelerated by `kv` kilovolts."""
    energy = kv * 1e3 * _ELEMENTARY_CHARGE
    rest = _ELECTRON_MASS * _LIGHT_SPEED**2
    momentum = math.sqrt(2 * _ELECTRON_MASS * energy * (1 + energy / (2 * rest)))
    return _PLANCK / momentum * 1e10


@dataclass(frozen=True)
class Geometry:
    """The calibration of a square pattern.

    Parameters
    ----------
    size
        Width and height in pixels.
    scale_inv_angstrom
        Reciprocal length of one pixel in 1/Å.
    kv
        Acceleration voltage in kV.
    centre_px
        (row, column) of the direct beam; pixel centres have whole numbers. Left out, it is the middle of the
        pattern, `((size - 1) / 2, (size - 1) / 2)`.
    """

    size: int
    scale_inv_angstrom: float
    kv: float
    centre_px: tuple[float, float] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("scale", self.scale_inv_angstrom), ("kv", self.kv)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"`{name}` of the pattern's geometry is {value}, but must be above 0")
        middle = (self.size - 1) / 2
        centre = (middle, middle) if self.centre_px is None else self.centre_px
        object.__setattr__(self, "size", int(self.size))
        object.__setattr__(self, "scale_inv_angstrom", float(self.scale_inv_angstrom))
        object.__setattr__(self, "kv", float(self.kv))
        object.__setattr__(self, "centre_px", (float(centre[0]), float(centre[1])))

    @classmethod
    def of(cls, simulate: SimulateConfig) -> Geometry:
        """Return the geometry that the settings `simulate.size`, `.scale` and `.kv` ask for, centre in the middle."""
        return cls(simulate.size, simulate.scale, simulate.kv)

    @property
    def wavelength_angstrom(self) -> float:
        """Relativistic electron wavelength in Å."""
        return wavelength_angstrom(self.kv)

    @property
    def radius_inv_angstrom(self) -> float:
        """Largest reciprocal distance (1/Å) from the centre of a pattern in the middle to its nearer edges."""
        return self.size / 2 * self.scale_inv_angstrom

    @property
    def corner_inv_angstrom(self) -> float:
        """Reciprocal distance (1/Å) from the centre to the farthest corner of the pattern."""
        row, column = self.centre_px
        reach = [max(value + 0.5, self.size - 0.5 - value) for value in (row, column)]
        return math.hypot(*reach) * self.scale_inv_angstrom

    def pixel_of(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return (row, column) in pixels of the lab coordinates x, y (1/Å, y up)."""
        scale = self.scale_inv_angstrom
        return self.centre_px[0] - np.asarray(y) / scale, self.centre_px[1] + np.asarray(x) / scale

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON or HDF5 attributes; `Geometry.from_dict` takes them back."""
        return {**asdict(self), "centre_px": list(self.centre_px)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Geometry:
        """Rebuild a geometry from what `to_dict` returned; further keys are ignored."""
        missing = [key for key in ("size", "scale_inv_angstrom", "kv") if key not in plain]
        if missing:
            raise UserError(f"the pattern's geometry lacks {', '.join(missing)}")
        centre = plain.get("centre_px")
        try:
            size, scale, kv = int(plain["size"]), float(plain["scale_inv_angstrom"]), float(plain["kv"])
            middle = None if centre is None else (float(centre[0]), float(centre[1]))
        except (TypeError, ValueError, IndexError):
            given = {key: plain.get(key) for key in ("size", "scale_inv_angstrom", "kv", "centre_px")}
            raise UserError(f"the pattern's geometry is not numbers: {given}") from None
        return cls(size, scale, kv, middle)  # type: ignore[arg-type]


SAME_SCALE = 0.002
"""Relative difference of two scales below which patterns are taken as they are (an eighth of a pixel at 64 px)."""

SAME_CENTRE_PX = 0.1  # difference of two centres, in pixels, below which patterns are taken as they are
SAME_KV = 0.01  # relative difference of two voltages below which nothing is said
_MIN_REACH, _FULL_REACH = 0.5, 0.95


class Resampling:
    """Turns patterns calibrated as `source` into patterns calibrated as `target`.

    Bilinear interpolation; where the target's pixels are larger, as many whole source pixels as fit are averaged first.
    What lies outside of the source is 0. Intensities are per source pixel, which every model normalises.

    It is not `needed` when the calibrations agree: patterns then pass through unchanged. `notes` are what the user
    ought to know about the match, one sentence each.

    Raises a `UserError` when the source reaches less than half as far (1/Å) as the target.
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
