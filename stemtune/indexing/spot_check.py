"""Does a pattern show the crystal that the model sees in it? The decision *not indexed*, whatever the model.

The spots that the candidate predicts are looked up in the measured pattern, and once more after turning them about the
beam by other angles. A crystal is bright where its own spots are and darker where the turned ones are; vacuum, noise,
an amorphous halo or a beam stop is as bright here as there. Comparing a pattern with itself needs no calibrated
counts, no background model and no threshold per detector.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import to_matrix
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

SHAPE_WIDTH = 0.02  # width (1/Å) of the shape factor exp(-(s / width)²) that says which spots are expected
MIN_EXPLAINED_INTENSITY = 0.07
"""Smallest `explained_intensity` of a pattern that counts as indexed: noise, halos and beam stops stay below it."""

MIN_Z_SCORE = 2.0  # smallest `spot_z_score` of a pattern that counts as indexed
MAX_DIM_SHARE, MIN_DIM_Z_SCORE = 0.1, 3.0
"""A pattern with less than this share of its intensity around the direct beam needs this `spot_z_score` instead: stray
peaks of a support film or a few stray electrons lie on predicted spots too easily.

How the four numbers were set: on simulated LiNiO2 over all ranges of `SimulateConfig` (300 to 100,000 electrons) they
keep 94 % of 1,500 patterns whose candidate is 1.2 degrees off; of candidates that are wrong by more than 5 degrees they
keep 43 %. Of 500 patterns each of vacuum with stray electrons, uniform noise, amorphous halos and beam stops, all
indexed by the model `matched`, which looks for the best match in them, they keep none. On the cathode scan they keep
every pattern with 20 or more peaks, and 5 % of those beside the particle, which have 4 stray peaks on average.
"""

LIMITS = {
    "explained_intensity": MIN_EXPLAINED_INTENSITY,
    "spot_z_score": MIN_Z_SCORE,
    "signal_dim": MIN_DIM_Z_SCORE,
    "dim": MAX_DIM_SHARE,
}
"""The four by the names that maps keep them under."""

_SPOTS = 48  # strongest expected spots that are looked up
_TURNS = 32  # other in-plane angles for comparison
_NEAREST_TURN_DEG = 10.0
_POOLED = 64  # patterns are added up to about this many pixels per edge first
_FAINTEST = 0.03  # spots weaker than this share of the pattern's strongest are not looked up


class SpotScores(NamedTuple):
    """What `SpotCheck` finds for B patterns.

    `spot_z_score` (B,) is the evidence that the predicted spots are there: the rank of each spot's brightness among its
    turned copies, averaged (weight: root of the expected amplitude), less what chance gives, in standard deviations of
    chance. `explained_intensity` (B,) is the share of the intensity around the direct beam that the predicted spots
    hold beyond chance: 1 when all of it lies on them, 0 when no more than on turned spots. `share` (B,) is that of the
    pattern's whole intensity which lies around the direct beam, out to its edge.
    """

    spot_z_score: Tensor
    explained_intensity: Tensor
    share: Tensor


def is_crystal(scores: SpotScores) -> Tensor:
    """Return (B,) whether each pattern shows the crystal in the orientation that was asked about."""
    needed = torch.where(scores.share < MAX_DIM_SHARE, MIN_DIM_Z_SCORE, MIN_Z_SCORE)
    return (scores.explained_intensity >= MIN_EXPLAINED_INTENSITY) & (scores.spot_z_score >= needed)


class SpotCheck:
    """Compares patterns of one calibration with the spots of given orientations, on `device`.

    Raises a `UserError` when no reflection lies between the direct beam and the nearest edge of the patterns.
    """

    def __init__(self, phase: Phase, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.geometry = geometry
        self._factor = max(1, round(geometry.size / _POOLED))
        row, column = geometry.centre_px
        edge = min(row, column, geometry.size - 1 - row, geometry.size - 1 - column)
        self._reach = (edge - self._factor) * geometry.scale_inv_angstrom
        listed = phase.reflections(self._reach)
        if not len(listed.g):
            raise UserError(
                f"no reflection of {phase.name} lies between the direct beam, at row {row:g}, column {column:g}, and"
                f" the nearest edge of a pattern of {geometry.size} px at {geometry.scale_inv_angstrom:g} 1/Å per"
                " pixel; check --centre and --scale"
            )
        self._g = listed.g.to(self.device, torch.float32)
        self._amplitude = listed.structure_factor.abs().to(self.device, torch.float32)
        shortest = float(listed.g.norm(dim=1).min())
        self._ring = self._mask(0.6 * shortest, self._reach).to(self.device)
        spread = torch.linspace(_NEAREST_TURN_DEG, 360 - _NEAREST_TURN_DEG, _TURNS, dtype=torch.float64)
        uneven = 3 * torch.sin(7.0 * torch.arange(_TURNS, dtype=torch.float64))
        turns = torch.cat((torch.zeros(1, dtype=torch.float64), torch.deg2rad(spread + uneven)))
        # Products with (x, y, 1) are the places of turned spots in windows: their rows, and then their columns.
        step, shift = geometry.scale_inv_angstrom * self._factor, 0.5 / self._factor - 1
        rows = torch.stack((-turns.sin() / step, -turns.cos() / step, 0 * turns + row / self._factor + shift), dim=1)
        columns = torch.stack((turns.cos() / step, -turns.sin() / step, 0 * turns + column / self._factor + shift), 1)
        self._turned = torch.cat((rows, columns)).to(self.device, torch.float32)

    def _mask(self, low: float, high: float) -> Tensor:
        """Return (P * P,) 1 where a pooled pixel lies between the two distances (1/Å) from the beam, else 0."""
        count = self.geometry.size // self._factor
        line = (torch.arange(count) + 0.5) * self._factor - 0.5
        row, column = self.geometry.centre_px
        distance = torch.hypot(line[:, None] - row, line[None, :] - column) * self.geometry.scale_inv_angstrom
        return ((distance >= low) & (distance <= high)).to(torch.float32).flatten()

    def __call__(self, patterns: Tensor, orientation: Tensor) -> SpotScores:
        """Return the scores of `patterns` (B, H, W) for `orientation` (B, 4), lab-to-crystal.

        A pattern without any intensity around the direct beam, and a candidate that is NaN, score 0.
        """
        x, y, weight = self._expected(orientation.to(self.device, torch.float32))
        pooled = self._pooled(patterns)
        pairs = pooled[:, 1:] + pooled[:, :-1]
        window = pairs[:, :, 1:] + pairs[:, :, :-1]  # (B, P - 1, P - 1) sums over two by two pooled pixels
        across = window.shape[-1]
        spot_B3K = torch.stack((x, y, torch.ones_like(x)), dim=1)
        rows, columns = (self._turned @ spot_B3K).round_().clamp_(0, across - 1).chunk(2, dim=1)
        place = rows.mul_(across).add_(columns).long()  # whole numbers, exact in single precision
        found = window.flatten(1).gather(1, place.flatten(1)).view(place.shape)  # (B, 1 + turns, spots)
        signal = self._evidence(found, weight)
        total = pooled.flatten(1) @ self._ring
        held = (found * (weight > 0)[:, None]).sum(-1) / total.clamp_min(1e-12)[:, None]
        chance = held[:, 1:].mean(-1)
        fit = ((held[:, 0] - chance) / (1 - chance).clamp_min(1e-6)).clamp(0, 1)
        seen = (total > 0) & torch.isfinite(orientation.to(self.device)).all(-1)
        share = total / pooled.sum((1, 2)).clamp_min(1e-12)
        return SpotScores(*(torch.where(seen, score, 0.0) for score in (signal, fit, share)))

    def _expected(self, orientation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, y (1/Å) and weight (B, K) of the strongest spots; weight 0 for those that do not count."""
        matrix = to_matrix(orientation.nan_to_num(0.5))  # lab to crystal; its transpose takes g to the lab
        x, y, z = (matrix.permute(2, 0, 1).flatten(0, 1) @ self._g.T).view(3, len(matrix), -1).unbind()  # (B, N)
        radius = 1 / self.geometry.wavelength_angstrom
        across = x.square() + y.square()
        error = across / (2 * radius) - z
        weight = self._amplitude * torch.exp(-((error / SHAPE_WIDTH) ** 2))
        strongest = min(_SPOTS, weight.shape[1])
        weight, chosen = weight.topk(strongest, dim=1, sorted=False)
        faint = weight < _FAINTEST * weight.amax(1, keepdim=True)
        return x.gather(1, chosen), y.gather(1, chosen), weight.masked_fill(faint, 0)

    def _pooled(self, patterns: Tensor) -> Tensor:
        """Return (B, P, P) sums over squares of pixels; NaN, infinities and counts below zero add nothing."""
        counts = patterns.to(self.device)
        if counts.is_floating_point():
            counts = counts.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min_(0)
        counts = counts.to(torch.float32)
        factor, count = self._factor, self.geometry.size // self._factor
        if factor == 1:
            return counts
        end = count * factor
        rows = reduce(torch.add, [counts[:, place:end:factor] for place in range(factor)])
        return reduce(torch.add, [rows[..., place:end:factor] for place in range(factor)])

    @staticmethod
    def _evidence(found: Tensor, weight: Tensor) -> Tensor:
        """Return the signal (B,) from the windows' intensities (B, 1 + turns, K) and their weights (B, K)."""
        own, turned = found[:, :1], found[:, 1:]
        rank = torch.sign(own - turned).mean(1) / 2  # ties count half
        root = weight.sqrt()
        return (rank * root).sum(1) / (weight.sum(1) / 12).clamp_min(1e-12).sqrt()
