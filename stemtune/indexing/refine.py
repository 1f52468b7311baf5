"""A physical fit of orientation, scale and centre to each pattern, from candidates that are nearly right.

Positions come first: the counts around each predicted spot stand off by what the turn about the beam, the scale and
the centre are wrong, and linear least squares finds these four. Then the tilt: intensities of thick crystals fall off
with the excitation error s as 1 / (1 + (s / w)²), the two-beam law averaged over the thickness, and of all tilts nearby
those count whose spots are strong where the pattern is. Both fits know how far off candidates usually are, so that a
pattern of few counts leaves its candidate where it was.

Shape legend: B patterns, n candidates, K spots, P precession angles, J tilts.

References
----------
P. B. Hirsch et al., Electron Microscopy of Thin Crystals (1965), ch. 8: the two-beam intensity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune._parallel import map_over_threads
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import reduce_to_fundamental_zone
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.grid import from_rotation_vector
from stemtune.learning.model import Candidates
from stemtune.learning.models.polar_templates import centring
from stemtune.learning.models.spot_features import NARROW, WIDE, SpotReader

MIN_CONFIDENCE_RATIO = 0.05  # candidates with less than this share of the best one's confidence stay as they are
SPREAD_DEG = 0.5  # standard deviation, about each axis, of the errors that right candidates come with
SPOTS = 96  # predicted spots that take part in the fit
SPOT_WIDTH = 0.025  # width (Gaussian sigma, 1/Å) of a spot: how far single electrons stand from its middle
SCALE_SPREAD, CENTRE_SPREAD = 0.013, 0.015
"""Standard deviations of the errors of the scale (relative), and of the centre (1/Å) once the direct beam is used."""

SATURATION_COUNTS = 20.0
"""Counts beyond which more of them say little more about a spot's place: lens distortions move it too."""

ROUNDS = 2  # how often spots are looked for where the fit has moved them
ERROR_WIDTH = 0.01  # excitation error in 1/Å at which the intensity has fallen to a half
PRECESSIONS_DEG = (0.0, 0.35, 0.7)
"""Precession semi-angles that are tried: they spread each spot's intensity over more excitation errors."""

POWER = 0.3  # power of the couplings' squares in the predicted intensities: thick crystals even them out
GAMMA = 0.25  # power of the counts
TILT_REACH, TILT_STEP = 2.4, 0.4  # how far from the candidate tilts are tried, and how far apart, in spreads
SHARPNESS = 80.0
"""Factor on the correlation that makes it the logarithm of a likelihood.

Found, as the numbers above, on our own Bloch-wave patterns with and without precession, of 800 to 30,000 electrons.
"""

_BATCH = 64


class Refinement(NamedTuple):
    """What the fit found: `orientation` (B, n, 4) in the fundamental zone, NaN where the candidates were; `ncc` (B, n)
    the correlation, 0 to 1, of the counts with the fitted spots, NaN for candidates that were not fitted; by the best
    candidate `scale` (B,) the true over the assumed reciprocal length of a pixel, and `centre_px` (B, 2) row and column
    of the direct beam, NaN where there is none.
    """

    orientation: Tensor
    ncc: Tensor
    scale: Tensor
    centre_px: Tensor


class Refiner:
    """Fits candidates to patterns (setting `model.reach`).

    Right candidates are `spread_deg` off about each axis, see `OrientationModel.spread_deg`; the work is done on
    `device`.
    """

    def __init__(
        self,
        config: Config,
        phase: Phase,
        geometry: Geometry,
        device: torch.device | str = "cpu",
        spread_deg: float = SPREAD_DEG,
    ) -> None:
        self.phase, self.geometry = phase, geometry
        self.spread = math.radians(spread_deg)
        self.reader = SpotReader(phase, geometry, SPOTS, config.model.reach).to(device)
        self.tilt_J2 = _tilts(TILT_REACH * self.spread, TILT_STEP * self.spread).to(device)

    @torch.no_grad()
    def refine(self, patterns: Tensor, candidates: Candidates) -> Refinement:
        """Return the candidates (B, n) fitted to patterns (B, H, W) of counts, in their order."""

        def work(rows: slice) -> Refinement:
            return self._refine(patterns[rows], candidates.orientation[rows], candidates.confidence[rows])

        parts = [slice(start, start + _BATCH) for start in range(0, len(patterns), _BATCH)]
        done = map_over_threads(work, parts, patterns.device)
        return Refinement(*(torch.cat(column) for column in zip(*done, strict=True)))

    def _refine(self, patterns: Tensor, start_Bn4: Tensor, confidence_Bn: Tensor) -> Refinement:
        # Put the direct beam where it should be, then collect counts in windows around every pixel.
        counts, off_B2 = centring(patterns, self.geometry, self.reader.beam_px)
        window = self.reader.windows(counts)
        orientation_Bn4 = start_Bn4.float().clone()
        known_Bn = orientation_Bn4.isfinite().all(-1)
        ncc_Bn = torch.full_like(orientation_Bn4[..., 0], torch.nan)
        scale_B, centre_B2 = torch.full_like(ncc_Bn[:, 0], torch.nan), torch.full_like(off_B2, torch.nan)
        # Only candidates that may be right are worth a fit; the best one always is.
        fitted_Bn = known_Bn & (confidence_Bn >= MIN_CONFIDENCE_RATIO * confidence_Bn[:, :1])
        fitted_Bn[:, 0] = known_Bn[:, 0]
        # Fit rank by rank; the best candidate also says where the beam is and how large a pixel.
        for rank in range(fitted_Bn.shape[1]):
            rows = fitted_Bn[:, rank].nonzero()[:, 0]
            if not len(rows):
                continue
            fitted, ncc, moved = self._fit(window[rows], orientation_Bn4[rows, rank])
            orientation_Bn4[rows, rank], ncc_Bn[rows, rank] = fitted, ncc
            if rank == 0:
                right, up = moved[:, 2:].unbind(-1)
                scale_B[rows] = 1 / (1 + moved[:, 1])  # spots farther out than expected: a pixel is less than it says
                left = torch.stack((-up, right), dim=-1) / self.geometry.scale_inv_angstrom
                centre_B2[rows] = off_B2[rows] + left + left.new_tensor(self.geometry.centre_px)
        return Refinement(orientation_Bn4, ncc_Bn, scale_B, centre_B2)

    def _fit(self, window: Tensor, start_B4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return fitted orientations (B, 4), their ncc (B,), and turn, growth and shift (B, 4) of the spots."""
        place, error, coupling = (part[:, 0] for part in self.reader.predicted(start_B4[:, None]))
        # First the places: turn, growth and shift, looked for again where they have moved the spots.
        affine = _affine(place)
        moved = place.new_zeros(len(place), 4)
        for _ in range(ROUNDS):
            moved = self._fit_places(self._sample(window, _moved_places(place, affine, moved)), affine, moved)
        # Then the tilt, by the counts at the fitted places.
        counts_BK = self._sample(window, _moved_places(place, affine, moved))[..., 0].clamp_min(0)
        tilt_B2, ncc_B = self._fit_tilt(counts_BK, place, error, coupling.pow(2 * POWER))
        # Spots turned anticlockwise mean an orientation, which takes the lab to the crystal, turned clockwise.
        vector = torch.cat((tilt_B2, -moved[:, :1]), dim=-1)
        fitted_B4 = multiply(start_B4, from_rotation_vector(vector))
        return reduce_to_fundamental_zone(fitted_B4, self.phase.symmetry), ncc_B, moved

    def _sample(self, window: Tensor, place_BK2: Tensor) -> Tensor:
        sampled, inside = self.reader.sampled(window, place_BK2[:, None])
        return (sampled * inside[..., None])[:, 0]

    def _fit_places(self, sampled: Tensor, affine: Tensor, moved: Tensor) -> Tensor:
        """Return turn (radians), growth and shift (x, y in 1/Å) (B, 4) that take predicted places to the counts.

        Least squares over the mean displacements of the counts from the places after `moved`. A spot weighs as much
        as its counts above the surroundings do, up to `SATURATION_COUNTS`; and less the farther they are off, down to
        nothing at one width of the window, for these belong to another spot. The unknowns keep to 0 by their spreads.
        """
        counts_BK = sampled[..., 0].clamp_min(0)
        # A window and a spot, both Gaussian, show a shift smaller than it is.
        shift_BK2 = sampled[..., 1:3] / (counts_BK + 1)[..., None] * (NARROW * (1 + (SPOT_WIDTH / NARROW) ** 2))
        # Weights: counts above the surroundings, saturating, and less the farther they are off.
        above_BK = (counts_BK - (NARROW / WIDE) ** 2 * sampled[..., 3]).clamp_min(0)
        near_BK = (1 - (sampled[..., 1:3] / (counts_BK + 1)[..., None]).square().sum(-1)).clamp_min(0).square()
        weight = (near_BK * above_BK / (1 + above_BK / SATURATION_COUNTS))[..., None, None]
        # Normal equations; the priors keep the unknowns near 0 where counts say little.
        stiff = (SPOT_WIDTH / affine.new_tensor([self.spread, SCALE_SPREAD, CENTRE_SPREAD, CENTRE_SPREAD])).square()
        normal = torch.einsum("bkij,bkil->bjl", weight * affine, affine) + torch.diag(stiff)
        right = torch.einsum("bkij,bki->bj", weight * affine, shift_BK2) - stiff * moved
        step: Tensor = torch.linalg.solve(normal, right)
        return moved + step

    def _fit_tilt(self, counts_BK: Tensor, place: Tensor, error: Tensor, strength_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tilts (B, 2), rotation vectors in radians, and the best correlation (B,)."""
        # Excitation error of every spot after every tilt.
        x, y = place.unbind(-1)
        off_BKJ = error[..., None] - y[..., None] * self.tilt_J2[:, 0] + x[..., None] * self.tilt_J2[:, 1]
        off_BKJ = off_BKJ.square_()
        across_BK = place.square().sum(-1)
        # Compressed counts of unit length.
        counts_BK = counts_BK.pow(GAMMA)
        counts_BK = counts_BK / counts_BK.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-6)
        # Correlation with the predicted intensities at every tilt, for every precession that is tried.
        scores = []
        for precession_deg in PRECESSIONS_DEG:
            width_BK = ERROR_WIDTH**2 + math.radians(precession_deg) ** 2 / 2 * across_BK
            height_BK = strength_BK * ERROR_WIDTH / width_BK.sqrt()  # spread, the whole intensity stays what it was
            fall_BKJ = width_BK[..., None] / (width_BK[..., None] + off_BKJ)
            length_BJ = torch.einsum("bk,bkj->bj", height_BK.square(), fall_BKJ.square()).sqrt()
            scores.append(torch.einsum("bk,bkj->bj", counts_BK * height_BK, fall_BKJ) / length_BJ)
        score_BPJ = torch.stack(scores, dim=1)
        # The mean tilt by likelihood and prior.
        prior_J = self.tilt_J2.square().sum(-1) / (2 * self.spread**2)
        share_BJ = (SHARPNESS * score_BPJ - prior_J).flatten(1).softmax(-1).view_as(score_BPJ).sum(1)
        return share_BJ @ self.tilt_J2, score_BPJ.amax((1, 2))


def _affine(place_BK2: Tensor) -> Tensor:
    """Return how places move (B, K, 2, 4) with turn, growth and shift in x and y."""
    x, y = place_BK2.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack((torch.stack((-y, x, one, zero), -1), torch.stack((x, y, zero, one), -1)), dim=-2)


def _moved_places(place_BK2: Tensor, affine: Tensor, moved_B4: Tensor) -> Tensor:
    return place_BK2 + torch.einsum("bkij,bj->bki", affine, moved_B4)


def _tilts(reach: float, step: float) -> Tensor:
    """Return tilts (J, 2), float32, on a hexagonal grid of spacing `step` out to `reach`, both in radians."""
    count = math.ceil(reach / step * 1.2)
    line = torch.arange(-count, count + 1, dtype=torch.float64)
    down, right = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack((right + 0.5 * down, math.sqrt(0.75) * down), dim=-1).flatten(0, 1) * step
    return grid[torch.linalg.vector_norm(grid, dim=1) <= reach * (1 + 1e-9)].float()
