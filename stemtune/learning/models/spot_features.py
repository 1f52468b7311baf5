"""What a pattern shows at the places where an orientation predicts spots.

Shape legend: B patterns, H x W pixels, M candidate orientations, R reflections, K predicted spots, C channels,
F features.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import inverse, rotate
from stemtune.crystal.scattering import relativistic_mass_factor
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.models.matched import half_precision

FEATURES = 11  # numbers per predicted spot; see `SpotReader.forward`
PEAKS, PEAK_FEATURES = 24, 8
"""Brightest peaks of a pattern that are explained by each orientation, and the numbers per peak."""

NARROW, WIDE = 0.035, 0.1  # widths (Gaussian sigma, 1/Å) of the windows that counts are collected in
_FAINTEST = 0.5  # counts; fainter maxima are no peaks, and stand as nothing at the centre
_NEAR = 0.003  # 1/Å; excitation errors below this make no difference to which spots are looked at


class WindowCounts(NamedTuple):
    """Counts of B patterns collected in windows around every pixel, and over the whole pattern.

    `window` (B, 4, H, W): counts in the narrow window, their first moments to the right and up in units of its width,
    and counts in the wide window. `direct` and `rest` (B,): counts inside and outside the direct beam's place. `peak`
    (B, P, 4) of the brightest peaks: x right and y up in 1/Å, counts in the narrow and in the wide window.
    """

    window: Tensor
    direct: Tensor
    rest: Tensor
    peak: Tensor


class SpotFeatures(NamedTuple):
    """Features of the spots of M orientations.

    `feature` (B, M, K, F): invariants of every predicted spot; `place` (B, M, K, 2): where it is predicted, x right and
    y up in 1/Å; `peak` (B, M, P, F'): invariants of every peak of the pattern.
    """

    feature: Tensor
    place: Tensor
    peak: Tensor


Pairs = tuple[Tensor, ...]
"""Pattern and place (N,) of some of the candidates (B, M)."""


class SpotReader(nn.Module):
    """Predicts the spots of orientations and reads the pattern at their places.

    Of each orientation so many `spots` are looked at, those with the largest U_g / (|s_g| + 0.003 1/Å), out to `reach`
    half widths of the pattern. `g` (R, 3) are the reciprocal vectors in the crystal frame in 1/Å, `coupling` (R,) half
    the inverse extinction distances in 1/Å.
    """

    g: Tensor
    coupling: Tensor
    smooth: Tensor
    beam: Tensor

    def __init__(self, phase: Phase, geometry: Geometry, spots: int, reach: float) -> None:
        super().__init__()
        self.geometry, self.spots = geometry, spots
        known = phase.reflections(min(reach * geometry.radius_inv_angstrom, 1.99 / geometry.wavelength_angstrom))
        if not len(known.hkl):
            raise UserError(f"no reflection of {phase.name} falls on the patterns; their scale or size is too small")
        wavelength = geometry.wavelength_angstrom
        scale = relativistic_mass_factor(wavelength) * wavelength / (2 * math.pi * phase.volume)
        coupling = known.structure_factor.abs() * scale
        kept = coupling > 1e-3 * coupling.max()
        self.curve = wavelength / 2
        self.beam_px = 0.6 * float(torch.linalg.vector_norm(known.g, dim=1).min()) / geometry.scale_inv_angstrom
        rows = torch.arange(geometry.size, dtype=torch.float64)
        apart = (rows - rows[:, None]) * geometry.scale_inv_angstrom
        narrow, wide = torch.exp(-0.5 * (apart / NARROW) ** 2), torch.exp(-0.5 * (apart / WIDE) ** 2)
        off = torch.hypot(rows[:, None] - geometry.centre_px[0], rows - geometry.centre_px[1])
        buffers = {
            "g": known.g[kept],
            "coupling": coupling[kept],
            "smooth": torch.stack((narrow, narrow * apart / NARROW, wide)),  # products of matrices: fast on any device
            "beam": (self.beam_px + 0.5 - off).clamp(0.0, 1.0),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(torch.float32).contiguous(), persistent=False)

    def collect(self, counts: Tensor) -> WindowCounts:
        """Return what is collected from centred patterns (B, H, W) of counts."""
        window = self.windows(counts)
        direct = (counts * self.beam).sum((1, 2))
        peak = self._peaks(window[:, 0], window[:, 3])
        return WindowCounts(window, direct, counts.sum((1, 2)) - direct, peak)

    def windows(self, counts: Tensor) -> Tensor:
        """Return the windows (B, 4, H, W) over centred patterns (B, H, W) of counts; see `WindowCounts`."""
        low = half_precision()  # a count to 0.4 %, at three times the speed
        narrow_HW, moment_HW, wide_HW = self.smooth.to(low).unbind()
        across_BHX = counts.to(low) @ torch.cat((narrow_HW.T, moment_HW.T, wide_HW.T), dim=1)
        near_BHW, turn_BHW, far_BHW = across_BHX.chunk(3, dim=2)
        window_BCHW = across_BHX.new_empty(len(counts), 4, *counts.shape[1:])
        # Rows count downwards, hence the sign.
        products = ((narrow_HW, near_BHW), (narrow_HW, turn_BHW), (-moment_HW, near_BHW), (wide_HW, far_BHW))
        for channel, (down_HW, part_BHW) in enumerate(products):
            window_BCHW[:, channel] = down_HW @ part_BHW
        return window_BCHW.to(counts.dtype)

    def _peaks(self, narrow_BHW: Tensor, wide_BHW: Tensor) -> Tensor:
        """Return the brightest local maxima (B, P, 4) outside the direct beam; see `WindowCounts`."""
        low_BHW = narrow_BHW.to(half_precision())  # as they were collected; and whole numbers compare fastest
        order_BHW = low_BHW.view(torch.int16 if low_BHW.element_size() == 2 else torch.int32)
        is_peak_BHW = (order_BHW >= _highest_nearby(order_BHW)) & (self.beam == 0)
        height = narrow_BHW.where(is_peak_BHW, 0.0).flatten(1)
        value_BP, index_BP = height.topk(PEAKS, dim=1)
        row, column = index_BP // self.geometry.size, index_BP % self.geometry.size
        scale = self.geometry.scale_inv_angstrom
        x, y = (column - self.geometry.centre_px[1]) * scale, (self.geometry.centre_px[0] - row) * scale
        peak = torch.stack((x, y, value_BP, wide_BHW.flatten(1).gather(1, index_BP)), dim=-1)
        return peak * (value_BP > _FAINTEST)[..., None]

    def forward(self, windows: WindowCounts, orientation: Tensor, pair: Pairs | None = None) -> SpotFeatures:
        """Return the features of orientations (B, M, 4), or of those at the N places `pair`, as if each of a pattern.

        The features of a spot are: the logarithms of the counts in the narrow and the wide window, the mean
        displacement of the counts outwards and anticlockwise in the narrow window, the excitation error and its
        absolute value's logarithm, the logarithms of the coupling and of the two-beam intensity of a thick crystal,
        |g|, the logarithm of the pattern's counts, and whether the spot lies on the detector.
        """
        # Where spots are expected, and the counts collected there.
        if pair is None:
            place_BMK2, error_BMK, coupling_BMK = self.predicted(orientation)
            counts_BMKC, inside_BMK = self.sampled(windows.window, place_BMK2)
        else:
            place_BMK2, error_BMK, coupling_BMK = self.predicted(orientation[pair][:, None])
            every_BMK2 = place_BMK2.new_zeros(*orientation.shape[:2], *place_BMK2.shape[2:])
            every_BMK2[pair] = place_BMK2[:, 0]
            counts_BMKC, inside_BMK = (part[pair][:, None] for part in self.sampled(windows.window, every_BMK2))
            windows = WindowCounts(windows.window, *(part[pair[0]] for part in windows[1:]))
        # The counts' mean displacement, on the axes outwards and anticlockwise: these turn with the pattern.
        length_BMK = torch.linalg.vector_norm(place_BMK2, dim=-1).clamp_min(1e-6)
        narrow_BMK = counts_BMKC[..., 0].clamp_min(0)
        x, y = (place_BMK2 / length_BMK[..., None]).unbind(-1)
        shift_x, shift_y = counts_BMKC[..., 1] / (narrow_BMK + 1), counts_BMKC[..., 2] / (narrow_BMK + 1)
        # The two-beam intensity of a thick crystal; then every number scaled to about the same spread.
        two_beam = (2 * coupling_BMK) ** 2 / ((2 * coupling_BMK) ** 2 + error_BMK**2)
        feature = (
            narrow_BMK.log1p() - 1.0,
            counts_BMKC[..., 3].clamp_min(0).log1p() - 2.0,
            shift_x * x + shift_y * y,
            shift_y * x - shift_x * y,
            error_BMK * 50,
            (error_BMK.abs() + 1e-3).log() + 5,
            coupling_BMK.clamp_min(1e-7).log() + 8,
            (two_beam + 1e-4).log() * 0.5,
            length_BMK - 1,
            (windows.rest.clamp_min(0).log1p() - 7)[:, None, None].expand_as(x),
            inside_BMK,
        )
        # The other way round: how well the expected spots explain the pattern's brightest peaks.
        peak = self._explained(windows, place_BMK2, feature[4], feature[7])
        return SpotFeatures(torch.stack(feature, dim=-1), place_BMK2, peak)

    def _explained(self, windows: WindowCounts, place_BMK2: Tensor, error_BMK: Tensor, two_beam_BMK: Tensor) -> Tensor:
        """Return how each candidate explains the brightest peaks (B, M, P, F').

        The logarithms of the peak's counts in both windows and of the pattern's, its distance from the centre, and of
        the nearest predicted spot the distance in narrow widths, the excitation error and the two-beam intensity.
        """
        peak_BP2 = windows.peak[..., :2]
        candidates = place_BMK2.shape[1]
        apart = torch.cdist(peak_BP2, place_BMK2.flatten(1, 2), compute_mode="donot_use_mm_for_euclid_dist")
        apart_BPM, nearest_BPM = apart.view(*apart.shape[:2], candidates, -1).min(-1)
        apart_BMP, nearest_BMP = apart_BPM.transpose(1, 2), nearest_BPM.transpose(1, 2)
        counts_BMP, wide_BMP = (windows.peak[:, None, :, k].expand(-1, candidates, -1) for k in (2, 3))
        feature = (
            counts_BMP.clamp_min(0).log1p() - 1.0,
            wide_BMP.clamp_min(0).log1p() - 2.0,
            (windows.rest.clamp_min(0).log1p() - 7)[:, None, None].expand_as(apart_BMP),
            torch.linalg.vector_norm(peak_BP2, dim=-1)[:, None].expand_as(apart_BMP) - 1,
            (apart_BMP / NARROW).clamp_max(5.0) - 1,
            torch.exp(-0.5 * (apart_BMP / NARROW).square()),
            error_BMK.gather(-1, nearest_BMP),
            two_beam_BMK.gather(-1, nearest_BMP),
        )
        return torch.stack(feature, dim=-1)

    def predicted(self, orientation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the spots of orientations (B, M, 4) that are looked at.

        Lab coordinates (B, M, K, 2), excitation errors (B, M, K) and couplings (B, M, K), all in 1/Å.
        """
        axes = torch.eye(3, dtype=orientation.dtype, device=orientation.device)
        lab_BM33 = rotate(inverse(orientation)[..., None, :], axes)
        error_BMR = (lab_BM33[..., 2] @ self.g.T) - self.g.square().sum(1) * self.curve
        weight_BMR = self.coupling / (error_BMR.abs() + _NEAR)
        index_BMK = weight_BMR.topk(min(self.spots, len(self.g)), dim=-1, sorted=False).indices
        place_BMK2 = self.g[index_BMK] @ lab_BM33[..., :2]
        return place_BMK2, error_BMR.gather(-1, index_BMK), self.coupling[index_BMK]

    def sampled(self, window_BCHW: Tensor, place_BMK2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the counts (B, M, K, C) at lab coordinates, and 1 where these lie on the detector, else 0."""
        size, scale = self.geometry.size, self.geometry.scale_inv_angstrom
        row, column = self.geometry.centre_px
        column_BMK = (2 * (place_BMK2[..., 0] / scale + column) + 1) / size - 1
        row_BMK = (2 * (row - place_BMK2[..., 1] / scale) + 1) / size - 1
        grid_BMK2 = torch.stack((column_BMK, row_BMK), dim=-1)
        sampled = functional.grid_sample(window_BCHW, grid_BMK2, align_corners=False).permute(0, 2, 3, 1)
        return sampled, (grid_BMK2.abs() < 1).all(-1).to(sampled.dtype)


def _highest_nearby(order_BHW: Tensor) -> Tensor:
    """Return the largest whole number (B, H, W), none below 0, within two pixels along both edges."""
    size = order_BHW.shape[-1]
    wide = functional.pad(order_BHW, (2, 2, 2, 2))
    tall = reduce(torch.maximum, [wide[:, step : step + size] for step in range(5)])
    return reduce(torch.maximum, [tall[..., step : step + size] for step in range(5)])
