"""What the detector makes of the spots: disks, blur, background, beam stop, dead pixels and counting noise.

`Resampling` shows patterns as a detector of another calibration would, the one that a model was made for.

Everything is batched torch and works on CPU and GPU alike. Spots come as one flat list over the whole batch, so
that no work is spent on padding.
Shapes: B patterns, M spots of the batch together, S pixels along an edge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stemtune._parallel import map_over_threads
from stemtune.config import SimulateConfig
from stemtune.diffraction.conditions import RING_HOLE, Conditions, check_settings
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

_PIXEL_VARIANCE = 1 / 12  # a pixel integrates over its square, which blurs like a Gaussian of this variance
_FAINTEST = 1e-4  # spots with a smaller share of the diffracted intensity are not drawn
_REACH = 3.5  # spots are drawn out to their radius plus this many sigma
_SMALLEST_DISK = 0.1  # px; a smaller radius is not told apart from a point
_SLABS = 16  # slabs that a disk is cut into to blur it
_ENTRIES = 2048  # entries of a spot's radial profile
_COMPUTED = 96  # entries that are computed; those between are interpolated
_FULL_STEPS = 2  # counts that are tried for every pixel before only the bright ones go on
_LARGE = 12.0  # expected counts above which the Poisson quantile is taken from its expansion


CHUNK = 64
"""Patterns rendered at once on a CPU: few enough for its cache, and enough that threads seldom wait for Python.
Fixed, because it is part of a seed's meaning."""

_GPU_CHUNK = 512


class DiffractedBeams(NamedTuple):
    """What B crystals send to the detector, as one flat list over the batch, ordered by pattern.

    `pattern`, `x`, `y` and `intensity` (M,): number of the pattern, lab coordinates (1/Å, y up) and intensity of each
    diffracted beam, of which only ratios within a pattern count; `direct_beam` (B,): share of the direct beam in what
    is scattered elastically.
    """

    pattern: Tensor
    x: Tensor
    y: Tensor
    intensity: Tensor
    direct_beam: Tensor


class Detector:
    """Makes patterns of `geometry`, batched, on any torch device, under conditions drawn from the ranges of `simulate`.

    A subclass says what reaches the detector. `chunk` is how many patterns are made at once.

    Raises a `UserError` for settings out of range.
    """

    def __init__(self, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu") -> None:
        check_settings(simulate)
        self.geometry, self.simulate, self.device = geometry, simulate, torch.device(device)
        self.chunk = CHUNK if self.device.type == "cpu" else _GPU_CHUNK

    def in_chunks(
        self, count: int, generator: torch.Generator | None, make: Callable[[slice, torch.Generator], Tensor]
    ) -> Tensor:
        """Return `count` patterns (count, size, size) put together from chunks `make(rows, generator of its own)`.

        On a CPU every thread that torch may use works on chunks of its own: the pieces of one chunk are too small to
        be shared out.
        """
        size = self.geometry.size
        result = torch.empty(count, size, size, dtype=torch.float32, device=self.device)
        starts = range(0, count, self.chunk)
        source = generator.device if generator is not None else torch.device("cpu")
        seeds = torch.randint(2**62, (len(starts),), generator=generator, device=source).tolist()

        def fill(begin: tuple[int, int]) -> None:
            start, seed = begin
            rows = slice(start, min(start + self.chunk, count))
            result[rows] = make(rows, torch.Generator(self.device).manual_seed(seed))

        map_over_threads(fill, list(zip(starts, seeds, strict=True)), self.device)
        return result

    def detect(
        self, lit: DiffractedBeams, conditions: Conditions, generator: torch.Generator | None, noise: bool = True
    ) -> Tensor:
        """Return what the detector makes (B, size, size), float32, of diffracted beams under given conditions (B,)."""
        conditions = dataclasses.replace(conditions, direct_beam=lit.direct_beam)
        image = render(lit.pattern, lit.x, lit.y, lit.intensity, conditions, self.geometry)
        counted = self.simulate.dose.high > 0
        if counted:
            image.mul_(conditions.dose[:, None, None])
        block(image, conditions, self.simulate.dead_pixels, generator)
        return count_electrons(image, generator) if noise and counted else image


def render(
    pattern: Tensor, x: Tensor, y: Tensor, intensity: Tensor, conditions: Conditions, geometry: Geometry
) -> Tensor:
    """Return noise-free patterns (B, S, S) whose sum is 1 up to what falls off the edges.

    The diffracted spots (M,) are given by the number of their `pattern`, undistorted lab coordinates in 1/Å, y up, and
    intensities, of which only ratios within a pattern count; the direct beam and the background come from the
    conditions.
    """
    # Diffracted spots, relative to all of their pattern, brought to their share of the electrons.
    count = len(conditions.dose)
    total = torch.zeros(count, dtype=intensity.dtype, device=intensity.device).index_add_(0, pattern, intensity)
    intensity = intensity / total.clamp_min(1e-30)[pattern]
    seen = _where(intensity > _FAINTEST)
    pattern = pattern[seen]
    row, column = to_pixels(pattern, x[seen], y[seen], conditions, geometry)
    elastic = 1 - conditions.background
    diffracted = elastic * (1 - conditions.direct_beam)
    weight = torch.cat((intensity[seen] * diffracted[pattern], elastic * conditions.direct_beam))
    # The direct beam is one spot more of every pattern.
    row, column = torch.cat((row, conditions.centre_px[:, 0])), torch.cat((column, conditions.centre_px[:, 1]))
    pattern = torch.cat((pattern, torch.arange(count, device=pattern.device)))
    image = draw_spots(pattern, row, column, weight, conditions.disk_px, conditions.blur_px, geometry.size)
    return image.add_(draw_background(conditions, geometry))


def to_pixels(
    pattern: Tensor, x: Tensor, y: Tensor, conditions: Conditions, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return (row, column) (M,) of spots at x, y (1/Å, y up) under each pattern's distortion and centre."""
    stretch = (conditions.distortion / geometry.scale_inv_angstrom)[pattern]
    centre = conditions.centre_px[pattern]
    right = stretch[:, 0, 0] * x + stretch[:, 0, 1] * y
    up = stretch[:, 1, 0] * x + stretch[:, 1, 1] * y
    return centre[:, 0] - up, centre[:, 1] + right


def draw_spots(
    pattern: Tensor, row: Tensor, column: Tensor, weight: Tensor, disk_px: Tensor, blur_px: Tensor, size: int
) -> Tensor:
    """Return images (B, S, S) of blurred disks, each of total `weight` (M,), centred at `row`, `column` (M,).

    `disk_px` and `blur_px` (B,) are the radius and the blur of all spots of one pattern; spots of like extent are
    drawn together.
    """
    # One radial profile for each pattern, and an even number of pixels that its spots reach.
    count = len(disk_px)
    radius = disk_px.clamp_min(_SMALLEST_DISK)
    sigma = (blur_px**2 + _PIXEL_VARIANCE).sqrt()
    reach = radius + _REACH * sigma
    profile = _radial_profile(radius, sigma, reach)
    half = (reach + 0.5).ceil().int()
    half += half % 2  # fewer kinds of stamps
    own_half = half[pattern]
    near = (row > -own_half) & (row < size - 1 + own_half) & (column > -own_half) & (column < size - 1 + own_half)
    # A canvas with a margin for spots at the edges, to which spots of like extent are added together.
    margin = 2 * int(half.max())  # a disk whose edge just shows stands half outside
    wide = size + 2 * margin
    canvas = torch.zeros(count * wide * wide, dtype=weight.dtype, device=weight.device)
    extent = torch.where(near, own_half, -1)
    # Look each pixel of a stamp up in the profile by its distance, and add it to the canvas.
    for extent_px in sorted(set(half.tolist())):
        chosen = _where(extent == extent_px)
        own = pattern[chosen]
        r, c, w = row[chosen], column[chosen], weight[chosen]
        top, left = r.round(), c.round()
        line = torch.arange(-extent_px, extent_px + 1, device=r.device)
        entry = (_ENTRIES / reach)[own, None]
        down, right = ((line - (r - top)[:, None]) * entry) ** 2, ((line - (c - left)[:, None]) * entry) ** 2
        index = (down[:, :, None] + right[:, None, :]).sqrt_().clamp_max_(_ENTRIES - 1).int()
        value = _pick(profile, index.add_((own * _ENTRIES).int()[:, None, None])).mul_(w[:, None, None])
        start = (own * wide + top.long() + margin) * wide + left.long() + margin
        target = start.int()[:, None, None] + (line[:, None] * wide + line).int()
        canvas.index_add_(0, target.view(-1), value.view(-1))
    inner = slice(margin, margin + size)
    return canvas.view(count, wide, wide)[:, inner, inner].contiguous()


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _radial_profile(radius: Tensor, sigma: Tensor, reach: Tensor) -> Tensor:
    """Return the profile (B, entries) of a disk blurred by a Gaussian, of integral 1 in the plane.

    Entry k holds for distances from k to k + 1 parts of `reach`; the last is 0. The disk is cut into slabs; each is
    blurred exactly along the radius, and across by its mean height.
    """
    edge = -torch.cos(torch.linspace(0, math.pi, _SLABS + 1, device=radius.device))
    middle = (edge[1:] + edge[:-1]) / 2
    scale = 1 / (math.sqrt(2) * sigma)
    height = torch.erf((radius * scale)[:, None] * (1 - middle**2).sqrt()) / (2 * math.pi * radius**2)[:, None]
    distance = (torch.arange(_COMPUTED, device=radius.device) + 0.5) / _COMPUTED * reach[:, None]
    cuts = torch.erf((radius[:, None, None] * edge[:, None] - distance[:, None, :]) * scale[:, None, None])
    computed = torch.einsum("bs,bsk->bk", height, cuts[:, 1:] - cuts[:, :-1])
    profile = functional.interpolate(computed[:, None], _ENTRIES, mode="linear")[:, 0]
    profile[:, -1] = 0
    return profile


def draw_background(conditions: Conditions, geometry: Geometry) -> Tensor:
    """Return the background (B, S, S): an inelastic halo, a diffuse tail and an amorphous ring around the centre.

    All are made of Gaussians, which are products of a row and a column, so the sum is one small matrix product. The
    ring is a Gaussian less a narrower one of the same height. The sum over a pattern is its share of the dose.
    """
    widths = conditions.background_width / geometry.scale_inv_angstrom
    widths = torch.cat((widths, RING_HOLE * widths[:, 2:]), dim=1)
    line = torch.arange(geometry.size, device=widths.device, dtype=widths.dtype)
    fall = -0.5 / widths[:, :, None] ** 2
    rows = torch.exp(fall * (line - conditions.centre_px[:, :1, None]) ** 2)
    columns = torch.exp(fall * (line - conditions.centre_px[:, 1:, None]) ** 2)
    sums = rows.sum(2) * columns.sum(2)
    ring = (sums[:, 2] - sums[:, 3])[:, None]
    weight = conditions.background_weight * conditions.background[:, None]
    strength = torch.cat((weight[:, :2] / sums[:, :2], weight[:, 2:] / ring, -weight[:, 2:] / ring), dim=1)
    return torch.bmm((rows * strength[:, :, None]).transpose(1, 2), columns)


def block(image: Tensor, conditions: Conditions, dead_pixels: float, generator: torch.Generator | None) -> Tensor:
    """Set to zero, in place, what the beam stop hides and a share `dead_pixels` of the pixels; return `image`."""
    count, size = len(image), image.shape[-1]
    if bool((conditions.stop_px > 0).any()):
        line = torch.arange(size, device=image.device, dtype=image.dtype)
        down = (line - conditions.centre_px[:, :1])[:, :, None] ** 2
        right = (line - conditions.centre_px[:, 1:])[:, None, :] ** 2
        image.masked_fill_(down + right < conditions.stop_px[:, None, None] ** 2, 0)
    if dead_pixels > 0:
        most = math.ceil(dead_pixels * size * size)
        source = generator.device if generator is not None else image.device
        drawn = torch.rand(2, count, most, generator=generator, device=source).to(image.device)
        dead = drawn[1] < dead_pixels * size * size / most
        where = (drawn[0] * (size * size)).long().clamp_max_(size * size - 1)
        where += torch.arange(count, device=image.device)[:, None] * (size * size)
        image.view(-1).index_fill_(0, where[dead], 0.0)
    return image


def count_electrons(expected: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return Poisson counts (any shape, float32) of the `expected` counts.

    torch's own sampler on a CPU is several times slower. One uniform number per pixel is turned into the count by
    climbing the cumulative distribution; few pixels need more than a few steps, and above 12 expected counts the
    quantile is taken from its normal expansion [1].

    References
    ----------
    [1] M. B. Giles, Algorithm 955: approximation of the inverse Poisson cumulative distribution function,
        ACM Trans. Math. Softw. 42 (2016) 7, eq. for the normal asymptotic expansion.
    """
    if generator is not None and generator.device != expected.device:
        uniform = torch.rand(expected.shape, generator=generator, device=generator.device).to(expected.device)
    elif expected.is_cuda:
        return torch.poisson(expected, generator=generator)
    else:
        uniform = torch.rand(expected.shape, generator=generator, device=expected.device)
    uniform.clamp_min_(2.0**-25)  # a number of exactly 0 would count nothing, however many electrons are expected
    # A few steps up the cumulative distribution for all pixels ...
    chance = torch.exp(-expected)
    below = chance.clone()
    steps = torch.gt(uniform, below).view(torch.uint8)
    _climb(uniform, expected, chance, below, steps, range(1, _FULL_STEPS + 1))
    counts = steps.to(expected.dtype).view(-1)
    # ... then more steps for the few that are not there yet, and the expansion for the brightest.
    bright = _where(steps > _FULL_STEPS)
    light = expected.view(-1).index_select(0, bright)
    large = bright[light > _LARGE]
    few = bright[light <= _LARGE]
    u, e, c, b, s = (part.view(-1).index_select(0, few) for part in (uniform, expected, chance, below, steps))
    _climb(u, e, c, b, s, range(_FULL_STEPS + 1, int(_LARGE + 8 * math.sqrt(_LARGE))))
    counts.index_copy_(0, few, s.to(e.dtype))
    u, e = (part.view(-1).index_select(0, large) for part in (uniform, expected))
    counts.index_copy_(0, large, _quantile(u, e))
    return counts.view(expected.shape)


def _where(mask: Tensor) -> Tensor:
    """Return the flat indices at which `mask` holds; numpy finds them several times faster on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def _climb(uniform: Tensor, expected: Tensor, chance: Tensor, below: Tensor, steps: Tensor, numbers: range) -> None:
    """Raise `steps` (uint8) in place while the cumulative probability `below` falls short of `uniform`."""
    for number in numbers:
        chance.mul_(expected).mul_(1 / number)
        below.add_(chance)
        steps.add_(torch.gt(uniform, below).view(torch.uint8))


def _quantile(uniform: Tensor, expected: Tensor) -> Tensor:
    """Return the Poisson quantile of `uniform` for large `expected` counts."""
    normal = torch.special.ndtri(uniform)
    root = expected.sqrt()
    real = expected + root * normal + 1 / 3 + normal**2 / 6 - (normal / 36 + normal**3 / 72) / root
    quantile: Tensor = real.floor().clamp_min(0)
    return quantile


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
        if reach > 1 / _FULL_REACH:
            self.notes.append(
                f"the patterns reach {source.radius_inv_angstrom:.2f} 1/Å, but the model looks only at "
                f"{target.radius_inv_angstrom:.2f} 1/Å; what lies farther out is not used"
            )
        if abs(source.kv / target.kv - 1) > SAME_KV:
            self.notes.append(
                f"the scan was taken at {source.kv:g} kV, the model is made for {target.kv:g} kV: spots stand where "
                "they should, but which of them are excited differs a little"
            )
        self._factor = max(1, int(ratio + 1e-6))
        self._grid = self._sampling() if self.needed else None
        self._averages = self._grid is not None and self._is_identity(self._grid)

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

    def _is_identity(self, grid: Tensor) -> bool:
        """Whether the averaged pixels already stand where the target's do, to a thousandth of a pixel."""
        size = self.target.size
        line = (2 * torch.arange(size) + 1) / size - 1
        same = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
        return self.source.size == size * self._factor and bool(((grid - same).abs() < 2e-3 / size).all())

    def __call__(self, patterns: Tensor) -> Tensor:
        """Return `patterns` (B, H, W) as the target shows them (B, S, S); the very same ones when nothing is to do."""
        if self._grid is None:
            return patterns
        self._grid = self._grid.to(patterns.device)
        counts = patterns.to(torch.float32)[:, None]
        if self._factor > 1:
            counts = functional.avg_pool2d(counts, self._factor)
        if self._averages:
            return counts[:, 0]
        grid = self._grid.expand(len(counts), -1, -1, -1)
        moved = functional.grid_sample(counts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved[:, 0]
