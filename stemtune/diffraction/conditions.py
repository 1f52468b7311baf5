"""What differs from pattern to pattern besides the orientation: thickness, illumination, dose and errors.

Every range of `SimulateConfig` is drawn from anew for every pattern, from one torch generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stemtune.config import SimulateConfig, Span, knob
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

HALO_INV_ANGSTROM = Span(0.03, 0.12)  # width (Gaussian sigma) of the inelastic halo around the direct beam, in 1/Å
TAIL_INV_ANGSTROM = Span(0.25, 0.7)  # width of the broad diffuse background, in 1/Å
RING_INV_ANGSTROM = Span(0.22, 0.34)
"""Width of the amorphous ring, in 1/Å; it stands at about 1.2 times this (carbon support films: near 0.3)."""
RING_HOLE = 0.7  # width of the hole inside the ring, as a share of the ring's own width


@dataclass(frozen=True)
class Conditions:
    """Drawn values, one per pattern (B,), unless another shape is given.

    Attributes
    ----------
    thickness_angstrom, precession_rad, convergence_rad
        Crystal thickness in Å; semi-angles of precession and convergence in rad.
    shape_width, intensity_power
        Width (1/Å) of the gaussian shape factor; power of the diffracted intensities.
    dose
        Electrons per pattern; 0 leaves the pattern free of noise.
    direct_beam, background
        Share of the background in the dose, and of the direct beam in what the background leaves.
    background_width, background_weight
        Widths (1/Å) of halo, diffuse tail and amorphous ring (B, 3), and their shares of the background (B, 3).
    disk_px, blur_px, stop_px
        Radius of the disks, sigma of the detector's blur, radius of the beam stop, in pixels.
    centre_px, distortion
        True (row, column) of the direct beam (B, 2); matrix (B, 2, 2) that turns true x, y into x, y as the calibration
        reads them.
    """

    thickness_angstrom: Tensor
    precession_rad: Tensor
    convergence_rad: Tensor
    shape_width: Tensor
    intensity_power: Tensor
    dose: Tensor
    direct_beam: Tensor
    background: Tensor
    background_width: Tensor
    background_weight: Tensor
    disk_px: Tensor
    blur_px: Tensor
    stop_px: Tensor
    centre_px: Tensor
    distortion: Tensor


def check_settings(simulate: SimulateConfig) -> None:
    """Raise a one-line `UserError` for a setting that no simulation can honour."""
    for item in fields(simulate):
        knob(f"simulate.{item.name}").parse(getattr(simulate, item.name))
    if simulate.dose.low == 0 < simulate.dose.high:
        raise UserError(
            f"`simulate.dose` is {simulate.dose}, but a range of doses must start above 0 (0 alone is noise-free)"
        )


def draw_conditions(
    simulate: SimulateConfig, geometry: Geometry, count: int, generator: torch.Generator | None, device: torch.device
) -> Conditions:
    """Draw the conditions of `count` patterns (see `Conditions`) from `generator`, as float32 on `device`."""
    source = generator.device if generator is not None else device
    columns = torch.rand(count, 24, generator=generator, device=source).to(device).unbind(1)
    draw = iter(columns)
    # In the order of the draws, which is part of a seed's meaning.
    thickness = 10 * _uniform(simulate.thickness, next(draw))
    precession = _uniform(simulate.precession, next(draw)) * (math.pi / 180)
    convergence = _uniform(simulate.convergence, next(draw)) * 1e-3
    shape_width = _uniform(simulate.shape_width, next(draw))
    power = _uniform(simulate.intensity_power, next(draw))
    dose = _log_uniform(simulate.dose, next(draw))
    direct, background = _uniform(simulate.direct_beam, next(draw)), _uniform(simulate.background, next(draw))
    widths = [_uniform(span, next(draw)) for span in (HALO_INV_ANGSTROM, TAIL_INV_ANGSTROM, RING_INV_ANGSTROM)]
    weights = torch.stack([next(draw) for _ in range(3)], dim=1) + 1e-3
    blur, stop = _uniform(simulate.blur, next(draw)), _uniform(simulate.beam_stop, next(draw))
    distance, azimuth = simulate.centre_error * next(draw).sqrt(), 2 * math.pi * next(draw)
    row, column = geometry.centre_px
    centre = torch.stack((row + distance * azimuth.sin(), column + distance * azimuth.cos()), dim=1)
    scale = 1 + simulate.scale_error * (2 * next(draw) - 1)
    distortion = _distortion(scale, simulate.ellipticity * next(draw), math.pi * next(draw))
    return Conditions(
        thickness_angstrom=thickness,
        precession_rad=precession,
        convergence_rad=convergence,
        shape_width=shape_width,
        intensity_power=power,
        dose=dose,
        direct_beam=direct,
        background=background,
        background_width=torch.stack(widths, dim=1),
        background_weight=weights / weights.sum(1, keepdim=True),
        disk_px=convergence / (geometry.wavelength_angstrom * geometry.scale_inv_angstrom),
        blur_px=blur,
        stop_px=stop,
        centre_px=centre,
        distortion=distortion,
    )


def _uniform(span: Span, drawn: Tensor) -> Tensor:
    return span.low + (span.high - span.low) * drawn


def _log_uniform(span: Span, drawn: Tensor) -> Tensor:
    if span.low == span.high:
        return torch.full_like(drawn, span.low)
    return span.low * (span.high / span.low) ** drawn


def _distortion(scale: Tensor, ellipticity: Tensor, azimuth: Tensor) -> Tensor:
    """Return the stretch (B, 2, 2) by `scale`, by 1 + e/2 along `azimuth` (rad) and by 1 - e/2 across it."""
    along, across = scale * ellipticity / 2 * (2 * azimuth).cos(), scale * ellipticity / 2 * (2 * azimuth).sin()
    rows = (torch.stack((scale + along, across), dim=1), torch.stack((across, scale - along), dim=1))
    return torch.stack(rows, dim=1)
