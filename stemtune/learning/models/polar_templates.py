"""Patterns in polar coordinates, and the bank of templates they are compared with.

In polar coordinates a turn of the pattern about the beam is a shift along one axis, so that one template per beam
direction serves every in-plane angle. `matched` compares with the bank as it is; `polar` starts to learn from it.

Shape legend: B patterns, H x W pixels, R radii, A in-plane angles, D beam directions, K spots or neighbours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import inverse, multiply, normalise
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.learning.grid import Grid, about_beam, rotation_vector

_CHUNK = 128  # beam directions worked on at once while a bank is built
_FAINTEST = 1e-4  # template spots weaker than this share of the strongest reflection are left out


class PolarView(nn.Module):
    """Patterns in polar coordinates, prepared for comparison.

    The ring of cells from `inner` to `outer` leaves out the direct beam and reaches into the detector's corners; what
    lies outside the detector counts as empty. A cell holds the mean of the pattern over its area, raised to the power
    `data.gamma`: averaging first is what makes single electrons count little and spots much. Every ring's mean is
    subtracted, and with it an amorphous background. The result is weighted: cells count with their area (the square
    root of it on either side of a product), and it has length one, so that the plain dot product of two views is their
    correlation coefficient.

    Settings: `model.angles`, `radii`, `reach`, `centring` and `data.gamma`. `inner` is the inner radius in 1/Å, for
    phases that are to be compared in the same cells; by default the phase's `inner_radius`. `radius` (R,) in 1/Å and
    `angle` (A,) in radians, anticlockwise from x with y up, are those of the cells' centres.
    """

    radius: Tensor
    angle: Tensor
    weight: Tensor
    pixel: Tensor
    share: Tensor
    first: Tensor

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, inner: float | None = None) -> None:
        super().__init__()
        self.gamma = config.data.gamma
        self.size = geometry.size
        self.geometry, self.centring = geometry, config.model.centring
        radii, angles = config.model.radii, config.model.angles
        outer = config.model.reach * geometry.radius_inv_angstrom
        inner = inner_radius(phase, geometry) if inner is None else inner
        if outer <= inner:
            raise UserError(
                f"`model.reach` is {config.model.reach:g}, so that the polar pattern would end at {outer:.2f} 1/Å, "
                f"before it begins at {inner:.2f} 1/Å; raise it"
            )
        step = (outer - inner) / radii
        self.beam_px = 1.2 * inner / geometry.scale_inv_angstrom
        radius = inner + (torch.arange(radii, dtype=torch.float64) + 0.5) * step
        angle = torch.arange(angles, dtype=torch.float64) * (2 * math.pi / angles)
        weight = (radius / (radius.sum() * angles)).sqrt()
        pixel, share, first = _areas(radius, step, angles, geometry)
        for name, value in (("radius", radius), ("angle", angle), ("weight", weight), ("share", share)):
            self.register_buffer(name, value.to(torch.float32), persistent=False)
        self.register_buffer("pixel", pixel, persistent=False)
        self.register_buffer("first", first, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of radii and of angles, (R, A)."""
        return self.radius.shape[0], self.angle.shape[0]

    def cells(self, patterns: Tensor) -> Tensor:
        """Return the mean counts (B, R, A) in the polar cells of patterns (B, H, W); negative and NaN become 0."""
        if patterns.shape[-2:] != (self.size, self.size):
            height, width = patterns.shape[-2:]
            raise UserError(
                f"the patterns are {height} x {width} px, but the model is made for {self.size} x {self.size}"
            )
        x_BHW = patterns.to(torch.float32).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
        cells_NB = functional.embedding_bag(
            self.pixel, x_BHW.flatten(1).T.contiguous(), self.first, mode="sum", per_sample_weights=self.share
        )
        return cells_NB.T.reshape(-1, *self.shape)

    def weigh(self, x_BRA: Tensor) -> Tensor:
        """Return views (B, R, A) weighted, every ring with mean 0, the whole with length 1.

        Rings of an amorphous background vanish with the means; a pattern of nothing else becomes about 0.
        """
        mean = x_BRA.mean(dim=-1, keepdim=True)
        weighed = (x_BRA - mean) * self.weight[:, None]
        length = weighed.square().sum(dim=(-2, -1), keepdim=True).sqrt()
        return weighed / length.clamp_min(1e-6 * mean.abs().amax(dim=-2, keepdim=True) + 1e-20)

    def forward(self, patterns: Tensor) -> Tensor:
        """Return the prepared polar view (B, R, A), float32, of patterns (B, H, W) of any numeric type."""
        cells = self.cells(centred(patterns, self.geometry, self.beam_px) if self.centring else patterns)
        # The scale of the counts must not matter, not even in half precision.
        cells = cells / cells.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
        return self.weigh(cells.pow(self.gamma))

    def unit(self, patterns: Tensor) -> Tensor:
        """Return the views (B, R, A) scaled to variance one, in single precision and without a gradient."""
        with torch.no_grad(), torch.autocast(patterns.device.type, enabled=False):
            view: Tensor = self(patterns) * math.sqrt(math.prod(self.shape))
        return view


def centred(patterns: Tensor, geometry: Geometry, radius_px: float) -> Tensor:
    """Return patterns (B, H, W), float32, moved so that the direct beam is where it should be; see `centring`."""
    return centring(patterns, geometry, radius_px)[0]


def centring(patterns: Tensor, geometry: Geometry, radius_px: float) -> tuple[Tensor, Tensor]:
    """Return patterns (B, H, W), float32, moved by parts of a pixel so that the direct beam is where it should be.

    And with them how far off (B, 2) it was, in rows and columns.

    The direct beam's place is the mean of the counts within `radius_px` of it, found in three rounds from the
    centre of `geometry`. A pattern stays where it is when it has no direct beam (behind a beam stop, for instance):
    when the counts there are not three times as dense as in the square around, 4 pixels wider.
    """
    x_BHW = patterns.to(torch.float32).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
    height, width = x_BHW.shape[-2:]
    reach = math.ceil(radius_px) + 4
    row, column = round(geometry.centre_px[0] + 1e-3), round(geometry.centre_px[1] + 1e-3)
    top, left = max(0, row - reach), max(0, column - reach)
    window_Bij = x_BHW[:, top : row + reach, left : column + reach]
    down_i1 = torch.arange(top, top + window_Bij.shape[1], device=x_BHW.device)[:, None] - geometry.centre_px[0]
    right_1j = torch.arange(left, left + window_Bij.shape[2], device=x_BHW.device) - geometry.centre_px[1]
    moved_B2 = x_BHW.new_zeros(x_BHW.shape[0], 2)
    beam_Bij = torch.zeros_like(window_Bij)
    for _ in range(3):
        off = torch.hypot(down_i1 - moved_B2[:, :1, None], right_1j - moved_B2[:, 1:, None])
        beam_Bij = (radius_px + 0.5 - off).clamp(0.0, 1.0)
        counts_Bij = window_Bij * beam_Bij
        total_B = counts_Bij.sum((1, 2)).clamp_min(1e-20)
        moved_B2 = torch.stack(((counts_Bij * down_i1).sum((1, 2)), (counts_Bij * right_1j).sum((1, 2))), dim=1)
        moved_B2 = (moved_B2 / total_B[:, None]).clamp(-4.0, 4.0)
    inside_B = (window_Bij * beam_Bij).sum((1, 2)) / beam_Bij.sum((1, 2))
    outside_B = (window_Bij * (1 - beam_Bij)).sum((1, 2)) / (1 - beam_Bij).sum((1, 2))
    moved_B2 = moved_B2 * (inside_B > 3 * outside_B)[:, None]
    # As `affine_grid` would have it, at a tenth of its time; complex numbers add up pairs in one go.
    across_W, along_H = ((2 * torch.arange(edge, device=x_BHW.device) + 1) / edge - 1 for edge in (width, height))
    shift_B2 = moved_B2.flip(1) * (2.0 / moved_B2.new_tensor([width, height]))
    places_HW = torch.complex(across_W.expand(height, -1), along_H[:, None].expand(-1, width))
    grid_BHW2 = torch.view_as_real(places_HW + torch.view_as_complex(shift_B2)[:, None, None])
    return functional.grid_sample(x_BHW[:, None], grid_BHW2, align_corners=False)[:, 0], moved_B2


def _areas(radius: Tensor, step: float, angles: int, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pixels make up each polar cell, as arguments of `embedding_bag`: index, share and first index.

    Every cell takes the mean of about one bilinear sample per pixel length, in both directions.
    """
    pixel, size = geometry.scale_inv_angstrom, geometry.size
    along = max(1, round(step / pixel))
    across = max(1, round(0.8 * 2 * math.pi * geometry.radius_inv_angstrom / angles / pixel))
    within_r = ((torch.arange(along) + 0.5) / along - 0.5).double() * step
    within_a = ((torch.arange(across) + 0.5) / across - 0.5).double() * (2 * math.pi / angles)
    turn = torch.arange(angles, dtype=torch.float64) * (2 * math.pi / angles)
    r = (radius[:, None] + within_r)[:, None, :, None]
    phi = (turn[:, None] + within_a)[None, :, None, :]
    column = (r * phi.cos() / pixel + geometry.centre_px[1]).flatten()
    row = (geometry.centre_px[0] - r * phi.sin() / pixel).flatten()
    cell = torch.arange(len(radius) * angles).repeat_interleave(along * across)
    indices, shares = [], []
    for right in (0, 1):
        for down in (0, 1):
            j, i = column.floor() + right, row.floor() + down
            weight = (1 - (column - j).abs()) * (1 - (row - i).abs()) / (along * across)
            weight = weight.where((i >= 0) & (i < size) & (j >= 0) & (j < size), 0.0)
            indices.append(torch.stack((cell, (i.clamp(0, size - 1) * size + j.clamp(0, size - 1)).long())))
            shares.append(weight)
    total = torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat(shares), (len(radius) * angles, size * size), check_invariants=False
    ).coalesce()
    cells, pixels = total.indices()[:, total.values() > 0]
    first = torch.searchsorted(cells, torch.arange(len(radius) * angles))
    return pixels.contiguous(), total.values()[total.values() > 0], first


def inner_radius(phase: Phase, geometry: Geometry) -> float:
    """Return the radius in 1/Å, half of the shortest reciprocal lattice vector with intensity, beyond which spots are.

    Raises a `UserError` when no reflection falls on the pattern.
    """
    shortest = phase.reflections(min(geometry.radius_inv_angstrom, 1.0)).g
    if not len(shortest):
        raise UserError(
            f"no reflection of {phase.name} falls on a pattern of {geometry.size} px at "
            f"{geometry.scale_inv_angstrom:g} 1/Å per pixel"
        )
    half = 0.5 * float(torch.linalg.vector_norm(shortest, dim=-1).min())
    return min(max(half, 3 * geometry.scale_inv_angstrom), 0.5 * geometry.radius_inv_angstrom)


def template_views(config: Config, phase: Phase, geometry: Geometry, view: PolarView, orientation: Tensor) -> Tensor:
    """Return the prepared views (D, R, A), float32, of kinematic templates of orientations (D, 4).

    A spot is a Gaussian of sigma `model.template_spot` with height |F|² exp(-(s / width)²) to the power
    `model.template_power`: the broad shape factor and the small power stand in for dynamical scattering.
    """
    settings = config.model
    simulator = KinematicSimulator(phase, geometry, config.simulate)
    radius, angle = view.radius, view.angle
    sharp = 1 / (2 * settings.template_spot**2)
    outer = float(radius[-1]) + 3 * settings.template_spot
    found = []
    for part in orientation.to(torch.float32).split(_CHUNK):  # type: ignore[no-untyped-call]
        spots = simulator.template_spots(part, settings.template_width, outer, _FAINTEST)
        rho, phi = torch.hypot(spots.x, spots.y), torch.atan2(spots.y, spots.x)
        height = (spots.intensity / simulator.strength.max().float()).pow(settings.template_power)
        along_DRK = torch.exp(-sharp * (radius[:, None] - rho[:, None]).square()) * height[:, None]
        chord_DKA = 2 * rho.square()[..., None] * (1 - torch.cos(angle - phi[..., None]))
        found.append(view.weigh(along_DRK @ torch.exp(-sharp * chord_DKA)))
    return torch.cat(found)


class Neighbours(NamedTuple):
    """The beam directions next to each direction of a grid, equal directions beyond the sector's border included.

    Cell (d, a) and the cell of neighbour k at angle `a - turn[d, k]` differ by the rotation vector `tilt[d, k]` across
    the beam, in the lab frame of in-plane angle zero: `s * base[direction] * Rz(turn) = base[d] * exp(tilt)` for some
    symmetry operation s. `direction` (D, K) int64, `turn` (D, K) and `tilt` (D, K, 2) in radians, along lab x and y.
    """

    direction: Tensor
    turn: Tensor
    tilt: Tensor


def neighbours(grid: Grid, count: int) -> Neighbours:
    """Return the `count` nearest neighbours of every direction of `grid`, the direction itself first."""
    base, operations = grid.base.double(), grid.symmetry.operations.to(grid.base.device)
    directions, order = base.shape[0], operations.shape[0]
    count = min(count, directions * order)
    equal_SD4 = multiply(operations[:, None], base)
    beam = base.new_tensor([0.0, 0.0, 1.0])
    beams_N3 = _beam(equal_SD4.flatten(0, 1), beam)
    found, turn, tilt = [], [], []
    for start in range(0, directions, _CHUNK):
        part_P4 = base[start : start + _CHUNK]
        near_PK = (_beam(part_P4, beam) @ beams_N3.T).topk(count, dim=1).indices
        relative_PK4 = multiply(inverse(part_P4)[:, None], equal_SD4.flatten(0, 1)[near_PK])
        zero = torch.zeros_like(relative_PK4[..., 0])
        twist_PK4 = normalise(torch.stack((relative_PK4[..., 0], zero, zero, relative_PK4[..., 3]), dim=-1))
        swing_PK3 = rotation_vector(multiply(relative_PK4, inverse(twist_PK4)))
        found.append(near_PK % directions)
        turn.append(-2 * torch.atan2(twist_PK4[..., 3], twist_PK4[..., 0]))
        tilt.append(swing_PK3[..., :2])
    return Neighbours(torch.cat(found), torch.cat(turn).float(), torch.cat(tilt).float())


def _beam(g: Tensor, z: Tensor) -> Tensor:
    """Return the crystal directions (..., 3) that orientations (..., 4) have along the beam."""
    pure = torch.cat((z.new_zeros(1), z))
    return multiply(multiply(g, pure), inverse(g))[..., 1:]


def turned(base: Tensor, tilt: Tensor, angle: Tensor) -> Tensor:
    """Return `base * exp(tilt) * Rz(-angle)`: (..., 4), (..., 2) and (...) in radians give (..., 4)."""
    half = 0.5 * torch.linalg.vector_norm(tilt, dim=-1, keepdim=True)
    swing = torch.cat((half.cos(), 0.5 * torch.sinc(half / math.pi) * tilt, torch.zeros_like(half)), dim=-1)
    return multiply(multiply(base, swing), about_beam(-angle))


def polar_grid(config: Config, phase: Phase, step_deg: float) -> Grid:
    """Return the grid of cells: `model.grid_step` (`step_deg` if that is 0) apart, `model.angles` in-plane angles."""
    step = config.model.grid_step or step_deg
    if step < 0.5:
        raise UserError(
            f"`model.grid_step` is {step:g}, but must be 0 (the architecture's own) or at least 0.5 degrees"
        )
    return Grid(phase.symmetry, step, config.model.angles)
