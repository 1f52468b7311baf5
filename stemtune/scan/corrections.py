"""What is done to the patterns of a measured scan before they are stored, planned from a sample and applied in blocks.

In this order: bad pixels are filled from their neighbours, pixels behind the beam stop set to 0, the direct beam moved
to the middle (of every pattern where the beam drifts), an ellipse taken out, the background subtracted, the picture
flipped. What is not needed is not done: a centred scan of a faultless detector is copied bit for bit.

Frames. Options speak of the picture as the file has it, x to the right and y up. `flip` brings that picture into
the lab frame: it says which mirror the detector's readout, or the program that wrote the file, has put in, "x" left
and right exchanged, "y" up and down, "transpose" rows and columns. `scan_rotation_deg` is then the angle from the
pattern's x to the scan's x (along a scan line, towards larger columns), anticlockwise as one looks at the pattern:
looked at side by side, the scan image turned by it anticlockwise is oriented as the patterns are. Patterns are not
turned by it; the orientations are, when the map is made: g_map = g * Rz(rotation).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.bad_pixels import BadPixels, fill_bad_pixels
from stemtune.scan.beam_center import Centre, Resampling
from stemtune.scan.descan import Descan
from stemtune.scan.ellipse import Ellipse, Warp

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
        distance = np.hypot(*(np.indices((self.size, self.size)) - (self.size - 1) / 2)).ravel()
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


# Mirrors that bring a picture into the lab frame; two of them are a turn, which `scan_rotation_deg` says.
FLIPS = ("none", "x", "y", "transpose")
_CHOICES = {"descan": ("off", "auto", "on"), "bad_pixels": ("off", "on"), "background": ("off", "on"), "flip": FLIPS}


@dataclass(frozen=True)
class CorrectionOptions:
    """What the user asks for; `flip` and `scan_rotation`, in degrees, are explained at the top of the module."""

    descan: str = "auto"  # centres from a smooth surface: off, on, auto where the beam drifts by > 0.5 px along one
    ellipse: str = "auto"  # off; auto, which needs `calibrate`; or ellipticity and azimuth in degrees as "0.02,35"
    bad_pixels: str = "on"  # fill hot and dead pixels from their neighbours
    beam_stop: str = "off"  # off; auto, found in the patterns; or a shape as `beam_stop.StopShape.parse` reads it
    background: str = "off"  # subtract the radial median
    flip: str = "none"
    scan_rotation: float = 0.0
    calibrate: str = ""  # CIF of the crystal that scale and ellipse are found from; "" none

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CorrectionOptions:
        """Return the options given (None counts as not given); a `UserError` names a value that one does not take."""
        given = {name: value for name, value in options.items() if value is not None}
        if unknown := set(given) - {field.name for field in fields(cls)}:
            raise TypeError(f"ingest has no option {sorted(unknown)[0]}")
        for name, choices in _CHOICES.items():
            if name in given and given[name] not in choices:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is '{given[name]}', but must be one of {', '.join(choices)}")
        found = cls(**given)
        if not math.isfinite(found.scan_rotation):
            raise UserError(f"--scan-rotation is {found.scan_rotation}, but must be an angle in degrees")
        return found

    @property
    def given_ellipse(self) -> Ellipse | None:
        """The ellipse that was given in numbers; None where it is off or to be found."""
        return None if self.ellipse in ("off", "auto") else Ellipse.parse(self.ellipse)


@dataclass(frozen=True)
class Corrections:
    """Brings the patterns of a scan, of `shape` (H, W), into the store's form of `size` x `size` pixels.

    `beam` is the direct beam in the file, `descan` the surface of its place where it drifts over the scan; `bad` and
    `hidden` (H, W) are pixels that are broken and behind the beam stop, `ellipse` the distortion of the measured
    patterns. With `background` the radial median is subtracted, but not within `beam_px` stored pixels of the beam.
    """

    shape: tuple[int, int]
    size: int
    beam: Centre
    bad: BadPixels
    hidden: npt.NDArray[np.bool_] | None = None
    descan: Descan | None = None
    ellipse: Ellipse | None = None
    background: bool = False
    beam_px: float = 3.0
    flip: str = "none"

    @cached_property
    def _resample(self) -> Resampling:
        return Resampling(self.shape, (self.beam.row, self.beam.column), self.size)

    @cached_property
    def _warp(self) -> Warp | None:
        if self.descan is None and self.ellipse is None:
            return None
        return Warp(self.shape, self.size, self.ellipse or Ellipse(0.0, 0.0))

    @property
    def factor(self) -> float:
        """Old pixels per stored pixel along an edge."""
        return self._resample.factor

    @property
    def exact(self) -> bool:
        """Whether counts stay counts: pixels are moved and filled, not mixed."""
        return self._warp is None and self._resample.exact and not self.background

    def __call__(self, patterns: npt.NDArray[Any], position: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `patterns` (B, H, W) at scan `position` (B, 2) as (B, size, size): of their type, if `exact`."""
        if self.bad.any:
            patterns = fill_bad_pixels(patterns, self.bad.hot | self.bad.dead, self.hidden)
        if self.hidden is not None:
            patterns = np.where(self.hidden, np.zeros((), patterns.dtype), patterns)
        moved = self._moved(patterns, position)
        return flipped(self._subtract_background(moved) if self.background else moved, self.flip)

    def _moved(self, patterns: npt.NDArray[Any], position: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._resample(patterns) if self._warp is None else self._warp(patterns, self.centres(position))

    def centres(self, position: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the direct beam's (row, column) (n, 2) in the file's patterns at scan `position` (n, 2)."""
        if self.descan is None:
            return np.tile([self.beam.row, self.beam.column], (len(position), 1))
        return self.descan.at(position)

    @cached_property
    def _subtract_background(self) -> RadialBackground:
        return RadialBackground(self.size, self._hidden_after(), self.beam_px)

    def _hidden_after(self) -> npt.NDArray[np.bool_] | None:
        """Return the stored pixels (size, size), before the flip, that are hidden anywhere in the scan."""
        if self.hidden is None:
            return None
        rows, columns = self.descan.shape if self.descan else (1, 1)
        corners = np.array([(a * (rows - 1), b * (columns - 1)) for a in (0, 0.5, 1) for b in (0, 0.5, 1)])
        mask = np.repeat(self.hidden[None].astype(np.float32), len(corners), axis=0)
        return np.asarray((self._moved(mask, corners) > 0.01).any(axis=0))

    @property
    def hidden_stored(self) -> npt.NDArray[np.bool_] | None:
        """Stored pixels (size, size) that the beam stop hides anywhere in the scan; None: there is none."""
        return None if (hidden := self._hidden_after()) is None else flipped(hidden[None], self.flip)[0]


def flipped(patterns: npt.NDArray[Any], flip: str) -> npt.NDArray[Any]:
    """Return `patterns` (B, S, S), the beam in the middle, mirrored: see `FLIPS`; each mirror undoes itself."""
    if flip == "none":
        return patterns
    turned = {"x": patterns[:, :, ::-1], "y": patterns[:, ::-1], "transpose": patterns.swapaxes(1, 2)}[flip]
    return np.ascontiguousarray(turned)


def corrections_of(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was done to the patterns of a store, `Plan.facts`, from its attributes."""
    try:
        facts = json.loads(attrs.get("corrections") or "{}")
    except (TypeError, ValueError):
        return {}
    if isinstance(facts, dict) and isinstance(descan := facts.get("descan"), dict):
        for name, old in (("drift_px", "wander_px"), ("residual_px", "left_px")):  # old: up to version 0.1
            descan.setdefault(name, descan.get(old))
    return facts if isinstance(facts, dict) else {}


def describe_corrections(attrs: Mapping[str, Any]) -> str:
    """Return what was done to the patterns of a store, from its attributes, for people; "" where nothing was."""
    facts, parts = corrections_of(attrs), []
    if found := facts.get("calibrated"):
        parts.append(
            f"scale {found['scale_inv_angstrom']:.5g} 1/Å per pixel of the file (± {found['scale_error']:.2%}) from"
            f" {found['spots']:,} spots on the rings of {Path(found['cif']).stem}"
        )
    if ellipse := facts.get("ellipse"):
        parts.append(f"ellipse of {ellipse['ellipticity']:.2%} along {ellipse['azimuth_deg']:.0f}° taken out")
    if descan := facts.get("descan"):
        kind = "plane" if descan["order"] == 1 else "quadratic"
        drift, residual = descan["drift_px"], descan["residual_px"]
        parts.append(f"beam drifts by {drift:.1f} px, centred by a {kind} (± {residual:.2f} px)")
    bad = facts.get("bad_pixels") or {}
    if bad.get("hot") or bad.get("dead"):
        parts.append(f"{bad['hot']} hot and {bad['dead']} dead pixels corrected")
    if stop := facts.get("beam_stop"):
        behind = ", the beam behind it" if stop["hides_beam"] else ""
        parts.append(f"beam stop over {stop['pixels']:,} pixels{behind}")
    if facts.get("background"):
        parts.append("radial background subtracted")
    if facts.get("flip", "none") != "none":
        parts.append(f"flipped ({facts['flip']})")
    if attrs.get("scan_rotation_deg"):
        parts.append(f"scan turned by {attrs['scan_rotation_deg']:g}° against the patterns")
    return "; ".join(parts)
