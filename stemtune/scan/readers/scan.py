"""What every reader answers with: a scan that has not been read yet, and the units of its calibration."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune.diffraction.geometry import wavelength_angstrom
from stemtune.errors import UserError

_LENGTHS_NM = {"pm": 1e-3, "a": 0.1, "å": 0.1, "angstrom": 0.1, "nm": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "mm": 1e6}


@dataclass(frozen=True)
class Scan:
    """A measured scan that has not been read yet.

    Attributes
    ----------
    path
        The file.
    data
        Lazy dask array (rows, columns, height, width) of counts; pattern rows run downwards, y = -row.
    scale
        Reciprocal length of a pixel as the file has it; `scale_inv_angstrom` gives it in 1/Å.
    scale_units
        Unit of `scale`, as written in the file.
    kv
        Acceleration voltage in kV, or None.
    centre_px
        (row, column) of the direct beam by the file's axes, or None.
    step_nm
        (row, column) distance of scan positions in nm, or None.
    rotation_deg
        Angle from the scan's axes to the detector's, as py4DSTEM's QR_rotation has it (from array axis 0 to axis 1), or
        None when the file does not say.
    flip
        Whether the scan's axes are those of the detector with rows and columns swapped (py4DSTEM's QR_flip), or None.
    parts
        Further files that the patterns lie in, beside `path`.
    """

    path: Path
    data: Any
    scale: tuple[float, float]
    scale_units: str
    kv: float | None
    centre_px: tuple[float, float] | None
    step_nm: tuple[float, float] | None
    rotation_deg: float | None = None
    flip: bool | None = None
    parts: tuple[Path, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the scan."""
        return int(self.data.shape[0]), int(self.data.shape[1])

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """Height and width of a pattern in pixels."""
        return int(self.data.shape[2]), int(self.data.shape[3])

    def scale_inv_angstrom(self, kv: float | None) -> float | None:
        """Return 1/Å per pixel, or None when the file's unit is no reciprocal length and no angle.

        Raises
        ------
        UserError
            When the two axes disagree by more than 1 %, so that pixels are not square.
        """
        factor = reciprocal_factor(self.scale_units, kv)
        if factor is None:
            return None
        row, column = (abs(value) * factor for value in self.scale)
        if not math.isclose(row, column, rel_tol=0.01):
            raise UserError(
                f"{self.path.name} has pixels of {row:g} x {column:g} 1/Å, but they must be square; give --scale"
            )
        return (row + column) / 2


def reciprocal_factor(units: str, kv: float | None) -> float | None:
    """Return what a scale in `units` is multiplied with to be in 1/Å, or None if that is not known.

    Reciprocal lengths of any spelling are read ("1/Å", "nm^-1", "$A^{-1}$", "[n_m^-1]"), without 2 pi; scattering
    angles (mrad, rad) need the voltage.
    """
    plain = re.sub(r"[\s${}\\()\[\]_]|mathrm|text", "", units.replace("Å", "a").replace("Å", "a")).lower()
    plain = plain.replace("⁻¹", "^-1").replace("**", "^").replace("angstrom", "a")
    match = re.fullmatch(r"1/([a-zåµμ]+)|([a-zåµμ]+)\^?-1", plain)
    if match:
        length = _LENGTHS_NM.get(match[1] or match[2], {"m": 1e9, "cm": 1e7}.get(match[1] or match[2]))
        return None if length is None else 0.1 / length
    if plain in ("mrad", "rad") and kv:
        return (1e-3 if plain == "mrad" else 1.0) / wavelength_angstrom(kv)
    return None


def length_nm(units: Any) -> float | None:
    """Return how many nm one of `units` is, or None if that is not known."""
    return _LENGTHS_NM.get(re.sub(r"[\s\[\]_]", "", str(units or "")).lower())


def scan_step(scales: Sequence[Any], units: Sequence[Any]) -> tuple[float, float] | None:
    """Return the (row, column) step of a scan in nm from the scales and units of its axes, or None."""
    lengths = [length_nm(unit) for unit in units]
    if len(lengths) != 2 or None in lengths:
        return None
    first, second = (abs(float(scale or 0)) * float(unit or 0) for scale, unit in zip(scales, lengths, strict=True))
    return (first, second) if min(first, second) > 0 else None


def beam_by_axes(
    offsets: Sequence[float], scales: Sequence[float], lengths: Sequence[int], units: str
) -> tuple[float, float] | None:
    """Return where the two axes of a pattern are 0, in pixels, or None where that is outside of it."""
    if reciprocal_factor(units, 100.0) is None or not all(scales):
        return None
    row, column = (-offset / scale for offset, scale in zip(offsets, scales, strict=True))
    inside = all(0 < value < length - 1 for value, length in zip((row, column), lengths, strict=True))
    return (row, column) if inside else None


def scan_shape(name: str, lengths: Sequence[int], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of a scan whose axes have these `lengths`, laid out as `wanted` if that is given.

    Raises
    ------
    UserError
        When there are not as many frames as `wanted`, or nothing is wanted and there are not two axes.
    """
    frames = math.prod(lengths)
    if wanted is not None:
        if wanted[0] * wanted[1] != frames:
            raise UserError(
                f"{name} holds {frames:,} frames, which is not {wanted[0]} x {wanted[1]}; give another --shape ny,nx"
            )
        return wanted
    if len(lengths) == 2:
        return int(lengths[0]), int(lengths[1])
    if not lengths:
        return 1, 1
    if len(lengths) == 1:
        raise UserError(f"{name} holds {frames:,} frames and no scan shape; give --shape ny,nx")
    axes = " x ".join(str(length) for length in lengths)
    raise UserError(f"{name} holds {axes} frames; a scan has two axes, give --shape ny,nx to lay them out as one")


def checked_kv(value: float | None) -> float | None:
    """Return a voltage in kV as a file has it, or None where it is nonsense."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def why(problem: Exception) -> str:
    """Return one line that says why a file could not be read."""
    lines = str(problem).strip().splitlines()
    text = lines[0] if lines else type(problem).__name__
    if "truncated" in text:
        return "the file is truncated; copy it again"
    if "signature not found" in text:
        return "it is no HDF5 file"
    return text.rstrip(".")
