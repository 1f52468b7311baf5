"""A physical fit of orientation, scale and centre to each pattern, from answers that are nearly right.

Positions come first: the counts around each predicted spot stand off by what the turn about the beam, the scale and
the centre are wrong, and linear least squares finds these four. Then the tilt: intensities of thick crystals fall off
with the excitation error s as 1 / (1 + (s / w)²), the two-beam law averaged over the thickness, and of all tilts nearby
those count whose spots are strong where the pattern is.

Shape legend: B patterns, n answers, M answers that are fitted, K spots, J tilts.

References
----------
P. B. Hirsch et al., Electron Microscopy of Thin Crystals (1965), ch. 8: the two-beam intensity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import reduce_to_fundamental_zone
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.threads import map_chunks
from stemtune.learning.grid import from_rotation_vector
from stemtune.learning.model import Answers
from stemtune.learning.models.bank import centred
from stemtune.learning.models.evidence import NARROW, Evidence, Pictures

SPOTS = 96
"""Predicted spots that take part in the fit."""

WIDTH = 0.01
"""Excitation error in 1/Å at which the intensity has fallen to a half."""

SWINGS_DEG = (0.0, 0.35, 0.7)
"""Precession semi-angles that are tried: they spread each spot's excitation error."""

POWER = 0.3
"""Power of the couplings' squares in the predicted intensities: thick crystals even them out."""

GAMMA = 0.25
"""Power of the counts."""

REACH_DEG, STEP_DEG = 1.2, 0.2
"""How far from the answer tilts are tried, and how far apart."""

SHARPNESS = 80.0
"""Factor on the correlation that makes it the logarithm of a likelihood."""

PRIOR_DEG = 0.5
"""Spread of the errors that answers come with."""

_BATCH = 64
_STIFF = (50.0, 250.0, 50.0)  # spots' worth of trust in turn, scale and centre as they were


class Refined(NamedTuple):
    """What the fit found.

    Attributes
    ----------
    orientation
        (B, n, 4) in the fundamental zone; NaN where the answers were.
    goodness
        (B, n) correlation, 0 to 1, of the counts with the fitted spots; NaN where there was nothing to fit.
    scale, centre_px
        (B,) true over assumed reciprocal length of a pixel, and (B, 2) row and column of the direct beam, both by the
        best answer.
    """

    orientation: Tensor
    goodness: Tensor
    scale: Tensor
    centre_px: Tensor


class Refiner:
    """Fits answers to patterns.

    Parameters
    ----------
    config
        Reads `model.reach`.
    phase, geometry
        The crystal and the calibration of the patterns.
    device
        Where the work is done.
    """

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        self.phase, self.geometry = phase, geometry
        self.evidence = Evidence(phase, geometry, SPOTS, config.model.reach).to(device)
        self.tilt_J2 = _tilts(REACH_DEG, STEP_DEG).to(device)

    @torch.no_grad()
    def refine(self, patterns: Tensor, answers: Answers) -> Refined:
        """Return the answers (B, n) fitted to patterns (B, H, W) of counts."""
        starts = range(0, len(patterns), _BATCH)
        parts = [slice(start, start + _BATCH) for start in starts]

        def work(rows: slice) -> Refined:
            return self._refine(patterns[rows], answers.orientation[rows])

        done = map_chunks(work, parts) if patterns.device.type == "cpu" else [work(rows) for rows in parts]
        return Refined(*(torch.cat(column) for column in zip(*done, strict=True)))

    def _refine(self, patterns: Tensor, answer_Bn4: Tensor) -> Refined:
        counts = centred(patterns, self.geometry, self.evidence.beam_px)
        pictures = self.evidence.pictures(counts)
        known_Bn = ~answer_Bn4.isnan().any(-1)
        start_Bn4 = answer_Bn4.float().nan_to_num(0.5)
        spots = _Spots.of(self.evidence, start_Bn4)
        seen = self._seen(pictures, spots.place)
        moved = _moved(seen, spots.place)
        place = spots.place_after(moved)
        counts_BnK = self._seen(pictures, place)[..., 0].clamp_min(0)
        tilt_Bn2, goodness_Bn = self._tilted(counts_BnK, spots)
        turn_Bn1 = -moved[..., :1]
        fitted_Bn4 = multiply(start_Bn4, from_rotation_vector(torch.cat((tilt_Bn2, turn_Bn1), dim=-1)))
        fitted_Bn4 = reduce_to_fundamental_zone(fitted_Bn4, self.phase.symmetry)
        size = self.geometry.scale_inv_angstrom
        centre_B2 = torch.stack((-moved[:, 0, 3], moved[:, 0, 2]), dim=-1) / size
        return Refined(
            fitted_Bn4.masked_fill(~known_Bn[..., None], torch.nan),
            goodness_Bn.masked_fill(~known_Bn, torch.nan),
            1 / (1 + moved[:, 0, 1]),
            centre_B2 + centre_B2.new_tensor(self.geometry.centre_px),
        )

    def _seen(self, pictures: Pictures, place: Tensor) -> Tensor:
        sampled, inside = self.evidence.sampled(pictures.window, place)
        return sampled * inside[..., None]

    def _tilted(self, counts_BnK: Tensor, spots: _Spots) -> tuple[Tensor, Tensor]:
        """Return the tilts (B, n, 2), rotation vectors in radians, and the best correlation (B, n)."""
        x, y = spots.place.unbind(-1)
        error_BnKJ = spots.error[..., None] - y[..., None] * self.tilt_J2[:, 0] + x[..., None] * self.tilt_J2[:, 1]
        error_BnKJ = error_BnKJ.square()
        across_BnK = (x.square() + y.square())[..., None]
        counts_BnK = counts_BnK.pow(GAMMA)
        counts_BnK = counts_BnK / counts_BnK.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-6)
        weighted_BnK = counts_BnK * spots.strength
        scores = []
        for swing in SWINGS_DEG:
            width_BnK = WIDTH**2 + math.radians(swing) ** 2 / 2 * across_BnK
            fall_BnKJ = width_BnK / (width_BnK + error_BnKJ)
            length_BnJ = torch.einsum("bnk,bnkj->bnj", spots.strength.square(), fall_BnKJ.square()).sqrt()
            scores.append(torch.einsum("bnk,bnkj->bnj", weighted_BnK, fall_BnKJ) / length_BnJ)
        score_BnPJ = torch.stack(scores, dim=-2)
        prior_J = self.tilt_J2.square().sum(-1) / (2 * math.radians(PRIOR_DEG) ** 2)
        share_BnJ = (SHARPNESS * score_BnPJ - prior_J).flatten(-2).softmax(-1).view_as(score_BnPJ).sum(-2)
        return share_BnJ @ self.tilt_J2, score_BnPJ.amax((-2, -1))


class _Spots(NamedTuple):
    """Predicted spots (B, n, K) of answers: lab coordinates (..., 2) and excitation errors in 1/Å, strength."""

    place: Tensor
    error: Tensor
    strength: Tensor

    @classmethod
    def of(cls, evidence: Evidence, orientation: Tensor) -> _Spots:
        place, error, coupling = evidence.predicted(orientation)
        return cls(place, error, coupling.pow(2 * POWER))

    def place_after(self, moved: Tensor) -> Tensor:
        """Return the places when turned, scaled and shifted as `moved` (..., 4) says."""
        turn, scale, right, up = (part[..., None] for part in moved.unbind(-1))
        x, y = self.place.unbind(-1)
        return torch.stack((x - turn * y + scale * x + right, y + turn * x + scale * y + up), dim=-1)


def _moved(seen: Tensor, place: Tensor) -> Tensor:
    """Return turn (radians), relative growth and shift (x, y in 1/Å) (B, n, 4) that take predicted places to counts.

    Weighted linear least squares over the mean displacements in the narrow windows. A spot's weight is its counts, up
    to a limit, and the unknowns keep to 0 as if by `_STIFF` spots 1 1/Å from the centre.
    """
    counts_BnK = seen[..., 0].clamp_min(0)
    shift_BnK2 = seen[..., 1:3] / (counts_BnK + 1)[..., None] * NARROW
    x, y = place.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.stack((torch.stack((-y, x, one, zero), -1), torch.stack((x, y, zero, one), -1)), dim=-2)
    weight = (counts_BnK / (1 + counts_BnK / 20))[..., None, None]
    turn, scale, centre = _STIFF
    normal = torch.einsum("bnkij,bnkil->bnjl", weight * rows, rows) + torch.diag(
        rows.new_tensor([turn, scale, centre, centre]) / 50
    )
    right = torch.einsum("bnkij,bnki->bnj", weight * rows, shift_BnK2)
    answer: Tensor = torch.linalg.solve(normal, right)
    return answer


def _tilts(reach_deg: float, step_deg: float) -> Tensor:
    """Return tilts (J, 2) in radians on a hexagonal grid."""
    count = math.ceil(reach_deg / step_deg * 1.2)
    line = torch.arange(-count, count + 1, dtype=torch.float64)
    down, right = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack((right + 0.5 * down, math.sqrt(0.75) * down), dim=-1).flatten(0, 1) * step_deg
    near = grid[torch.linalg.vector_norm(grid, dim=1) <= reach_deg + 1e-9]
    return torch.deg2rad(near).float()


__all__ = ["Refined", "Refiner"]
