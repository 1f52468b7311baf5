"""Where a pattern stands in reciprocal space: pixels, 1/Å per pixel, centre and acceleration voltage.

Lab frame, used everywhere: x to the right on the detector, y up (image row = -y), the beam travels along -z and the
centre of the Ewald sphere is at +z. Reciprocal lengths are in 1/Å without 2 pi.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
